"""The adapter layer: any supported module, called with an adapted weight."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from torch.func import vmap

from atomdiff.atoms import autograd, im2col
from atomdiff.atoms.batched import adapt_weight_per_sample
from atomdiff.atoms.merge import adapt_weight, write_adapted
from atomdiff.atoms.update import WeightUpdate, update_matrix
from atomdiff.tuner import weight_access
from atomdiff.tuner.atom_basis import ATOM_BASES
from atomdiff.tuner.base_weight import BaseWeight
from atomdiff.tuner.batch_layout import BatchLayout
from atomdiff.tuner.coefficient_cache import CoefficientCache, Key
from atomdiff.tuner.config import AtomConfig
from atomdiff.tuner.peft_type import PREFIX
from atomdiff.tuner.variants import BASIS_NAMES, PARAMETER_NAMES, TENSOR_NAMES, Atoms, atoms_of
from atomdiff.utils import functional_call
from atomdiff.utils.functional_call import without_autocast
from atomdiff.utils.threads import ThreadLocal

_RANDOM_START = 0.5  # size of a random start: about that of the change of a weight, relative to the weight


def attribute(kind: str) -> str:
    """Name of a tensor kind in a layer; libraries find an adapter's tensors by the tuner's prefix."""
    return kind if kind.startswith(PREFIX) else PREFIX + kind


class AtomLayer(nn.Module, BaseTunerLayer):
    """A module whose weight W is adapted (arXiv 2403.00269): each block B of it becomes (I + C).T @ B @ (I + S).

    S = D.T @ dD mixes kernel positions, or whole blocks with `joint`, or those of each input channel in its own way
    with `recursion`; C = Dc.T @ dDc mixes channels within a block. With the basis `sparse`, A @ dD is added to the rows
    of W instead, A being their code. Several active adapters add their S and their C, each times its weight, before W
    is touched. The forward pass is the base module's own with the adapted weight, so stride, padding, dilation and
    groups are the base's.

    Merging writes into the base weight's own memory, always starting from the base weight, which is kept aside (by
    default beside it: the memory of one more weight) and which unmerging copies back.

    Args:
        base_layer: the module to adapt, possibly wrapped by layers of other PEFT methods already.
    """

    adapter_layer_names = tuple(map(attribute, PARAMETER_NAMES))
    other_param_names = (*map(attribute, BASIS_NAMES), "settings", "atom_sets", "scaling")
    base_layer: nn.Module
    holds_merged: bool

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self._mixed = ThreadLocal()  # while it mixes a batch
        self.holds_merged = False  # by no adapter, too; compiled code would look at the length of a list
        self.written: dict[str, float] | None = None  # adapter -> weight, with which it was merged
        self.base_layer = base_layer
        base: Any = self.get_base_layer()
        self.in_features = base.in_features if isinstance(base, nn.Linear) else base.in_channels  # as all of PEFT have
        self.out_features = base.out_features if isinstance(base, nn.Linear) else base.out_channels
        for kind in PARAMETER_NAMES:
            setattr(self, attribute(kind), nn.ParameterDict())  # shapes: `Atoms.parameter_shapes`
        for kind in BASIS_NAMES:
            setattr(self, attribute(kind), BufferDict())  # (m, d)
        self.settings: dict[str, AtomConfig] = {}
        self.atom_sets: dict[str, tuple[Atoms, ...]] = {}
        self.scaling: dict[str, float] = {}
        self.merged_adapters: list[str] = []
        self.cast_input_dtype_enabled = True  # diffusers switches it where layers are cast for storage
        self._coefficients = CoefficientCache()

    def __getattr__(self, name: str) -> Any:
        """Give what the layer itself lacks from the base module: other layers and models ask for `groups`, `stride`."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer" or name.startswith("_"):
                raise
            return getattr(self.base_layer, name)

    @property
    def mixed_batch(self) -> tuple[BatchLayout, list[WeightUpdate]] | None:
        """The batch that this thread mixes, with the weight updates of each sample; None: it mixes none."""
        mixed: tuple[BatchLayout, list[WeightUpdate]] | None = self._mixed.value
        return mixed

    @mixed_batch.setter
    def mixed_batch(self, mixed: tuple[BatchLayout, list[WeightUpdate]] | None) -> None:
        self._mixed.value = mixed

    @property
    def base_weight(self) -> BaseWeight:
        """The weight without what is merged into it; it lies in the base module, which outlives this layer."""
        return BaseWeight(self.get_base_layer())

    @property
    def r(self) -> dict[str, float]:
        """The adapters of this layer; diffusers counts them by the size of `r`."""
        return self.scaling

    @property
    def lora_A(self) -> dict[str, Any]:  # noqa: N802
        """Adapter -> what moves its tensors by `.to(device)`; diffusers' `set_lora_device` asks LoRA layers for it."""
        return {name: _Movable(self, name) for name in self.scaling}

    lora_B = lora_A  # noqa: N815

    def update_layer(self, adapter_name: str, config: AtomConfig, module_name: str) -> None:
        """Add an adapter: deltas in float32, zero by default, and atoms fitted to the unmerged base weight.

        Raises:
            ValueError: `config.num_atoms` exceeds the numbers in a row, or the base weight is not finite.
        """
        weight = self.unmerged_weight().detach()
        found = atoms_of(config, module_name, weight.shape)
        seed = config.seed << 32 | zlib.crc32(module_name.encode())
        for atoms in found:
            for kind, shape in atoms.parameter_shapes().items():
                start = atoms.initial(kind, shape, seed)
                if start is None:
                    is_zero = config.init_weights or config.filled_by_loader
                    start = torch.zeros(shape) if is_zero else _RANDOM_START * torch.randn(shape) / shape[-1] ** 0.5
                self.tensors(kind)[adapter_name] = nn.Parameter(start.to(weight.device))
            basis = _first_atoms(atoms, config, weight, seed, module_name)
            # Fitted atoms are saved with the deltas: their signs and order are not the same everywhere.
            self.tensors(f"{atoms.name}_basis").register_buffer(
                adapter_name, basis.to(weight.device), persistent=config.stores_basis
            )
        self.settings[adapter_name] = config
        self.atom_sets[adapter_name] = found
        self.scaling[adapter_name] = 1.0
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def unmerged_weight(self) -> Tensor:
        """The base weight without any adapter of this layer, wherever it is kept."""
        return self.base_weight.read()

    def adapted_weight(self, adapter_names: Sequence[str]) -> Tensor:
        """The base weight changed by these adapters, each times its weight; like the base weight in all else."""
        return self._adapt(self.unmerged_weight(), {name: self.scaling[name] for name in adapter_names})

    def _adapt(self, weight: Tensor, weights: Mapping[str, float]) -> Tensor:
        """A weight changed by adapters, each times its weight."""
        with without_autocast(weight):  # bfloat16 would blur the small matrices
            return adapt_weight(weight, _on(weight.device, self.weight_updates(weights)))

    def tensors(self, kind: str) -> Any:
        """The tensors of a kind, by adapter."""
        return getattr(self, attribute(kind))

    def coefficients(self, adapter_name: str, atoms: Atoms) -> Tensor | None:
        """The coefficients of the base weight in atoms, as `WeightUpdate` takes them; None: none are needed."""
        config = self.settings[adapter_name]
        basis = ATOM_BASES[config.basis]
        if not basis.has_coefficients:
            return None

        def compute() -> Tensor:
            weight, held = self.unmerged_weight().detach(), self._tensor(f"{atoms.name}_basis", adapter_name)
            with torch.inference_mode(False), torch.no_grad():
                found = basis.coefficients(atoms.view.rows(weight), held, config).to(weight.dtype)
                return atoms.view.coefficient_columns(found, weight.shape, by_input=atoms.by_input)

        stays = torch.compiler.is_compiling() or weight_access.comes_per_call(self.get_base_layer())
        return self._coefficients.get((adapter_name, atoms.name), self._sources, compute, always_valid=stays)

    def _sources(self, key: Key) -> tuple[Tensor, Tensor]:
        return self.tensors(f"{key[1]}_basis")[key[0]], self.get_base_layer().weight

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Move coefficients along to another device or dtype, unless something newer has been loaded.

        Deltas and atoms move, but are never rounded: they stay in float32 in a model of half precision.
        """
        held = [self.tensors(kind) for kind in TENSOR_NAMES]
        with self._coefficients.kept(self._sources, fn):
            for child in self.children() if recurse else ():
                child._apply(partial(_apply_unrounded, fn) if child in held else fn)
            return super()._apply(fn, recurse=False)  # type: ignore[no-untyped-call]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The base module's forward, with the adapted weight where adapters are active."""
        if (mixed := self.mixed_batch) is not None:
            return self._forward_mixed(*mixed, x, *args, **kwargs)
        if self.holds_merged and not self.disable_adapters:  # no look at names: compiled code outlives a switch
            return self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            self.unmerge()
        names = [name for name in self.active_adapters if self.scaling.get(name)]
        if self.disable_adapters or not names:
            return self.base_layer(x, *args, **kwargs)
        base = cast(Any, self.base_layer)
        if not functional_call.is_plain(base):
            weights = {name: self.scaling[name] for name in names}
            return self._call_with(lambda weight: self._adapt(weight, weights), None, x, *args, **kwargs)
        if autograd.can_recompute(base, x, *args, *kwargs):
            updates = self.weight_updates({name: self.scaling[name] for name in names})
            return autograd.call(base, self.unmerged_weight(), updates, x)
        return functional_call.call(base, self.adapted_weight(names), base.bias, x, *args, **kwargs)

    def _forward_mixed(
        self, batch: BatchLayout, updates: list[WeightUpdate], x: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        """The base module's forward with a weight for each sample; all samples share one product."""
        base = cast(Any, self.base_layer)

        def adapt(weight: Tensor) -> Tensor:
            with without_autocast(weight):
                return adapt_weight_per_sample(weight, _on(weight.device, updates))

        def by_row(call: Callable[[Tensor, Tensor], Tensor], x: Tensor, adapted: Tensor) -> Tensor:
            return batch.join(vmap(call)(batch.split(x), adapted))

        if not functional_call.is_plain(base):
            if not updates:
                return self._call_with(lambda weight: weight, None, x, *args, **kwargs)
            return self._call_with(adapt, by_row, x, *args, **kwargs)
        weight = self.unmerged_weight()
        if not updates:
            return functional_call.call(base, weight, base.bias, x, *args, **kwargs)
        if not (args or kwargs) and im2col.im2col_is_cheaper(base, updates, x.numel() // (x.shape[1] * batch.samples)):
            return batch.join(im2col.convolve(base, weight, updates, batch.split(x)))
        return by_row(lambda x, row: functional_call.call(base, row, base.bias, x, *args, **kwargs), x, adapt(weight))

    def _call_with(self, adapt: Callable[[Tensor], Tensor], by_row: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The base module's own call, in which what `adapt` makes of the unmerged weight takes the weight's place."""

        def of_base(weight: Tensor) -> Tensor:
            return adapt(self.unmerged_weight().to(weight) if self.holds_merged else weight)

        with functional_call.SubstituteWeight(self.get_base_layer(), of_base, by_row) as other:
            result = self.base_layer(x, *args, **kwargs)
        other.check()
        return result

    @torch.no_grad()
    def mix(self, layout: BatchLayout, samples: Sequence[Mapping[str, float]]) -> None:
        """Let each sample of a batch have adapters of its own, until `mixed_batch` is None again.

        Args:
            layout: how the samples lie in what `forward` gets; it may change between calls.
            samples: adapter -> weight, for each sample.
        """
        names = [name for name in self.scaling if any(sample.get(name) for sample in samples)]
        weights = torch.tensor([[sample.get(name, 0.0) for name in names] for sample in samples])  # (samples, names)
        updates = [self._weight_update(name, atoms) for name in names for atoms in self.atom_sets[name]]
        of_name = [place for place, name in enumerate(names) for _ in self.atom_sets[name]]
        self.mixed_batch = (
            layout,
            [_per_sample(c, weights[:, place].to(c.matrix)) for c, place in zip(updates, of_name, strict=True)],
        )

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write the adapted weight over the base weight, which is kept aside.

        Args:
            safe_merge: check that the merged weight is finite before it is put in place.
            adapter_names: the adapters to merge beside those that are; None: the active ones.

        Raises:
            ValueError: `safe_merge` found a value that is not finite; nothing was changed.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.scaling]
        if not names:
            return
        names = [*self.merged_adapters, *names]
        if safe_merge and not torch.isfinite(self.adapted_weight(names)).all():
            raise ValueError(f"merging {names} gives values that are not finite; lower their weights or retrain them")
        self.write(names, self.base_weight.offloaded)

    def write(self, adapter_names: Sequence[str], offloaded: Callable[[], Tensor] | None = None) -> None:
        """Write the base weight, changed by exactly these adapters, into the memory of the weight in place.

        Args:
            adapter_names: of this layer, none for the base weight; each counts with its weight.
            offloaded: reads the base weight from elsewhere; None: a copy of it is kept on its device.
        """
        base = self.base_weight
        self._release_others(base)
        weight = weight_access.memory(base.module)
        with torch.inference_mode(weight.is_inference()), torch.no_grad():
            base.keep(offloaded)
            self.written = {name: self.scaling[name] for name in adapter_names}
            updates = _on(weight.device, self.weight_updates(self.written))
            with self._coefficients.kept(self._sources):  # they are those of the base weight
                write_adapted(weight.detach(), base.read().detach(), updates)
        self.merged_adapters = list(adapter_names)
        self.holds_merged = True

    def unmerge(self) -> None:
        """Copy the base weight back, every bit as it was; without effect where nothing is merged."""
        if not self.holds_merged:
            return
        base = self.base_weight
        self._release_others(base)
        with self._coefficients.kept(self._sources):
            base.restore()
        self.written = None
        self.merged_adapters.clear()
        self.holds_merged = False

    def _release_others(self, base: BaseWeight) -> None:
        """Let layers of other methods act unmerged: the weight is about to be written from the base weight."""
        base.release_layers()
        inside = cast(Any, self.base_layer)
        while isinstance(inside, BaseTunerLayer):
            if inside.merged and base.is_kept:
                inside.merged_adapters.clear()
            elif inside.merged:
                inside.unmerge()  # it came first, without a copy: as exact as its method can
            inside = cast(Any, inside).base_layer

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter; where it is merged, the others stay merged without it."""
        if adapter_name in self.merged_adapters:
            others = [name for name in self.merged_adapters if name != adapter_name]
            if others:
                self.write(others, self.base_weight.offloaded)
            else:
                self.unmerge()
        self._coefficients.drop(adapter_name)
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

    def weight_updates(self, weights: Mapping[str, float]) -> list[WeightUpdate]:
        """The updates of adapters, each times its weight."""
        found = [
            (self._weight_update(name, atoms), weight)
            for name, weight in weights.items()
            if weight
            for atoms in self.atom_sets[name]
        ]
        return [replace(update, matrix=weight * update.matrix) for update, weight in found]

    def _weight_update(self, name: str, atoms: Atoms) -> WeightUpdate:
        """The update by one set of atoms of an adapter at weight 1."""
        delta = atoms.delta(lambda kind: self._tensor(kind, name))
        coefficients = self.coefficients(name, atoms)
        if coefficients is None:
            delta = update_matrix(self._tensor(f"{atoms.name}_basis", name), delta)
        return WeightUpdate(atoms.view, delta, coefficients)

    def _tensor(self, kind: str, name: str) -> Tensor:
        """A tensor of an adapter, wherever it is kept."""
        held = self.tensors(kind)
        return weight_access.read(held, name, held[name])

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Move an adapter to the base weight's device, in float32 whatever the base's dtype."""
        device = device or self.unmerged_weight().device
        for kind in TENSOR_NAMES:
            if adapter_name in self.tensors(kind):
                tensor = self.tensors(kind)[adapter_name]
                tensor.data = tensor.data.to(device, torch.float32)


@dataclass(frozen=True)
class _Movable:
    """The tensors of one adapter in one layer."""

    layer: AtomLayer
    name: str

    def to(self, device: torch.device | str | int) -> None:
        """Move them."""
        self.layer._move_adapter_to_device_of_base_layer(self.name, torch.device(device))


def _apply_unrounded(fn: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor:
    """What a function makes of a tensor; where that is the tensor in a smaller dtype, in the tensor's own."""
    moved = fn(tensor)
    return moved if moved.itemsize >= tensor.itemsize else tensor.to(moved.device)


def _on(device: torch.device, updates: list[WeightUpdate]) -> list[WeightUpdate]:
    """Changes on a device: offloaded ones are elsewhere."""
    if all(update.matrix.device == device for update in updates):
        return updates
    coefficients = [None if update.coefficients is None else update.coefficients.to(device) for update in updates]
    return [
        replace(c, matrix=c.matrix.to(device), coefficients=code) for c, code in zip(updates, coefficients, strict=True)
    ]


def _per_sample(update: WeightUpdate, weights: Tensor) -> WeightUpdate:
    """An update times a weight for each sample: matrix (...) -> (samples, ...)."""
    return replace(update, matrix=weights.reshape(-1, *[1] * update.matrix.ndim) * update.matrix)


def _first_atoms(atoms: Atoms, config: AtomConfig, weight: Tensor, seed: int, module_name: str) -> Tensor:
    """The atoms (m, d) that a layer starts with; zeros where a loader fills them in."""
    basis = ATOM_BASES[config.basis]
    if (fixed := basis.fixed(atoms.axes, atoms.num_atoms)) is not None:
        return fixed
    if config.filled_by_loader:
        return torch.zeros(atoms.num_atoms, atoms.size)
    if weight.is_meta:
        raise ValueError(
            f"the weight of {module_name} is on the meta device: load weights to fit atoms to, "
            "or count numbers with atomdiff.concepts.parameter_count"
        )
    return basis.fit(atoms.view.rows(weight), atoms.num_atoms, config, seed, module_name)
