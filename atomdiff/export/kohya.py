"""Files of weight differences and LoRAs as kohya's sd-scripts name and describe them, which other programs read.

Layers of Stable Diffusion 1.x and 2.x are named by their diffusers path, layers of SDXL by their path in Stability AI's
code (`input_blocks`, ...), as in files trained by sd-scripts. ComfyUI and diffusers read both names for SDXL; Stable
Diffusion WebUI mistakes the diffusers name of `up_blocks.0.upsamplers.0.conv`; InvokeAI refuses files that mix them.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from atomdiff.bases.find import find_base
from atomdiff.concepts.modelspec import model_spec
from atomdiff.export.embeddings import active_embeddings, save_embeddings
from atomdiff.export.report import ExportedLayer, ExportReport
from atomdiff.export.tensor_file import save_tensors
from atomdiff.tuner.model import supported_modules
from atomdiff.utils.errors import UserError
from atomdiff.utils.versions import atomdiff_version

_ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")
_IN_KOHYA = re.compile(  # what sd-scripts puts its layers on: in the blocks of a UNet, in the layers of text encoders
    r"lora_(unet_((down|up)_blocks|mid_block|input_blocks_[1-9]|middle_block|output_blocks)_.+|te\d?_text_model_.+)"
).fullmatch


def layer_name(pipe: Any, component: str, module: str) -> str:
    """Return the name of a layer in a file, such as `lora_unet_down_blocks_0_resnets_0_conv1`.

    Args:
        pipe: the pipeline.
        component: of the pipeline, such as `unet` or `text_encoder`.
        module: path of the layer within it.

    Raises:
        UserError: there is no such name.
    """
    base = find_base(pipe.components)
    if component not in base.layer_prefixes:
        raise UserError(
            f"the concept changes {component}.{module}, and other programs read changes of a UNet and of its text "
            "encoders only: use --to pipeline"
        )
    path = base.layer_path(component, module, pipe.components[component])
    return f"{base.layer_prefixes[component][0]}_{path}".replace(".", "_")


def file_path(output: str | os.PathLike[str]) -> Path:
    """Return the output path, with `.safetensors` appended where it is missing."""
    path = Path(output)
    return path if path.suffix == ".safetensors" else path.with_name(f"{path.name}.safetensors")


def write_file(
    pipe: Any,
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    layers: Sequence[ExportedLayer],
    *,
    dtype: torch.dtype,
    trigger_phrase: str,
    rank: int | None = None,
    biases_left_out: Sequence[str] = (),
) -> ExportReport:
    """Write what was made of the active concepts, with the embeddings of their trigger words beside the file.

    Args:
        pipe: the pipeline.
        path: as for `file_path`.
        tensors: those of `layers`, by key.
        layers: the layers in the file, for the report.
        dtype: precision of the embeddings.
        trigger_phrase: what to write in a prompt to get the concept.
        rank: of a LoRA, and its alpha; None: the tensors are full differences.
        biases_left_out: for the report.

    Raises:
        UserError: there is nothing to write.
    """
    path, embeddings = file_path(path), active_embeddings(pipe)
    if not tensors and not embeddings:
        raise UserError(
            "found nothing to export: no active concept changes the pipeline; load one with a weight other than 0"
        )
    if tensors:
        tensors = {**tensors, **zero_layers(pipe, tensors, float(rank or 1))}
        save_tensors(path, tensors, file_metadata(pipe, path.stem, trigger_phrase, rank))
    files = save_embeddings(path.parent, f"{path.stem}-", embeddings, dtype)
    unread = _unread_by([layer.name for layer in layers], is_lora=rank is not None)
    return ExportReport(path, tuple(layers), files, tuple(biases_left_out), unread)


def file_metadata(pipe: Any, title: str, trigger_phrase: str, rank: int | None) -> dict[str, str]:
    """Return the `ss_` fields that other programs look at, and those of `model_spec`."""
    spec = model_spec(pipe, title, trigger_phrase)
    architecture = spec["architecture"].removesuffix("/atoms")
    args = {"algo": "full"} if rank is None else {"conv_dim": str(rank), "conv_alpha": str(rank)}
    fields = {
        "ss_v2": str(architecture.startswith("stable-diffusion-v2")),
        "ss_base_model_version": find_base(pipe.components).architectures.get(architecture, ""),
        "ss_network_module": "lycoris.kohya" if rank is None else "networks.lora",
        "ss_network_dim": "" if rank is None else str(rank),
        "ss_network_alpha": "" if rank is None else str(float(rank)),
        "ss_network_args": json.dumps(args),
        "ss_output_name": title,
        "ss_training_comment": f"exported by atomdiff {atomdiff_version()}".strip(),
    }
    spec["architecture"] = f"{architecture}/lora"
    fields = {key: value for key, value in fields.items() if value}
    return fields | {f"modelspec.{key}": value for key, value in spec.items()}


def zero_layers(pipe: Any, tensors: Mapping[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """Return layers that change nothing, without which other programs do not read all of a file.

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
    """Yield name and weight of each layer that a file with these layers, LoRAs or not, needs in addition."""
    base = find_base(pipe.components)
    for component in base.layer_prefixes:
        model = pipe.components.get(component)
        if model is None:
            continue
        ends = base.cross_attention_keys if component == base.denoiser else _ATTENTION
        modules = {path: module for path, module in supported_modules(model).items() if path.endswith(ends)}
        found = {layer_name(pipe, component, path): module.weight for path, module in modules.items()}
        if component == base.denoiser:
            needed = sorted(found)[:1]  # in the order that files are read in
        else:
            attentions = {name.rpartition("_self_attn_")[0] for name in found if name in names}
            needed = [name for name in found if name.rpartition("_self_attn_")[0] in attentions]
            prefix = f"{next(iter(found), '').partition('_text_')[0]}_"
            if lora and not attentions and any(name.startswith(prefix) for name in names):
                needed = [name for name in found if name.endswith("out_proj")][:1]
        yield from ((name, found[name]) for name in needed if name not in names)


def _unread_by(names: Iterable[str], is_lora: bool) -> dict[str, tuple[str, ...]]:
    """Return the programs that do not read all layers of a file, and which layers they leave out."""
    unread = {
        "kohya's merge_lora": tuple(name for name in names if not is_lora or not _IN_KOHYA(name)),  # only LoRAs
        "Stable Diffusion WebUI": tuple(name for name in names if name.endswith("_text_projection")),
    }
    return {program: layers for program, layers in unread.items() if layers}
