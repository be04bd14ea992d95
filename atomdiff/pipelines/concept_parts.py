"""What a concept holds for a pipeline: read from any kind of file, without the parts that the pipeline cannot take."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from atomdiff.bases.find import find_base
from atomdiff.concepts import peft_folder
from atomdiff.concepts.compatibility import check_base, may_leave_out
from atomdiff.concepts.concept_file import ConceptFile, read_concept_file
from atomdiff.concepts.lora_file import is_lora_file, read_lora
from atomdiff.concepts.peft_folder import Adapters, Tokens
from atomdiff.pipelines.models import pipeline_models
from atomdiff.pipelines.placeholder_tokens import fitting_tokens
from atomdiff.pipelines.scheduler import ScheduleConfig, trained_schedule
from atomdiff.pipelines.token_names import rename_tokens
from atomdiff.tuner import attach
from atomdiff.utils.errors import UserError, warn


@dataclass
class ConceptParts:
    """The parts of a concept that a pipeline takes."""

    concept: ConceptFile | None
    """Its atoms."""
    adapters: Adapters
    """Its adapters of other PEFT methods, or of atoms in directories written by PEFT."""
    tokens: Tokens
    """Its trigger words."""
    left_out: list[str]
    """What is left out, for a message."""
    schedule: ScheduleConfig | None
    """What it was trained to predict, as far as that is known."""


def read_parts(pipe: Any, source: Path | ConceptFile, trigger_word: str | None, allow_mismatch: bool) -> ConceptParts:
    """Read a concept of any kind, check it against a pipeline, and leave out what the pipeline has no text encoder for.

    Raises:
        UserError: it is damaged, or does not fit, or nothing is left, or it has not exactly one word to rename.
    """
    parts = _read(source, pipeline_models(pipe), allow_mismatch)
    renamed = rename_tokens(parts.tokens, trigger_word)
    parts.tokens, left_out = fitting_tokens(pipe, renamed, allow_mismatch)
    parts.left_out += left_out
    if parts.left_out and not (parts.tokens or parts.adapters or (parts.concept and parts.concept.layers)):
        raise UserError(f"nothing of it can be loaded into this pipeline: it has {'; '.join(parts.left_out)}")
    return parts


def _read(source: Path | ConceptFile, models: Mapping[str, nn.Module], allow_mismatch: bool) -> ConceptParts:
    if isinstance(source, Path) and source.is_dir():
        adapters, tokens, left_out = peft_folder.read(source, models, find_base(models).denoiser)
        return ConceptParts(None, adapters, tokens, left_out, trained_schedule(source))
    if isinstance(source, Path) and is_lora_file(source):
        adapters, left_out = read_lora(source, models, allow_mismatch)
        return ConceptParts(None, adapters, {}, left_out, None)
    concept = source if isinstance(source, ConceptFile) else read_concept_file(source)
    concept, left_out = check_base(concept, models, allow_mismatch)
    return ConceptParts(concept, {}, dict(concept.tokens), left_out, ScheduleConfig.read(concept.training))


def attach_parts(parts: ConceptParts, models: Mapping[str, nn.Module], name: str, allow_mismatch: bool) -> None:
    """Add the adapters of a concept to the models; layers that turn out not to fit are noted in `left_out`.

    Raises:
        ValueError: an adapter does not fit.
    """
    for component, model in models.items():
        if parts.concept is not None and (layers := _under(component, parts.concept.layers)):
            attach.attach_atoms(model, parts.concept.config, layers, name)
        elif component in parts.adapters:
            config, tensors = parts.adapters[component]
            unfit = attach.attach_peft(model, config, tensors, name, lambda m: may_leave_out(m, allow_mismatch))
            parts.left_out += [f"{component}.{module}, which is another layer here" for module in unfit]


def warn_of_left_out(name: str, left_out: list[str]) -> None:
    """Warn of what could not be loaded of a concept."""
    if left_out:
        warn(f"loaded {name!r} without {'; without '.join(left_out)}")


def _under(component: str, layers: Mapping[str, Any]) -> dict[str, Any]:
    """The layers of one component, by path within it."""
    prefix = f"{component}."
    return {module.removeprefix(prefix): value for module, value in layers.items() if module.startswith(prefix)}
