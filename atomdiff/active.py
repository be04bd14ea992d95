"""Switch and mix concepts of a whole pipeline: small matrices are added first, then one pass over the weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from atomdiff import kept_base
from atomdiff.errors import UserError
from atomdiff.kept_base import Place
from atomdiff.pipeline import concept_names, denoiser_name, pipeline_models, stop_schedule
from atomdiff.strength import StepSchedule, Strength
from atomdiff.tuner import attach

Concepts = str | Sequence[str] | Mapping[str, Any]


def set_active(pipe: Any, concepts: Concepts, *, keep_base: Place | None = None) -> None:
    """Write exactly these concepts into the weights, always starting from the base: pictures cost what the base's cost.

    Weights change in place, so that compiled models and CUDA graphs stay valid. An empty mapping is the bare base;
    `restore` ends it all and gives back the memory.

    Args:
        pipe: a pipeline with the concepts loaded.
        concepts: name -> strength, or names at strength 1. A strength is a number (1: as trained), a
            `atomdiff.strength.Strength`, or a mapping with its fields: {"weight": 0.8, "blocks": {"down": 0.5,
            "up.1": 0}, "steps": {0: 1, 1: 0.2}}. With steps, weights are written again before each denoising step.
        keep_base: where the untouched base weights are kept: "device" (takes the memory of the adapted weights once
            more), "cpu", or "file" (takes none: the checkpoint is read again). None: where they are, at first "device".

    Raises:
        UserError: there is no such concept, a strength cannot be used, or no file has the base weights.
    """
    strengths = read_strengths(pipe, concepts)
    kept_base.check_place(keep_base)
    models = pipeline_models(pipe)
    layers = {part: attach.atom_layers(model) for part, model in models.items()}
    kept = {part: kept_base.keep(model, layers[part], keep_base) for part, model in models.items()}

    def write(part: str, progress: float | None, changed_only: bool = False) -> None:
        weights = {
            path: {name: strength.at(f"{part}.{path}", progress) for name, strength in strengths.items()}
            for path in layers[part]
        }
        attach.write(layers[part], weights, kept[part], changed_only)

    others = {name: strength for name, strength in strengths.items() if name in _other_concepts(pipe)}
    for name, strength in others.items():
        if strength.blocks or strength.steps:
            raise UserError(f"{name!r} is no atom concept: only those can be weighted by block and step")
    denoiser = denoiser_name(models)
    stop_schedule(pipe)
    for part, model in models.items():
        attach.restore_others(model)
        write(part, 0.0 if part == denoiser else None)
        attach.merge_others(model, {name: strength.weight for name, strength in others.items()})
    if any(strength.steps for strength in strengths.values()):
        pipe._atomdiff_schedule = StepSchedule(pipe, models[denoiser], lambda share: write(denoiser, share, True))


def read_strengths(pipe: Any, concepts: Concepts) -> dict[str, Strength]:
    """Read the strengths of concepts and check them against the layers in a pipeline.

    Raises:
        UserError: there is no such concept, or a strength cannot be used.
    """
    if isinstance(concepts, str):
        concepts = [concepts]
    if not isinstance(concepts, Mapping):
        concepts = dict.fromkeys(concepts, 1.0)
    strengths = {name: Strength.read(value) for name, value in concepts.items()}
    known = concept_names(pipe)
    for name, strength in strengths.items():
        if name not in known:
            raise UserError(f"there is no concept {name!r}; loaded are: {', '.join(map(repr, known)) or 'none'}")
        if strength.blocks:
            strength.check(name, _modules_of(pipe, name))
    return strengths


def _modules_of(pipe: Any, name: str) -> list[str]:
    models = pipeline_models(pipe)
    layers = {f"{part}.{path}": layer for part, m in models.items() for path, layer in attach.atom_layers(m).items()}
    return [path for path, layer in layers.items() if name in layer.scaling]


def _other_concepts(pipe: Any) -> set[str]:
    """Names of adapters that are not atoms."""
    configs = [attach.adapter_configs(model) for model in pipeline_models(pipe).values()]
    return {name for of in configs for name, config in of.items() if not attach.is_atoms(config)}
