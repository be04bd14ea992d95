"""The adapters of one layer: their tensors and weights, and the updates of the base weight that they make."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, cast

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from atomdiff.atoms.atom_basis import ATOM_BASES
from atomdiff.atoms.update import WeightUpdate, update_matrix
from atomdiff.atoms.variant import Atoms
from atomdiff.atoms.variants import (
    BASIS_NAMES,
    PARAMETER_NAMES,
    SCORE_NAME,
    SCORE_START,
    SCORE_THRESHOLD,
    TENSOR_NAMES,
    atoms_of,
)
from atomdiff.tuner import weight_access
from atomdiff.tuner.adapter_scales import AdapterScales, BaseAttributes
from atomdiff.tuner.base_weight import BaseWeight
from atomdiff.tuner.coefficient_cache import CoefficientCache, Key
from atomdiff.tuner.config import AtomConfig
from atomdiff.tuner.peft_type import PREFIX


def projections(directions: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Delta -> the projection V @ V.T (d, d) on its directions V (d, k)."""
    return {delta: (vectors @ vectors.T).float() for delta, vectors in directions.items()}


def attribute(kind: str) -> str:
    """Name of a tensor kind in a layer; libraries find an adapter's tensors by the tuner's prefix."""
    return kind if kind.startswith(PREFIX) else PREFIX + kind


class LayerAdapters(BaseAttributes, nn.Module, AdapterScales, BaseTunerLayer):
    """The adapters of a module, by name: what `AtomLayer` computes with."""

    adapter_layer_names = tuple(map(attribute, (*PARAMETER_NAMES, SCORE_NAME)))
    other_param_names = (*map(attribute, BASIS_NAMES), "settings", "atom_sets", "scaling", "kept")
    base_layer: nn.Module

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        base: Any = self.get_base_layer()
        self.in_features = base.in_features if isinstance(base, nn.Linear) else base.in_channels  # as all of PEFT have
        self.out_features = base.out_features if isinstance(base, nn.Linear) else base.out_channels
        for kind in (*PARAMETER_NAMES, SCORE_NAME):
            setattr(self, attribute(kind), nn.ParameterDict())  # shapes: `Atoms.parameter_shapes`
        for kind in BASIS_NAMES:
            setattr(self, attribute(kind), BufferDict())  # (m, d)
        self.settings: dict[str, AtomConfig] = {}
        self.atom_sets: dict[str, tuple[Atoms, ...]] = {}
        self.scaling: dict[str, float] = {}
        self.kept: dict[str, Mapping[str, Tensor]] = {}  # adapter -> delta -> projection on what is kept of it (d, d)
        self.cast_input_dtype_enabled = True  # diffusers switches it where layers are cast for storage
        self._coefficients = CoefficientCache()

    def get_base_layer(self) -> nn.Module:
        """The bare module, below layers of other methods; PEFT's own looks for attributes, which takes longer."""
        base: Any = self._modules["base_layer"]
        while isinstance(base, BaseTunerLayer):
            base = base.base_layer
        module: nn.Module = base
        return module

    @property
    def base_weight(self) -> BaseWeight:
        """The weight without what is merged into it; it lies in the base module, which outlives this layer."""
        return BaseWeight(self.get_base_layer())

    def unmerged_weight(self) -> Tensor:
        """The base weight without any adapter of this layer, wherever it is kept."""
        return self.base_weight.read()

    def tensors(self, kind: str) -> Any:
        """The tensors of a kind, by adapter."""
        return self._modules[attribute(kind)]

    def update_layer(
        self,
        adapter_name: str,
        config: AtomConfig,
        module_name: str,
        shared: dict[tuple[Any, ...], nn.Parameter] | None = None,
    ) -> None:
        """Add an adapter: deltas in float32, zero by default, and atoms fitted to the unmerged base weight.

        Args:
            adapter_name: its name.
            config: its settings.
            module_name: path of the layer in its model.
            shared: parameters that layers of the model share, by name and shape; new ones are added.

        Raises:
            ValueError: `config.num_atoms` exceeds the numbers in a row, or the base weight is not finite.
        """
        weight = self.unmerged_weight().detach()
        atom_sets = atoms_of(config, module_name, weight.shape)
        seed = zlib.crc32(module_name.encode(), config.seed)  # of 32 bits: generators pass over the rest
        for atoms in atom_sets:
            for kind, start in atoms.initial_tensors(config, seed).items():
                parameter = nn.Parameter(start.to(weight.device))
                if shared is not None and kind in atoms.shared_names:
                    parameter = shared.setdefault((kind, *start.shape), parameter)
                self.tensors(kind)[adapter_name] = parameter
            basis = ATOM_BASES[config.basis].first_atoms(atoms, weight, config, seed, module_name)
            # Fitted atoms are saved with the deltas: their signs and order are not the same everywhere.
            self.tensors(f"{atoms.name}_basis").register_buffer(
                adapter_name, basis.to(weight.device), persistent=config.stores_basis
            )
        if config.select == "adaptive":
            score = torch.full((1,), SCORE_START, device=weight.device)
            self.tensors(SCORE_NAME)[adapter_name] = nn.Parameter(score)
        self.settings[adapter_name] = config
        self.atom_sets[adapter_name] = atom_sets
        self.scaling[adapter_name] = 1.0
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter."""
        self._coefficients.drop(adapter_name)
        super().delete_adapter(adapter_name)

    def keep_directions(self, kept: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Let these adapters act along some directions (d, k) alone, by delta; where none are given, along all."""
        given = {name: projections(of) for name, of in kept.items() if name in self.scaling}
        self.kept = {name: of for name, of in {**self.kept, **given}.items() if of}

    def weight_updates(
        self, weights: Mapping[str, float | Tensor], kept: Mapping[str, Mapping[str, Tensor]] | None = None
    ) -> list[WeightUpdate]:
        """The updates of adapters.

        Args:
            weights: adapter -> its weight, or weights (samples,) of the samples of a batch.
            kept: adapter -> delta -> projection on what is kept of it (d, d), or (samples, d, d); None: `self.kept`.
        """
        kept = self.kept if kept is None else kept
        return [
            self._weight_update(name, atoms, weight, kept.get(name, {}).get(atoms.delta_name))
            for name, weight in weights.items()
            if isinstance(weight, Tensor) or weight
            for atoms in self.atom_sets[name]
        ]

    def _weight_update(self, name: str, atoms: Atoms, weight: float | Tensor, kept: Tensor | None) -> WeightUpdate:
        """The update by one set of atoms of an adapter."""
        matrix = atoms.delta(lambda kind: self.read_tensor(kind, name))
        coefficients = self.coefficients(name, atoms)
        if coefficients is None:
            basis = self.read_tensor(f"{atoms.name}_basis", name)  # a buffer, which offloading may leave on the GPU
            matrix = update_matrix(basis.to(matrix.device), matrix)
        if isinstance(weight, Tensor):
            weight = weight.to(matrix).reshape(-1, *[1] * matrix.ndim)
        matrix = weight * matrix
        if name in self.tensors(SCORE_NAME):
            score = self.read_tensor(SCORE_NAME, name)
            indicator = (score >= SCORE_THRESHOLD).to(score)
            matrix = (indicator + (score - score.detach())) * matrix  # 0 or 1, with the gradient of the score itself
        if kept is not None:
            per_sample = kept.ndim == 3 and matrix.ndim == 4  # with a matrix for each input channel
            matrix = matrix @ (kept[:, None] if per_sample else kept).to(matrix)
        return WeightUpdate(atoms.view, matrix, coefficients)

    def read_tensor(self, kind: str, name: str) -> Tensor:
        """A tensor of an adapter, wherever it is kept."""
        holder = self.tensors(kind)
        return weight_access.read(holder, name, holder[name])

    def coefficients(self, adapter_name: str, atoms: Atoms) -> Tensor | None:
        """The coefficients of the base weight in atoms, as `WeightUpdate` takes them; None: none are needed."""
        config = self.settings[adapter_name]
        basis = ATOM_BASES[config.basis]
        if not basis.has_coefficients:
            return None

        def compute() -> Tensor:
            weight = self.unmerged_weight().detach()
            atom_basis = self.read_tensor(f"{atoms.name}_basis", adapter_name)
            with torch.inference_mode(False), torch.no_grad():
                coefficients = basis.coefficients(atoms.view.rows(weight), atom_basis, config)
                return atoms.view.coefficient_columns(coefficients.to(weight.dtype), weight.shape)

        always_valid = torch.compiler.is_compiling() or weight_access.comes_per_call(self.get_base_layer())
        return self._coefficients.get((adapter_name, atoms.name), self._sources, compute, always_valid)

    def _sources(self, key: Key) -> tuple[Tensor, Tensor]:
        return self.tensors(f"{key[1]}_basis")[key[0]], cast(Tensor, self.get_base_layer().weight)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: Any = None) -> None:
        """Move an adapter to the base weight's device, or another, in float32 whatever the base's dtype."""
        if device is None:
            device = self.unmerged_weight().device
        for kind in (*TENSOR_NAMES, SCORE_NAME):
            if adapter_name in self.tensors(kind):
                tensor = self.tensors(kind)[adapter_name]
                tensor.data = tensor.data.to(device, torch.float32)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Move coefficients along to another device or dtype, unless something newer has been loaded.

        Deltas and atoms move, but are never rounded: they stay in float32 in a model of half precision.
        """
        holders = [self.tensors(kind) for kind in (*TENSOR_NAMES, SCORE_NAME)]
        with self._coefficients.kept(self._sources, fn):
            for child in self.children() if recurse else ():
                child._apply(partial(_apply_unrounded, fn) if child in holders else fn)
            return super()._apply(fn, recurse=False)  # type: ignore[no-untyped-call]


def _apply_unrounded(fn: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor:
    """What a function makes of a tensor; where that is the tensor in a smaller dtype, in the tensor's own."""
    moved = fn(tensor)
    return moved if moved.itemsize >= tensor.itemsize else tensor.to(moved.device)
