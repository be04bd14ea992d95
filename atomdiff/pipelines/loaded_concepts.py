"""The concepts in a pipeline, of any PEFT method, and the placeholder tokens that came with them."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from torch import nn

from atomdiff.pipelines import overrides
from atomdiff.pipelines.models import changeable_parts, locked, pipeline_models
from atomdiff.pipelines.placeholder_tokens import refresh_tokens, tokens_in
from atomdiff.pipelines.vocabulary import PlaceholderToken, has_placeholder_tokens
from atomdiff.tuner import adapter_state, attach, merging


@dataclass(frozen=True)
class LoadedConcept:
    """One concept in a pipeline."""

    name: str
    """Name of its adapter."""
    method: str
    """PEFT method, such as ATOMS or LORA; empty where it has token embeddings alone."""
    layers: dict[str, int]
    """Component -> number of adapted layers."""
    active: bool
    """Whether its adapter is in use."""
    merged: bool
    """Whether it is written into the weights."""
    trigger_words: tuple[str, ...]
    """Placeholder tokens that it brought."""


def list_atoms(pipe: Any) -> list[LoadedConcept]:
    """The concepts in a pipeline, of any PEFT method, in the order they came."""
    with locked(pipe):
        refresh(pipe)
        return [_concept(pipe, name) for name in concept_names(pipe)]


def refresh(pipe: Any) -> None:
    """Drop what is left of adapters and tokens that others have deleted, and override methods of new parts."""
    refresh_tokens(pipe)
    for model in pipeline_models(pipe).values():
        attach.remove_leftovers(model)
    update_overrides(pipe)


def update_overrides(pipe: Any) -> None:
    """Override methods of the parts that have concepts by now, and give the others their own back."""
    loaded = bool(concept_names(pipe))
    for part in changeable_parts(pipe):
        if loaded and (
            has_placeholder_tokens(part) or (isinstance(part, nn.Module) and adapter_state.adapter_configs(part))
        ):
            overrides.add(part)
            if isinstance(part, nn.Module):
                merging.keep_when_merged(part)
        else:
            overrides.remove(part)


def concept_names(pipe: Any) -> list[str]:
    """The names of the concepts in a pipeline, in the order they came."""
    adapters = [name for model in pipeline_models(pipe).values() for name in adapter_state.adapter_configs(model)]
    owners = [word.owner for word in tokens_in(pipe).values() if word.owner is not None]
    return list(dict.fromkeys(adapters + owners))


def _concept(pipe: Any, name: str) -> LoadedConcept:
    models = {component: model for component, model in pipeline_models(pipe).items() if has_adapter(model, name)}
    methods = [adapter_state.adapter_configs(model)[name].peft_type.value for model in models.values()]
    layers = {component: adapter_state.adapter_layers(model, name) for component, model in models.items()}
    all_layers = [layer for of_component in layers.values() for layer in of_component.values()]
    return LoadedConcept(
        name=name,
        method=methods[0] if methods else "",
        layers={component: len(of_component) for component, of_component in layers.items()},
        active=any(name in layer.active_adapters and not layer.disable_adapters for layer in all_layers),
        merged=any(name in layer.merged_adapters for layer in all_layers),
        trigger_words=tuple(word for word, entry in tokens_in(pipe).items() if entry.owner == name),
    )


def has_adapter(model: nn.Module, name: str) -> bool:
    """Whether a model has an adapter by this name."""
    return name in adapter_state.adapter_configs(model)


def name_concepts(pipe: Any) -> str:
    """The names of the concepts in a pipeline, for a message."""
    return ", ".join(map(repr, concept_names(pipe))) or "none"


def taken_names(pipe: Any) -> list[str]:
    """The names that a new concept cannot have; free are those of which others have left only placeholder tokens."""
    loaded = {name for model in pipeline_models(pipe).values() for name in adapter_state.adapter_configs(model)}
    return [
        name
        for name in concept_names(pipe)
        if name in loaded or len(leftover_tokens(pipe, name)) < len(tokens_of(pipe, [name]))
    ]


def leftover_tokens(pipe: Any, name: str) -> list[str]:
    """The placeholder tokens of a concept whose layers others have deleted everywhere."""
    words = {word: tokens_in(pipe)[word].came_with for word in tokens_of(pipe, [name])}
    return [
        word for word, models in words.items() if models is not None and not any(has_adapter(m, name) for m in models)
    ]


def tokens_of(pipe: Any, owners: Collection[str]) -> list[str]:
    """The placeholder tokens that concepts brought."""
    return [word for word, entry in tokens_in(pipe).items() if entry.owner in owners]


def belongs_to_other_pipeline(pipe: Any, token: PlaceholderToken) -> bool:
    """Whether a token's concept lies in models of another pipeline alone, which loaded it there."""
    if token.came_with is None or token.loaded_by is None or token.loaded_by() is pipe:
        return False
    carriers = {model for model in token.came_with if token.owner is not None and has_adapter(model, token.owner)}
    return bool(carriers) and carriers.isdisjoint(pipeline_models(pipe).values())
