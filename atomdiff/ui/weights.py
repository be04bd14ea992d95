"""Sliders of a concept's weight: in all, by block and over the steps; the tag in the prompt says where they stand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from atomdiff.concepts.library import ConceptLibrary
from atomdiff.pipelines.adapter_weight import AdapterWeight, block_path
from atomdiff.pipelines.prompt_syntax import set_tag, split_tags
from atomdiff.sampling.concept_source import library_source
from atomdiff.utils.errors import UserError

WEIGHT = "weight"
"""The slider of the whole weight."""
RANGE = (0.0, 1.5)
"""The ends of every slider."""
BLOCKS = {
    "down": "Down blocks",
    "mid": "Middle block",
    "up": "Up blocks",
    "text_encoder": "Text encoder",
    "text_encoder_2": "Second text encoder",
}
"""Sliders of blocks, by what tags call them -> label."""
ENDS = {"first": ("First step", 0.0), "last": ("Last step", 1.0)}
"""Sliders over the steps -> label, and share of the steps that are done."""


def sliders_of(library: ConceptLibrary, name: str) -> dict[str, str]:
    """Return the further sliders that a concept can have -> label: for blocks in which it has layers, and the steps.

    Raises:
        UserError: its file cannot be read.
    """
    source = library_source(library, name)
    if not source.is_atoms:
        return {}
    labels = {}
    for block, label in BLOCKS.items():
        try:
            source.check_weight(AdapterWeight(blocks={block: 1.0}))
            labels[block] = label
        except UserError:  # it has no layer there
            continue
    return {**labels, **{end: label for end, (label, _) in ENDS.items()}}


def position(weight: AdapterWeight, slider: str) -> float:
    """Return where a slider stands."""
    if slider == WEIGHT:
        return weight.weight
    if slider in ENDS:
        return replace(weight, weight=1.0).at_step(ENDS[slider][1]).weight
    return weight.blocks.get(block_path(slider), 1.0)


def move(prompt: str, name: str, slider: str, value: float) -> str:
    """Return a prompt in whose tag of a concept a slider stands at a value; the rest of the tag stays.

    Args:
        prompt: with the tag, or without: it is added.
        name: of the concept.
        slider: `WEIGHT`, or one of `BLOCKS` or `ENDS`.
        value: beyond `RANGE` its nearest end, as the slider's number box has it once it is left.

    Raises:
        UserError: the prompt's tags cannot be read.
    """
    weight = split_tags(prompt)[1].get(name, AdapterWeight())
    value = min(max(value, RANGE[0]), RANGE[1])
    if slider == WEIGHT:
        weight = replace(weight, weight=value)
    elif slider in ENDS:
        ends = {share: position(weight, end) for end, (_, share) in ENDS.items()}
        steps = {**ends, **weight.steps, ENDS[slider][1]: value}
        weight = replace(weight, steps=steps if any(factor != 1 for factor in steps.values()) else {})
    else:
        blocks = {**weight.blocks, block_path(slider): value}
        weight = replace(weight, blocks={block: factor for block, factor in blocks.items() if factor != 1})
    return set_tag(prompt, name, tag_value(weight))


def scaled(weight: AdapterWeight, share: float) -> AdapterWeight:
    """Return a weight times a number."""
    return replace(weight, weight=round(weight.weight * share, 4))


def tag_value(weight: AdapterWeight) -> float | dict[str, Any]:
    """Return a weight as a tag has it, with the short names of blocks."""
    if weight.is_plain:
        return weight.weight
    factors = {
        "blocks": {_short_path(block): _short(factor) for block, factor in weight.blocks.items()},
        "steps": {f"{share:g}": _short(weight.steps[share]) for share in sorted(weight.steps)},
    }
    value = {"weight": _short(weight.weight), **{name: each for name, each in factors.items() if each}}
    return value | ({"keep": _short(weight.keep)} if weight.keep != 1 else {})


def _short_path(path: str) -> str:
    """Return what tags call a block: `up.1` for `up_blocks.1`."""
    for block in BLOCKS:
        if f"{path}.".startswith(f"{block_path(block)}."):
            return block + path[len(block_path(block)) :]
    return path


def _short(number: float) -> float:
    return int(number) if float(number).is_integer() else number
