"""Concepts of which only the most important directions act: `keep` of an adapter weight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from atomdiff.concepts.compatibility import fingerprint
from atomdiff.pipelines.adapter_weight import AdapterWeight
from atomdiff.pipelines.models import pipeline_models
from atomdiff.tuner import adapter_state
from atomdiff.tuner.checks import check_readable
from atomdiff.tuner.ranking import Directions, RankedDirections, rank_directions


def kept_directions(pipe: Any, samples: Sequence[Mapping[str, AdapterWeight]]) -> list[dict[str, Directions]]:
    """For each sample: concept -> the directions along which it acts, for concepts that are kept in part.

    Raises:
        UserError: the base weights are not in memory.
    """
    models = pipeline_models(pipe)
    in_part = [
        {name: weight.keep for name, weight in weights.items() if weight.keep < 1 and _is_atoms(models, name)}
        for weights in samples
    ]
    ranked = {name: _rank(models, name) for name in dict.fromkeys(name for keeps in in_part for name in keeps)}
    return [{name: ranked[name].kept(keep) for name, keep in keeps.items()} for keeps in in_part]


def keep_directions(models: Mapping[str, nn.Module], kept: Mapping[str, Directions]) -> None:
    """Let these concepts act along these directions alone; one without directions along all of its own."""
    for component, model in models.items():
        for path, layer in adapter_state.atom_layers(model).items():
            layer.keep_directions(
                {name: of_concept.get(f"{component}.{path}", {}) for name, of_concept in kept.items()}
            )


def _is_atoms(models: Mapping[str, nn.Module], name: str) -> bool:
    configs = (adapter_state.adapter_configs(model) for model in models.values())
    return any(name in of_model and adapter_state.is_atoms(of_model[name]) for of_model in configs)


def _rank(models: Mapping[str, nn.Module], name: str) -> RankedDirections:
    layers, values = {}, {}
    adapted = {part: m for part, m in models.items() if name in adapter_state.adapter_configs(m)}
    configs = [adapter_state.adapter_configs(model)[name] for model in adapted.values()]
    for component, model in adapted.items():
        of_model = adapter_state.atom_tensors(model, name)
        check_readable(model, list(of_model))
        weights = adapter_state.base_weights(model)
        for path, tensors in of_model.items():
            layers[f"{component}.{path}"] = {kind: tensor.detach().cpu() for kind, tensor in tensors.items()}
            values[f"{component}.{path}"] = fingerprint(weights[path], configs[0], path)
    return rank_directions(configs[0], layers, values)
