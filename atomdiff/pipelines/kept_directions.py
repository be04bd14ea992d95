"""Concepts of which only the most important directions act: `keep` of an adapter weight."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from atomdiff.concepts.compatibility import fingerprint
from atomdiff.pipelines.adapter_weight import AdapterWeight
from atomdiff.pipelines.models import pipeline_models
from atomdiff.tuner import adapter_state
from atomdiff.tuner.checks import check_readable
from atomdiff.tuner.ranking import Directions, rank_directions


def kept_directions(pipe: Any, weights: Mapping[str, AdapterWeight]) -> dict[str, Directions]:
    """Concept -> the directions along which it acts, for concepts that are kept in part.

    Raises:
        UserError: the base weights are not in memory.
    """
    models = pipeline_models(pipe)
    return {name: _directions(models, name, weight.keep) for name, weight in weights.items() if 0 < weight.keep < 1}


def keep_directions(models: Mapping[str, nn.Module], kept: Mapping[str, Directions], names: Mapping[str, Any]) -> None:
    """Let concepts act along these directions alone, and those that have none along all of theirs."""
    for component, model in models.items():
        for path, layer in adapter_state.atom_layers(model).items():
            for name in names:
                layer.keep_directions(name, kept.get(name, {}).get(f"{component}.{path}", {}))


def _directions(models: Mapping[str, nn.Module], name: str, keep: float) -> Directions:
    layers, values = {}, {}
    adapted = {part: m for part, m in models.items() if name in adapter_state.adapter_configs(m)}
    configs = [adapter_state.adapter_configs(model)[name] for model in adapted.values()]
    if not configs or not adapter_state.is_atoms(configs[0]):
        return {}
    for component, model in adapted.items():
        of_model = adapter_state.atom_tensors(model, name)
        check_readable(model, list(of_model))
        weights = adapter_state.base_weights(model)
        for path, tensors in of_model.items():
            layers[f"{component}.{path}"] = {kind: tensor.detach().cpu() for kind, tensor in tensors.items()}
            values[f"{component}.{path}"] = fingerprint(weights[path], configs[0], path)
    return rank_directions(configs[0], layers, values).kept(keep)
