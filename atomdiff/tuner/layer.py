"""The adapter layer: any supported module, called with an adapted weight."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from torch.func import functional_call

from atomdiff.atoms import adapt_weight, dct_atoms, sum_channel_matrices, svd_atoms, update_matrix
from atomdiff.blocks import Block, as_kernels, channel_rows, fit_block, kernel_rows
from atomdiff.tuner.config import AtomConfig

SUPPORTED = (nn.Conv2d, nn.Linear)
TENSOR_KINDS = ("atom_delta", "atom_basis", "channel_delta", "channel_basis")


class AtomLayer(nn.Module, BaseTunerLayer):
    """A module whose weight W is adapted: each block B (p * q, k * l) of it becomes (I + C).T @ B @ (I + S).

    S = D.T @ dD mixes kernel positions, C = Dc.T @ dDc mixes channels within a block (arXiv 2403.00269). Several
    active adapters add their S and their C, each times its weight, before W is touched. The forward pass is the base
    module's own with the adapted weight, so stride, padding, dilation and groups are the base's.

    Merging keeps the base weight beside the merged one (the memory of one more weight) and unmerging puts it back.

    Args:
        base_layer: the module to adapt, possibly wrapped by layers of other PEFT methods already.
    """

    adapter_layer_names = ("atom_delta", "channel_delta")
    other_param_names = ("atom_basis", "channel_basis", "channel_block", "scaling")
    base_layer: nn.Module
    kept_base_weight: Tensor | None

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.register_buffer("kept_base_weight", None, persistent=False)  # the untouched weight while merged
        self.base_layer = base_layer
        self.atom_delta = nn.ParameterDict()  # (m, d)
        self.channel_delta = nn.ParameterDict()  # (mc, p * q)
        self.atom_basis = BufferDict()
        self.channel_basis = BufferDict()
        self.channel_block: dict[str, Block] = {}
        self.scaling: dict[str, float] = {}
        self.merged_adapters: list[str] = []

    def __getattr__(self, name: str) -> Any:
        """Give what the layer itself lacks from the base module: other layers and models ask for `groups`, `stride`."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer" or name.startswith("_"):
                raise
            return getattr(self.base_layer, name)

    @property
    def r(self) -> dict[str, float]:
        """The adapters of this layer; diffusers counts them by the size of `r`."""
        return self.scaling

    def update_layer(self, adapter_name: str, config: AtomConfig, module_name: str) -> None:
        """Add an adapter: zero deltas in float32, and atoms fitted to the unmerged base weight.

        Raises:
            ValueError: `config.num_atoms` exceeds the kernel, or the base weight is not finite.
        """
        weight = self.unmerged_weight().detach()
        block = fit_block(weight.shape, config.block_of(module_name))
        shapes = delta_shapes(config, module_name, weight.shape)
        for kind, (num_atoms, size) in shapes.items():
            delta = nn.Parameter(torch.zeros(num_atoms, size, device=weight.device))
            getattr(self, f"{kind}_delta")[adapter_name] = delta
            axes = as_kernels(weight).shape[2:] if kind == "atom" else block
            if config.basis == "dct":
                basis = dct_atoms(axes, num_atoms)
            elif config.init_weights:
                rows = kernel_rows(weight) if kind == "atom" else channel_rows(weight, block)
                basis = svd_atoms(rows, num_atoms)
            else:
                basis = torch.zeros(num_atoms, size)
            # Fitted atoms are saved with the deltas: their signs and order are not the same everywhere.
            persistent = config.basis == "svd"
            holder = getattr(self, f"{kind}_basis")
            holder.register_buffer(adapter_name, basis.to(weight.device), persistent=persistent)
        self.channel_block[adapter_name] = block
        self.scaling[adapter_name] = 1.0
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def unmerged_weight(self) -> Tensor:
        """The base weight without any adapter of this layer."""
        return cast(Tensor, self.get_base_layer().weight) if self.kept_base_weight is None else self.kept_base_weight

    def adapted_weight(self, adapter_names: Sequence[str]) -> Tensor:
        """The base weight changed by these adapters, each times its weight; like the base weight in all else."""
        weight = self.unmerged_weight()
        names = [name for name in adapter_names if self.scaling[name]]
        with torch.autocast(weight.device.type, enabled=False):  # bfloat16 would blur the small matrices
            spatial = [self._matrix("atom", name) for name in names if name in self.atom_delta]
            spatial_sum = torch.stack(spatial).sum(dim=0) if spatial else None
            channel = [
                (self.channel_block[name], self._matrix("channel", name))
                for name in names
                if name in self.channel_delta
            ]
            block, channel_sum = sum_channel_matrices(channel) if channel else ((1, 1), None)
            return adapt_weight(weight, spatial_sum, channel_sum, block)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The base module's forward, with the adapted weight where adapters are active."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        names = [name for name in self.active_adapters if self.scaling.get(name)]
        if self.disable_adapters or self.merged or not names:
            return self.base_layer(x, *args, **kwargs)
        weights = {self._weight_path(): self.adapted_weight(names)}
        return functional_call(self.base_layer, weights, (x, *args), kwargs)

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Put the adapted weight in place of the base weight, which is kept aside.

        Args:
            safe_merge: check that the merged weight is finite before it is put in place.
            adapter_names: the adapters to merge; None: the active ones.

        Raises:
            ValueError: `safe_merge` found a value that is not finite; nothing was changed.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.scaling]
        if not names:
            return
        adapted = self.adapted_weight([*self.merged_adapters, *names])
        if safe_merge and not torch.isfinite(adapted).all():
            raise ValueError(f"merging {names} gives values that are not finite; lower their weights or retrain them")
        weight = cast(Tensor, self.get_base_layer().weight)
        if not self.merged:
            self.kept_base_weight = weight.data
        weight.data = adapted
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Put the base weight back, every bit as it was; without effect where nothing is merged."""
        if self.merged:
            cast(Tensor, self.get_base_layer().weight).data = self.unmerged_weight()
            self.kept_base_weight = None
            self.merged_adapters.clear()

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter; where it is merged, the others stay merged without it."""
        if adapter_name in self.merged_adapters:
            others = [name for name in self.merged_adapters if name != adapter_name]
            self.unmerge()
            if others:
                self.merge(adapter_names=others)
        super().delete_adapter(adapter_name)

    def set_scale(self, adapter: str, scale: float) -> None:
        """Set an adapter's weight: 0 takes it away, 1 is as trained. A merged weight does not follow."""
        if adapter in self.scaling:
            self.scaling[adapter] = float(scale)

    def scale_layer(self, scale: float) -> None:
        """Multiply the weights of the active adapters."""
        for name in self.active_adapters:
            if name in self.scaling:
                self.scaling[name] *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the weights of the active adapters, or without `scale` set them to 1."""
        for name in self.active_adapters:
            if name in self.scaling:
                self.scaling[name] = 1.0 if scale is None else self.scaling[name] / scale

    def _matrix(self, kind: str, name: str) -> Tensor:
        basis, delta = getattr(self, f"{kind}_basis")[name], getattr(self, f"{kind}_delta")[name]
        return update_matrix(basis, delta, self.scaling[name])

    def _weight_path(self) -> str:
        """Path of the weight below `base_layer`, through the layers of other methods."""
        path, module = "weight", cast(Any, self.base_layer)
        while isinstance(module, BaseTunerLayer):
            path, module = f"base_layer.{path}", cast(Any, module).base_layer
        return path

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Move an adapter to the base weight's device, in float32 whatever the base's dtype."""
        device = device or self.unmerged_weight().device
        for kind in TENSOR_KINDS:
            if adapter_name in getattr(self, kind):
                tensor = getattr(self, kind)[adapter_name]
                tensor.data = tensor.data.to(device, torch.float32)


def delta_shapes(config: AtomConfig, module_name: str, weight_shape: Sequence[int]) -> dict[str, tuple[int, int]]:
    """Shapes (atoms, d) of the deltas of one layer: "atom" for its kernel, "channel" for its channel blocks.

    A layer without a kernel has only the latter; if it has no blocks either, one number that scales its weight.

    Raises:
        ValueError: `config.num_atoms` exceeds the kernel.
    """
    p, q = fit_block(weight_shape, config.block_of(module_name))
    kernel = math.prod(weight_shape[2:])
    shapes = {}
    if kernel > 1:
        num_atoms = config.num_atoms or kernel
        if num_atoms > kernel:
            raise ValueError(
                f"num_atoms={num_atoms}, but the kernel of {module_name} has only {kernel} numbers: "
                f"use at most {kernel}, or None for all"
            )
        shapes["atom"] = (num_atoms, kernel)
    if p * q > 1:
        shapes["channel"] = (p * q, p * q)
    return shapes or {"atom": (1, 1)}
