"""Count the parameters and bytes of an adapter on an architecture, without its weights."""

from __future__ import annotations

import copy
import math
from collections import Counter
from dataclasses import dataclass

from peft import PeftConfig
from torch import Tensor, nn

import atomdiff.activation_adapters  # noqa: F401 - PEFT knows its methods from then on
from atomdiff.atoms.variants import SCORE_NAME
from atomdiff.bases.architectures import open_architecture
from atomdiff.tuner.adapter_state import peft_state_dict
from atomdiff.tuner.inject import inject
from atomdiff.utils.errors import UserError

_HALF = 2  # bytes of a float16 in a file
_ADAPTER = "counted"


@dataclass(frozen=True)
class AdapterCount:
    """Parameters and bytes of an adapter."""

    num_parameters: int
    """Of the model without the adapter."""
    num_trainable_parameters: int
    """Of the adapter."""
    file_bytes: int
    """Bytes of all stored tensors, numbers in float16: trained ones, and what else the method keeps in its files."""
    groups: dict[tuple[str, tuple[int, ...]], int]
    """(kind, shape) of a trained tensor -> number of layers that have one."""

    @property
    def share(self) -> float:
        """Trainable parameters over those of the model."""
        return self.num_trainable_parameters / self.num_parameters


def count_parameters(base: str | nn.Module, adapter: PeftConfig | None) -> AdapterCount:
    """Count the parameters and bytes of an adapter on an architecture.

    Args:
        base: one of `ARCHITECTURES`, a folder or Hub id of a Stable Diffusion pipeline or an image classifier, or a
            model, which is changed: give one on the meta device.
        adapter: the config of any PEFT method; None for training the whole model.

    Raises:
        UserError: there is no such architecture, or the adapter does not fit it.
    """
    model = open_architecture(base) if isinstance(base, str) else base
    total = sum(parameter.numel() for parameter in model.parameters())
    if adapter is None:
        return AdapterCount(total, total, total * _HALF, {})
    if hasattr(adapter, "filled_by_loader"):
        adapter = copy.copy(adapter)
        adapter.filled_by_loader = True  # there are no weights to fit atoms to
    model.requires_grad_(False)
    try:
        _inject(model, adapter)
    except (ValueError, TypeError, RuntimeError) as error:
        raise UserError(f"the adapter does not fit this architecture: {error}") from error
    trained = {name: p.shape for name, p in model.named_parameters() if p.requires_grad}
    state = [(key, tensor) for key, tensor in peft_state_dict(model, _ADAPTER).items() if SCORE_NAME not in key]
    stored = {(_storage(tensor) if "_shared." in f"{key}." else key): tensor for key, tensor in state}
    return AdapterCount(
        num_parameters=total,
        num_trainable_parameters=sum(shape.numel() for shape in trained.values()),
        file_bytes=sum(t.numel() * (_HALF if t.is_floating_point() else t.itemsize) for t in stored.values()),
        groups=dict(Counter((_kind(name), tuple(shape)) for name, shape in trained.items())),
    )


def _inject(model: nn.Module, adapter: PeftConfig) -> None:
    try:
        inject(model, adapter, _ADAPTER)
    except NotImplementedError:  # the method looks at values of its first tensors: give it memory, which nothing fills
        inject(model.to_empty(device="cpu"), adapter, _ADAPTER)


def describe_count(count: AdapterCount) -> str:
    """A count as a readable table."""
    rows = {
        "model": f"{count.num_parameters:,} parameters",
        "trained": f"{count.num_trainable_parameters:,} parameters ({100 * count.share:.4f} % of the model's)",
        "file": f"{count.file_bytes:,} bytes of tensors in float16",
    }
    lines = [f"{label:<9}{value}" for label, value in rows.items()]
    return "\n".join([*lines, "", *group_table(count.groups)])


def group_table(groups: dict[tuple[str, tuple[int, ...]], int]) -> list[str]:
    """One line for all trained tensors of one kind and shape."""
    lines = [f"{'trained':<24}{'shape':>18}{'layers':>8}{'parameters':>14}"]
    for (kind, shape), layers in sorted(groups.items()):
        size = " x ".join(map(str, shape))
        lines.append(f"{kind:<24}{size:>18}{layers:>8}{layers * math.prod(shape):>14,}")
    return lines


def _storage(tensor: Tensor) -> int:
    """What tensors have in common that are one parameter, also without values."""
    return tensor.untyped_storage()._cdata


def _kind(name: str) -> str:
    """`down.conv.atom_delta.<adapter>` -> `atom_delta`, `to_q.lora_A.<adapter>.weight` -> `lora_A`."""
    parts = name.split(".")
    return parts[parts.index(_ADAPTER) - 1]
