"""Names and metadata of LoRA files as kohya's sd-scripts write them, which other programs read.

Layers of Stable Diffusion 1.x and 2.x are named by their diffusers path, layers of SDXL by their path in Stability AI's
code (`input_blocks`, ...), as in files trained by sd-scripts. ComfyUI and diffusers read both names for SDXL; Stable
Diffusion WebUI mistakes the diffusers name of `up_blocks.0.upsamplers.0.conv`; InvokeAI refuses files that mix them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from atomdiff.concepts.modelspec import model_spec
from atomdiff.tuner.model import supported_modules
from atomdiff.utils.atomic import new_file
from atomdiff.utils.errors import UserError
from atomdiff.utils.versions import atomdiff_version

_SDXL_LAYERS = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
_SDXL_RESNET = {
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_IN_BLOCK = re.compile(r"(down|mid|up)_blocks?(?:\.(\d+))?\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)")
_ENCODER = re.compile("text_encoder(_2)?").fullmatch
_ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")
_IN_KOHYA = re.compile(  # what sd-scripts puts its layers on: in the blocks of a UNet, in the layers of text encoders
    r"lora_(unet_((down|up)_blocks|mid_block|input_blocks_[1-9]|middle_block|output_blocks)_.+|te\d?_text_model_.+)"
).fullmatch
_BASE_VERSIONS = {
    "stable-diffusion-v1": "sd_v1",
    "stable-diffusion-v2-512": "sd_v2",
    "stable-diffusion-v2-768-v": "sd_v2_v",
    "stable-diffusion-xl-v1-base": "sdxl_base_v1-0",
}


def is_sdxl(pipe: Any) -> bool:
    """Whether a pipeline's UNet has the micro-conditioning of Stable Diffusion XL."""
    unet = pipe.components.get("unet")
    return getattr(getattr(unet, "config", None), "addition_embed_type", None) == "text_time"


def layer_name(pipe: Any, component: str, module: str) -> str:
    """The name of a layer in a file, such as `lora_unet_down_blocks_0_resnets_0_conv1`.

    Args:
        pipe: the pipeline.
        component: `unet`, `text_encoder` or `text_encoder_2`.
        module: path of the layer within it.

    Raises:
        UserError: there is no such name.
    """
    sdxl = is_sdxl(pipe)
    if component == "unet":
        prefix, path = "lora_unet", _sdxl_path(module, pipe.unet) if sdxl else module
    elif _ENCODER(component):
        prefix = "lora_te" if "text_encoder_2" not in pipe.components else f"lora_te{component[13:] or 1}"
        # transformers 5 took the level `text_model` out of CLIPTextModel
        path = module if module.startswith("text_") else f"text_model.{module}"
    else:
        raise UserError(
            f"the concept changes {component}.{module}, and other programs read changes of a UNet and of its text "
            "encoders only: use --to pipeline"
        )
    return f"{prefix}_{path}".replace(".", "_")


def metadata(pipe: Any, title: str, trigger_phrase: str, rank: int | None) -> dict[str, str]:
    """Metadata of a file: the `ss_` fields that other programs look at, and those of `model_spec`.

    Args:
        pipe: the pipeline.
        title: name of the concept.
        trigger_phrase: what to write in a prompt to get it.
        rank: of a LoRA, and its alpha; None for whole differences.
    """
    spec = model_spec(pipe, title, trigger_phrase)
    base = spec["architecture"].removesuffix("/atoms")
    args = {"algo": "full"} if rank is None else {"conv_dim": str(rank), "conv_alpha": str(rank)}
    fields = {
        "ss_v2": str(base.startswith("stable-diffusion-v2")),
        "ss_base_model_version": _BASE_VERSIONS.get(base, ""),
        "ss_network_module": "lycoris.kohya" if rank is None else "networks.lora",
        "ss_network_dim": "" if rank is None else str(rank),
        "ss_network_alpha": "" if rank is None else str(float(rank)),
        "ss_network_args": json.dumps(args),
        "ss_output_name": title,
        "ss_training_comment": f"exported by atomdiff {atomdiff_version()}".strip(),
    }
    spec["architecture"] = f"{base}/lora"
    fields = {key: value for key, value in fields.items() if value}
    return fields | {f"modelspec.{key}": value for key, value in spec.items()}


def zero_layers(pipe: Any, tensors: Mapping[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """Layers that change nothing, without which other programs do not read all of a file.

    InvokeAI tells the base by the width of the first cross-attention's keys, and refuses a file without, such as one of
    convolutions. Stable Diffusion WebUI passes over an attention of OpenCLIP's text encoders (SD 2.x, SDXL) if not all
    four layers are there. And diffusers reads the LoRA of a text encoder only if an `out_proj` is among its layers.

    Args:
        pipe: the pipeline.
        tensors: those of the file.
        alpha: of the added LoRAs, which diffusers mistakes where it differs between layers.

    Returns:
        A LoRA of rank 1 of zeros for each layer that the file lacks.
    """
    names = {key.partition(".")[0] for key in tensors}
    like = next(tensor for tensor in tensors.values() if tensor.ndim > 1)
    added: dict[str, Tensor] = {}
    for name, weight in _missing_layers(pipe, names, any(key.endswith(".lora_up.weight") for key in tensors)):
        added[f"{name}.lora_up.weight"] = like.new_zeros(weight.shape[0], 1)
        added[f"{name}.lora_down.weight"] = like.new_zeros(1, weight.shape[1])
        added[f"{name}.alpha"] = torch.tensor(alpha)
    return added


def _missing_layers(pipe: Any, names: Collection[str], lora: bool) -> Iterator[tuple[str, Tensor]]:
    """Name and weight of each layer that a file with these layers, LoRAs or not, has to have beside."""
    for component, model in pipe.components.items():
        ends = "attn2.to_k" if component == "unet" else _ATTENTION if _ENCODER(component) else None
        if model is None or ends is None:
            continue
        modules = {path: module for path, module in supported_modules(model).items() if path.endswith(ends)}
        found = {layer_name(pipe, component, path): module.weight for path, module in modules.items()}
        if component == "unet":
            needed = sorted(found)[:1]  # in the order that files are read in
        else:
            attentions = {name.rpartition("_self_attn_")[0] for name in found if name in names}
            needed = [name for name in found if name.rpartition("_self_attn_")[0] in attentions]
            prefix = f"{next(iter(found), '').partition('_text_')[0]}_"
            if lora and not attentions and any(name.startswith(prefix) for name in names):
                needed = [name for name in found if name.endswith("out_proj")][:1]
        yield from ((name, found[name]) for name in needed if name not in names)


def unread_by(names: Iterable[str], *, whole: bool) -> dict[str, tuple[str, ...]]:
    """The programs that do not read all layers of a file, and which they leave out.

    Args:
        names: of its layers.
        whole: whether it holds whole differences, of which kohya's `merge_lora` reads nothing, and not a LoRA.
    """
    unread = {
        "kohya's merge_lora": tuple(name for name in names if whole or not _IN_KOHYA(name)),
        "Stable Diffusion WebUI": tuple(name for name in names if name.endswith("_text_projection")),
    }
    return {program: layers for program, layers in unread.items() if layers}


def named_rows(rows: Mapping[str, Tensor], sdxl: bool) -> dict[str, Tensor]:
    """The rows (n, hidden) of words, by text encoder, named as in files for ComfyUI and others."""
    names = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"} if sdxl else {"text_encoder": "emb_params"}
    return {names[encoder]: rows[encoder] for encoder in names if encoder in rows}


def save_tensors(path: Path, tensors: dict[str, Tensor], facts: dict[str, str]) -> None:
    """Write a safetensors file with metadata; whatever it replaces is replaced at once."""
    with new_file(path) as file:
        save_file(tensors, file, metadata={"format": "pt", **facts})


def as_written(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """A tensor as it goes into a file.

    Raises:
        UserError: a value is not finite, or too large for `dtype`.
    """
    written = tensor.to("cpu", dtype).contiguous()
    if not torch.isfinite(written).all():
        raise UserError(f"{name}: values are not finite or too large for {dtype}; export with --dtype float32")
    return written


def sgm_path(module: str, unet: Any) -> str | None:
    """As files for SDXL name a layer of a UNet by its path in Stability AI's code; None: it has no name there."""
    try:
        return _sdxl_path(module, unet)
    except UserError:
        return None


def _sdxl_path(module: str, unet: Any) -> str:
    """A path in diffusers' UNet -> the path of the same layer in Stability AI's code."""
    if module in _SDXL_LAYERS:
        return _SDXL_LAYERS[module]
    found = _IN_BLOCK.fullmatch(module)
    if found is None:
        raise UserError(f"unet.{module} has no name in files for SDXL: leave that layer out, or use --to pipeline")
    side, block, part, index, rest = found[1], int(found[2] or 0), found[3], int(found[4]), found[5]
    blocks_each = len(unet.down_blocks[0].resnets) + 1  # down: and a downsampler; up: one more
    place = block * blocks_each + index
    within = int(part == "attentions")
    if part == "resnets":
        rest = _SDXL_RESNET.get(rest, rest)
    if side == "mid":
        return f"middle_block.{1 if within else 2 * index}.{rest}"
    if part == "downsamplers":
        return f"input_blocks.{(block + 1) * blocks_each}.0.op"
    if part == "upsamplers":
        position = 2 if hasattr(unet.up_blocks[block], "attentions") else 1
        return f"output_blocks.{(block + 1) * blocks_each - 1}.{position}.{rest}"
    return f"input_blocks.{place + 1}.{within}.{rest}" if side == "down" else f"output_blocks.{place}.{within}.{rest}"
