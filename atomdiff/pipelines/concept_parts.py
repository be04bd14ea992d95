"""What a concept holds for a pipeline: read from any kind of file, without the parts that the pipeline cannot take."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from atomdiff.concepts import peft_folder
from atomdiff.concepts.compatibility import check_base, may_leave_out
from atomdiff.concepts.concept_file import DeltaFile, read_delta_file
from atomdiff.concepts.lora_file import is_lora_file, read_lora
from atomdiff.concepts.peft_folder import Adapters, Tokens
from atomdiff.pipelines.placeholder_tokens import fitting_tokens
from atomdiff.pipelines.scheduler import ScheduleConfig, trained_schedule
from atomdiff.tuner import attach
from atomdiff.utils.errors import UserError


@dataclass
class ConceptParts:
    """The parts of a concept that a pipeline takes."""

    delta: DeltaFile | None
    """Its atoms."""
    adapters: Adapters
    """Its adapters of other PEFT methods, or of atoms in directories written by PEFT."""
    tokens: Tokens
    """Its trigger words."""
    left_out: list[str]
    """What is left out, for a message."""
    schedule: ScheduleConfig | None
    """What it was trained to predict, as far as that is known."""


def read_parts(
    source: Path | DeltaFile, models: Mapping[str, nn.Module], denoiser: str, allow_mismatch: bool, stacklevel: int
) -> ConceptParts:
    """Read a concept and check it against the models of a pipeline.

    Args:
        source: a concept file, a LoRA file of another program, a directory written by PEFT, or a concept in memory.
        models: component -> model.
        denoiser: the component that denoises.
        allow_mismatch: see `check_base`.
        stacklevel: of the warning of a derived base.

    Raises:
        UserError: it is damaged, or does not fit.
    """
    if isinstance(source, Path) and source.is_dir():
        adapters, tokens, left_out = peft_folder.read(source, models, denoiser)
        return ConceptParts(None, adapters, tokens, left_out, trained_schedule(source))
    if isinstance(source, Path) and is_lora_file(source):
        adapters, left_out = read_lora(source, models, allow_mismatch)
        return ConceptParts(None, adapters, {}, left_out, None)
    delta = source if isinstance(source, DeltaFile) else read_delta_file(source)
    delta, left_out, _ = check_base(delta, models, allow_mismatch, stacklevel + 1)
    return ConceptParts(delta, {}, dict(delta.tokens), left_out, ScheduleConfig.read(delta.training))


def take_fitting_tokens(parts: ConceptParts, pipe: Any, allow_mismatch: bool) -> None:
    """Leave out the embeddings that a pipeline has no text encoders for.

    Raises:
        UserError: an embedding has another size than a text encoder takes, or nothing is left.
    """
    parts.tokens, left_out = fitting_tokens(pipe, parts.tokens, allow_mismatch)
    parts.left_out += left_out
    if parts.left_out and not (parts.tokens or parts.adapters or (parts.delta and parts.delta.layers)):
        raise UserError(f"nothing of it can be loaded into this pipeline: it has {'; '.join(parts.left_out)}")


def attach_parts(parts: ConceptParts, models: Mapping[str, nn.Module], name: str, allow_mismatch: bool) -> None:
    """Add the adapters of a concept to the models; layers that turn out not to fit are noted in `left_out`.

    Raises:
        ValueError: an adapter does not fit.
    """
    for component, model in models.items():
        if parts.delta is not None and (layers := _under(component, parts.delta.layers)):
            attach.attach_atoms(model, parts.delta.config, layers, name)
        elif component in parts.adapters:
            config, tensors = parts.adapters[component]
            gone = attach.attach_peft(model, config, tensors, name, lambda m: may_leave_out(m, allow_mismatch))
            parts.left_out += [f"{component}.{module}, which is another layer here" for module in gone]


def warn_of_left_out(name: str, left_out: list[str], stacklevel: int = 2) -> None:
    """Warn of what could not be loaded of a concept."""
    if left_out:
        warnings.warn(f"loaded {name!r} without {'; without '.join(left_out)}", stacklevel=stacklevel + 1)


def _under(component: str, layers: Mapping[str, Any]) -> dict[str, Any]:
    """The layers of one component, by path within it."""
    prefix = f"{component}."
    return {module.removeprefix(prefix): value for module, value in layers.items() if module.startswith(prefix)}
