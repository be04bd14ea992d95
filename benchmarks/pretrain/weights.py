"""Weights of the parts in a few small files, and the pipeline folder made of them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from atomdiff.toybox.judge import JUDGE_FOLDER, load_judge
from benchmarks.pretrain.architecture import assemble, build_text_encoder, build_tokenizer, build_unet, build_vae

SHARD_BYTES = 15 * 1024**2


def save_shards(parts: dict[str, nn.Module], folder: Path, name: str = "weights") -> list[Path]:
    """Write the weights of the parts in half precision as `<name>-<i>.safetensors`, each at most 15 MiB."""
    folder.mkdir(parents=True, exist_ok=True)
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for part, module in parts.items():
        for key, value in module.state_dict().items():
            tensor = (value.half() if value.is_floating_point() else value).cpu().contiguous()
            if size + tensor.nbytes > SHARD_BYTES:
                shards.append({})
                size = 0
            shards[-1][f"{part}.{key}"] = tensor
            size += tensor.nbytes
    paths = [folder / f"{name}-{index}.safetensors" for index in range(len(shards))]
    for path, shard in zip(paths, shards, strict=True):
        save_file(shard, path)
    return paths


def load_shards(paths: Iterable[Path]) -> dict[str, dict[str, Tensor]]:
    """The state dicts by part, in float32, of the files that `save_shards` wrote."""
    found: dict[str, dict[str, Tensor]] = {}
    for path in sorted(paths):
        for key, value in load_file(path).items():
            part, _, name = key.partition(".")
            found.setdefault(part, {})[name] = value.float() if value.is_floating_point() else value
    return found


def load_weights(folder: Path) -> tuple[dict[str, dict[str, Tensor]], float]:
    """The state dicts by part, in float32, and the scaling factor of the latents.

    Args:
        folder: that of a run, with `weights-<i>.safetensors` and `report.json`; or a pipeline folder with the judge's
            folder beside it, such as samples/toybox-sd.
    """
    if not (folder / "model_index.json").is_file():
        report = json.loads((folder / "report.json").read_text())
        return load_shards(folder.glob("weights-*.safetensors")), float(report["scaling_factor"])
    pipe = StableDiffusionPipeline.from_pretrained(folder)
    judge = load_judge(folder.parent / JUDGE_FOLDER.name)
    parts = {"judge": judge, "vae": pipe.vae, "text_encoder": pipe.text_encoder, "unet": pipe.unet}
    return {name: part.float().state_dict() for name, part in parts.items()}, pipe.vae.config.scaling_factor


def make_pipeline(states: dict[str, dict[str, Tensor]], scaling_factor: float) -> StableDiffusionPipeline:
    """The pipeline with these weights."""
    tokenizer = build_tokenizer()
    parts = {"vae": build_vae(), "text_encoder": build_text_encoder(tokenizer), "unet": build_unet()}
    for name, module in parts.items():
        module.load_state_dict(states[name])
    parts["vae"].register_to_config(scaling_factor=scaling_factor)
    return assemble(parts["vae"], tokenizer, parts["text_encoder"], parts["unet"])


def save_pipeline(pipe: StableDiffusionPipeline, folder: Path) -> None:
    """Write the pipeline folder, UNet and autoencoder in half precision."""
    for part in (pipe.vae, pipe.unet):  # not the text encoder: it would be loaded in half, the others in float32
        part.to("cpu", torch.float16, memory_format=torch.contiguous_format)
    pipe.save_pretrained(folder)
