"""Write the concepts of a pipeline into its weights, switch them there, and take them out again to the bit."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from atomdiff.bases.find import find_base
from atomdiff.pipelines.adapter_weight import AdapterWeight
from atomdiff.pipelines.base_offload import BaseOffload, base_weight_readers
from atomdiff.pipelines.kept_directions import keep_directions, kept_directions
from atomdiff.pipelines.loaded_concepts import concept_names, refresh
from atomdiff.pipelines.models import locked, pipeline_models
from atomdiff.pipelines.step_schedule import start_schedule, stop_schedule
from atomdiff.tuner import adapter_state, checks, merging
from atomdiff.tuner.ranking import Directions
from atomdiff.utils.errors import UserError

Concepts = str | Sequence[str] | Mapping[str, Any]


def set_active(pipe: Any, concepts: Concepts, *, offload_base: BaseOffload | None = None) -> None:
    """Write exactly these concepts into the weights, always starting from the base: images cost what the base's cost.

    Weights change in place, so that compiled models and CUDA graphs stay valid. An empty mapping is the bare base;
    `restore` ends it all and gives back the memory. Adapters of activations (Mona and the like) have no weights to be
    written into; they are made active, and act unmerged.

    Args:
        pipe: a pipeline with the concepts loaded.
        concepts: name -> adapter weight, or names with weight 1. An adapter weight is a number (1: as trained), an
            `atomdiff.pipelines.adapter_weight.AdapterWeight`, or a mapping with its fields: {"weight": 0.8,
            "blocks": {"down": 0.5, "up.1": 0}, "steps": {0: 1, 1: 0.2}, "keep": 0.5}.
            With steps, weights are written again before each denoising step; a model to be compiled is compiled
            before they are set.
        offload_base: where the base weights are kept meanwhile: "device" (takes the memory of the adapted weights once
            more), "cpu", or "file" (takes none: the checkpoint is read again). None: where they are, at first "device".

    Raises:
        UserError: there is no such concept, an adapter weight cannot be used, no file has the base weights, or a method
            cannot be merged (the pipeline is restored).
    """
    with locked(pipe):
        refresh(pipe)
        weights = read_adapter_weights(pipe, concepts)
        models = pipeline_models(pipe)
        other_weights = _weights_of_others(models, weights)
        for model in models.values():
            checks.check_writable(model)
        kept = _kept_directions(pipe, weights)
        writers = {}
        for component, model in models.items():
            layers = adapter_state.atom_layers(model)
            readers = base_weight_readers(model, layers, offload_base)
            writers[component] = _Writer(component, model, layers, weights, other_weights, readers)
        denoiser = find_base(models).denoiser
        keep_directions(models, kept)
        stop_schedule(models.values())
        with _restored_on_error(pipe):
            for component, write in writers.items():
                write(0.0 if component == denoiser else None)
        if any(weight.steps for weight in weights.values()):
            writer = writers[denoiser]
            start_schedule(pipe, partial(writer, changed_only=True), writer.set_plain_scales)


def set_weights(pipe: Any, concepts: Concepts) -> None:
    """Make exactly these concepts active, with their adapter weights, without writing them into the weights.

    They act unmerged, and weights stay where they are; `set_active` is for generating images.

    Args:
        pipe: a pipeline with the concepts loaded; what is merged is restored.
        concepts: as for `set_active`; of weights by denoising step, those of no particular step count.

    Raises:
        UserError: there is no such concept, or an adapter weight cannot be used.
    """
    with locked(pipe):
        refresh(pipe)
        weights = read_adapter_weights(pipe, concepts)
        models = pipeline_models(pipe)
        other_weights = _weights_of_others(models, weights)
        kept = _kept_directions(pipe, weights)
        restore(pipe)
        keep_directions(models, kept)
        for component, model in models.items():
            adapter_state.activate(model, list(weights))
            for path, layer in adapter_state.atom_layers(model).items():
                for name, weight in weights.items():
                    layer.set_scale(name, weight.at(f"{component}.{path}", None))
            adapter_state.set_weights_of_others(model, other_weights)


def _kept_directions(pipe: Any, weights: Mapping[str, AdapterWeight]) -> dict[str, Directions]:
    """Concept -> directions that it acts along, for all of a pipeline; none for those that act whole."""
    return {**dict.fromkeys(concept_names(pipe), {}), **kept_directions(pipe, [weights])[0]}


def merge(pipe: Any) -> None:
    """Write the active concepts with their weights into the base weights: images then cost what the base's cost.

    Untouched weights are kept aside, so that `restore` is exact: adapted layers take twice their memory meanwhile.
    Later changes of weights or of active concepts have no effect until the next `merge` or `restore`; `set_active` does
    all at once.

    Raises:
        UserError: weights cannot be written, or a method cannot be merged (the pipeline is restored).
    """
    with locked(pipe):
        models = _changeable_models(pipe, _check_mergeable)
        with _restored_on_error(pipe):
            for model in models:
                merging.merge(model)


def _check_mergeable(model: nn.Module) -> None:
    checks.check_writable(model)
    checks.check_extensible(model)  # by the copies of the base weights


def restore(pipe: Any) -> None:
    """Undo `merge` and `set_active`: every weight has the bits it had; concepts stay loaded, and act unmerged."""
    with locked(pipe):
        for model in _changeable_models(pipe, checks.check_restorable):
            merging.restore(model)


def _changeable_models(pipe: Any, check: Callable[[Any], None]) -> Collection[nn.Module]:
    """The models of a pipeline, all of which are checked before the first is changed."""
    refresh(pipe)
    models = pipeline_models(pipe).values()
    for model in models:
        check(model)
    stop_schedule(models)
    return models


@contextmanager
def _restored_on_error(pipe: Any) -> Iterator[None]:
    """Restore a pipeline where concepts cannot be merged, and say what to do."""
    try:
        yield
    except (ValueError, RuntimeError) as error:  # there are methods that PEFT cannot merge
        restore(pipe)
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"these concepts cannot be merged: {error}; the pipeline is restored, use them unmerged by "
            "pipe.set_adapters([...])"
        ) from error


@dataclass(frozen=True)
class _Writer:
    """Writes concepts into the weights of one model; copies of a pipeline have their own."""

    component: str
    model: nn.Module
    layers: Mapping[str, Any]
    weights: Mapping[str, AdapterWeight]
    other_weights: Mapping[str, float]
    base_readers: Mapping[str, Callable[[], Tensor] | None]

    def __call__(self, progress: float | None, changed_only: bool = False) -> None:
        weights = {
            path: {name: weight.at(f"{self.component}.{path}", progress) for name, weight in self.weights.items()}
            for path in self.layers
        }
        merging.restore_others(self.model)
        merging.write(self.layers, weights, self.base_readers, changed_only)
        merging.merge_others(self.model, self.other_weights)

    def set_plain_scales(self) -> None:
        """Let concepts that act unmerged have the weights of no particular step, not those of the last one."""
        for path, layer in self.layers.items():
            for name in self.weights.keys() & layer.scaling.keys():
                layer.scaling[name] = self.weights[name].at(f"{self.component}.{path}", None)


def read_adapter_weights(pipe: Any, concepts: Concepts) -> dict[str, AdapterWeight]:
    """Read the adapter weights of concepts and check them against the layers in a pipeline.

    Raises:
        UserError: there is no such concept, or an adapter weight cannot be used.
    """
    if isinstance(concepts, str):
        concepts = [concepts]
    if not isinstance(concepts, Mapping):
        if not isinstance(concepts, (list, tuple, set)) or not all(isinstance(name, str) for name in concepts):
            raise UserError(f"found the concepts {concepts!r}: give their names, or a mapping name -> adapter weight")
        concepts = dict.fromkeys(concepts, 1.0)
    weights = {name: AdapterWeight.read(value) for name, value in concepts.items()}
    known = concept_names(pipe)
    for name, weight in weights.items():
        if name not in known:
            raise UserError(f"there is no concept {name!r}; loaded are: {', '.join(map(repr, known)) or 'none'}")
        if weight.blocks:
            weight.check(name, _modules_of(pipe, name))
        if weight.steps and (denoiser := find_base(pipe.components).denoiser) not in pipeline_models(pipe):
            raise UserError(f"this {type(pipe).__name__} has no {denoiser}, whose steps {name!r} could follow")
    return weights


def _modules_of(pipe: Any, name: str) -> list[str]:
    return [
        f"{component}.{adapter_state.module_path(path)}"
        for component, model in pipeline_models(pipe).items()
        for path, layer in adapter_state.mixable_layers(model).items()
        if name in layer.scaling
    ]


def _weights_of_others(
    models: Mapping[str, nn.Module], adapter_weights: Mapping[str, AdapterWeight]
) -> dict[str, float]:
    """The weights of adapters that are not atoms, checked to be such as they can have."""
    weights = {}
    for model in models.values():
        for name, config in adapter_state.adapter_configs(model).items():
            if name not in adapter_weights or adapter_state.is_atoms(config):
                continue
            weight = adapter_weights[name]
            if not weight.is_plain:
                raise UserError(
                    f"{name!r} is not an atom concept: only those can be weighted by block and step, or kept in part"
                )
            if not adapter_state.can_be_weighted(model, name, weight.weight):
                raise UserError(
                    f"{name!r} is a {config.peft_type.value} adapter, which PEFT gives no weight such as "
                    f"{weight.weight}: use 1, or leave it out"
                )
            weights[name] = weight.weight
    return weights
