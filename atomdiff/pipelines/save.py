"""Save a concept of a diffusers pipeline: a concept file for atoms, a directory as PEFT writes it for other methods."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from atomdiff.bases.find import find_base
from atomdiff.concepts import peft_folder
from atomdiff.concepts.compatibility import fingerprint
from atomdiff.concepts.concept_file import ConceptFile, write_concept_file
from atomdiff.concepts.layer_choice import choose_layers
from atomdiff.concepts.modelspec import model_spec
from atomdiff.pipelines.loaded_concepts import has_adapter, name_concepts, refresh
from atomdiff.pipelines.models import locked, pipeline_models
from atomdiff.pipelines.placeholder_tokens import tokens_in
from atomdiff.tuner import adapter_state
from atomdiff.tuner.checks import check_in_reach, check_readable
from atomdiff.tuner.config import AtomConfig
from atomdiff.tuner.selection import file_budget, layer_scores
from atomdiff.utils.errors import UserError
from atomdiff.utils.versions import atomdiff_version

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def save_atoms(
    pipe: Any,
    path: str | os.PathLike[str],
    adapter_name: str = "default",
    *,
    trigger_phrase: str = "",
    training: Mapping[str, Any] | None = None,
    base_model: str | None = None,
    dtype: torch.dtype = torch.float16,
) -> Path:
    """Save a concept: its adapter in all components, and the embeddings of its tokens and of those added by hand.

    Args:
        pipe: the pipeline.
        path: the file to write, usually `<concept>.atoms.safetensors`; for methods other than atoms a directory.
        adapter_name: the adapter to save.
        trigger_phrase: what to write in a prompt to get the concept.
        training: metadata of the run, as JSON has it; of its "config" the settings of the scheduler are looked at again
            when the concept is loaded.
        base_model: name or path of the base; None: as the pipeline was loaded.
        dtype: of the stored tensors, float16, bfloat16 or float32, which keeps every bit of them. (Other methods keep
            their own.)

    Returns:
        `path`.

    Raises:
        UserError: there is no such adapter or token, its settings differ between components, a value is not finite, or
            out of reach, or the dtype is no such floating-point one.
    """
    if dtype not in _DTYPES:
        raise UserError(f"dtype={dtype}: expected one of {', '.join(map(str, _DTYPES))}")
    path = Path(path)
    with locked(pipe):
        refresh(pipe)
        models = pipeline_models(pipe)
        configs = _configs(models, adapter_name)
        if any(not isinstance(config, AtomConfig) for config in configs.values()):
            for component in configs:
                check_in_reach(models[component])
            adapters = {
                component: (config, adapter_state.peft_tensors(models[component], adapter_name))
                for component, config in configs.items()
            }
            metadata = {"training": json.dumps(training)} if training else {}
            peft_folder.write(path, adapters, _tokens(pipe, adapter_name), find_base(models).denoiser, metadata)
            return path
        details: dict[str, Any] = {"trigger_phrase": trigger_phrase, "training": training, "base_model": base_model}
        concept = build_concept(pipe, path.name.partition(".")[0], adapter_name, dtype=dtype, **details)
        write_concept_file(path, concept, dtype)
    return path


def build_concept(
    pipe: Any,
    title: str,
    adapter_name: str,
    *,
    trigger_phrase: str = "",
    training: Mapping[str, Any] | None = None,
    base_model: str | None = None,
    dtype: torch.dtype = torch.float16,
) -> ConceptFile:
    """What `save_atoms` writes to a file of this title, for an adapter of atoms.

    Raises:
        UserError: as for `save_atoms`, or its `select_budget` has no room for a layer.
    """
    models = pipeline_models(pipe)
    configs, tokens = _configs(models, adapter_name), _tokens(pipe, adapter_name)
    if not configs and not tokens:
        raise UserError(f"there is no concept {adapter_name!r} to save; there are: {name_concepts(pipe)}")
    _check_one_file(adapter_name, configs)
    budget = file_budget(configs.values())
    layers, fingerprints = read_atoms(adapter_name, models, configs)
    concept = ConceptFile(
        config=next(iter(configs.values()), AtomConfig()),
        layers=layers,
        fingerprint=fingerprints,
        tokens=tokens,
        base_model=str(getattr(pipe.config, "_name_or_path", "") or "") if base_model is None else base_model,
        trigger_phrase=trigger_phrase,
        training=dict(training or {}),
        modelspec=model_spec(pipe, title=title, trigger_phrase=trigger_phrase),
        atomdiff_version=atomdiff_version(),
    )
    scores = {
        f"{component}.{score.path}": float(score.parameter.detach())
        for component in configs
        for score in layer_scores(models[component], adapter_name)
    }
    return choose_layers(concept, scores, budget, dtype) if scores else concept


def _configs(models: Mapping[str, nn.Module], adapter_name: str) -> dict[str, Any]:
    """Component -> settings of an adapter, of the components that have it."""
    return {
        component: adapter_state.adapter_configs(model)[adapter_name]
        for component, model in models.items()
        if has_adapter(model, adapter_name)
    }


def _tokens(pipe: Any, adapter_name: str) -> dict[str, Any]:
    """The tokens of a concept, and those that were added by hand."""
    return {
        token: entry.vectors
        for token, entry in tokens_in(pipe).items()
        if entry.vectors and entry.owner in (None, adapter_name)
    }


def _check_one_file(adapter_name: str, configs: Mapping[str, AtomConfig]) -> None:
    """Refuse adapters that one concept file cannot hold."""
    settings = [config.shaping() for config in configs.values()]
    if any(other != settings[0] for other in settings):
        raise UserError(
            f"{adapter_name!r} has other atoms in {' than in '.join(configs)}, but a file holds one AtomConfig: "
            "add the adapter to all of them with the same num_atoms, basis and channel blocks"
        )
    for config in configs.values():
        if config.modules_to_save:
            raise UserError(
                f"{adapter_name!r} trains whole modules ({config.modules_to_save}), and a concept file holds atoms and "
                "token embeddings only: save it with PEFT's save_pretrained, or leave modules_to_save out"
            )


def read_atoms(
    adapter_name: str, models: Mapping[str, nn.Module], configs: Mapping[str, AtomConfig]
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """The tensors of an atom adapter by module path, and the fingerprints of their base weights.

    Raises:
        UserError: a weight cannot be read where it is.
    """
    layers, fingerprints = {}, {}
    for component, config in configs.items():
        of_model = adapter_state.atom_tensors(models[component], adapter_name)
        check_readable(models[component], of_model)
        weights = adapter_state.base_weights(models[component])
        for module, tensors in of_model.items():
            layers[f"{component}.{module}"] = tensors
            fingerprints[f"{component}.{module}"] = fingerprint(weights[module], config, module)
    return layers, fingerprints
