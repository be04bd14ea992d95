"""How many numbers and bytes an adapter takes on an architecture, without its weights."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, get_peft_model_state_dict, inject_adapter_in_model
from torch import nn

from atomdiff.tuner.config import AtomConfig
from atomdiff.utils.errors import UserError

_HALF = 2  # bytes a number takes in a file
_ADAPTER = "counted"


@dataclass(frozen=True)
class AdapterCount:
    """What an adapter takes."""

    model_numbers: int
    """Parameters of the model without the adapter."""
    trained_numbers: int
    """Parameters that are trained."""
    file_bytes: int
    """Bytes of all stored tensors in float16: trained ones, and atoms that are fitted to the weights."""
    groups: dict[tuple[str, tuple[int, ...]], int]
    """(kind, shape) of a trained tensor -> number of layers that have one."""

    @property
    def share(self) -> float:
        """Trained numbers over the model's."""
        return self.trained_numbers / self.model_numbers


def count_numbers(base: str | nn.Module, adapter: PeftConfig | None) -> AdapterCount:
    """Count an adapter's numbers and bytes on an architecture.

    Args:
        base: one of `ARCHITECTURES`, a folder or Hub id of a Stable Diffusion pipeline or an image classifier, or a
            model, which is changed: give one on the meta device.
        adapter: the config of any PEFT method; None for training the whole model.

    Raises:
        UserError: there is no such architecture, or the adapter does not fit it.
    """
    model = open_architecture(base) if isinstance(base, str) else base
    numbers = sum(parameter.numel() for parameter in model.parameters())
    if adapter is None:
        return AdapterCount(numbers, numbers, numbers * _HALF, {})
    if isinstance(adapter, AtomConfig):
        adapter = copy.copy(adapter)
        adapter.filled_by_loader = True  # there are no weights to fit atoms to
    model.requires_grad_(False)
    try:
        inject_adapter_in_model(adapter, model, _ADAPTER)
    except (ValueError, TypeError, RuntimeError) as error:
        raise UserError(f"the adapter does not fit this architecture: {error}") from error
    trained = {name: p.shape for name, p in model.named_parameters() if p.requires_grad}
    stored = get_peft_model_state_dict(model, adapter_name=_ADAPTER, save_embedding_layers=False)
    return AdapterCount(
        model_numbers=numbers,
        trained_numbers=sum(shape.numel() for shape in trained.values()),
        file_bytes=sum(tensor.numel() for tensor in stored.values()) * _HALF,
        groups=dict(Counter((_kind(name), tuple(shape)) for name, shape in trained.items())),
    )


def describe_count(count: AdapterCount) -> str:
    """A count as a readable table."""
    rows = {
        "model": f"{count.model_numbers:,} numbers",
        "trained": f"{count.trained_numbers:,} numbers ({100 * count.share:.4f} % of the model's)",
        "file": f"{count.file_bytes:,} bytes of tensors in float16",
    }
    lines = [f"{label:<9}{value}" for label, value in rows.items()]
    return "\n".join([*lines, "", *group_table(count.groups)])


def group_table(groups: dict[tuple[str, tuple[int, ...]], int]) -> list[str]:
    """One line for all trained tensors of one kind and shape."""
    lines = [f"{'trained':<24}{'shape':>18}{'layers':>8}{'numbers':>14}"]
    for (kind, shape), layers in sorted(groups.items()):
        size = " x ".join(map(str, shape))
        lines.append(f"{kind:<24}{size:>18}{layers:>8}{layers * math.prod(shape):>14,}")
    return lines


def open_architecture(name: str) -> nn.Module:
    """Build a model without weights, on the meta device: the UNet of a pipeline, or a classifier.

    Args:
        name: one of `ARCHITECTURES`, or a folder or Hub id with a config.

    Raises:
        UserError: there is neither such an architecture nor such a config.
    """
    with torch.device("meta"):
        if name in ARCHITECTURES:
            return ARCHITECTURES[name]()
        return _from_config(name)


def _from_config(name: str) -> nn.Module:
    from diffusers import UNet2DConditionModel
    from transformers import AutoConfig, AutoModelForImageClassification

    folder = Path(name)
    try:
        if not folder.is_dir() or (folder / "unet").is_dir():
            config: Any = UNet2DConditionModel.load_config(name, subfolder="unet")
            unet: nn.Module = UNet2DConditionModel.from_config(config)
            return unet
    except (OSError, ValueError):  # no pipeline: a model of its own, perhaps
        pass
    try:
        model: nn.Module = AutoModelForImageClassification.from_config(AutoConfig.from_pretrained(name))
    except (OSError, ValueError) as error:
        raise UserError(
            f"there is no architecture {name!r}; known are {', '.join(ARCHITECTURES)}, and folders or Hub ids of a "
            "Stable Diffusion pipeline or an image classifier"
        ) from error
    return model


def _unet(**config: Any) -> nn.Module:
    from diffusers import UNet2DConditionModel

    unet: nn.Module = UNet2DConditionModel(**config)
    return unet


def _sdxl() -> nn.Module:
    return _unet(
        sample_size=128,
        block_out_channels=(320, 640, 1280),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(5, 10, 20),
        cross_attention_dim=2048,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )


def _resnet50() -> nn.Module:
    from transformers import ResNetConfig, ResNetForImageClassification

    return ResNetForImageClassification(ResNetConfig(num_labels=1000))


def _convnext_base() -> nn.Module:
    from transformers import ConvNextConfig, ConvNextForImageClassification

    config = ConvNextConfig(depths=[3, 3, 27, 3], hidden_sizes=[128, 256, 512, 1024], num_labels=1000)
    return ConvNextForImageClassification(config)


ARCHITECTURES: dict[str, Callable[[], nn.Module]] = {
    "sd-1.5": lambda: _unet(sample_size=64, cross_attention_dim=768),
    "sd-2.1": lambda: _unet(
        sample_size=96, cross_attention_dim=1024, attention_head_dim=(5, 10, 20, 20), use_linear_projection=True
    ),
    "sdxl": _sdxl,
    "resnet-50": _resnet50,
    "convnext-base": _convnext_base,
}
"""Names and models: UNets of Stable Diffusion 1.5, 2.1 and XL, and classifiers of 1000 classes."""


def _kind(name: str) -> str:
    """`down.conv.atom_delta.<adapter>` -> `atom_delta`, `to_q.lora_A.<adapter>.weight` -> `lora_A`."""
    parts = name.split(".")
    return parts[parts.index(_ADAPTER) - 1]
