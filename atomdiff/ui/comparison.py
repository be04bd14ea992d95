"""What the tab *Try* asks for: the images of a click, and prompts whose tags name the concepts that are chosen."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from atomdiff.pipelines.adapter_weight import AdapterWeight
from atomdiff.pipelines.prompt_syntax import has_word, set_tag, split_tags
from atomdiff.serving.image_request import ImageRequest
from atomdiff.ui.weights import scaled, tag_value
from atomdiff.utils.errors import UserError

SEEDS, BEFORE_AFTER, WEIGHTS, CHECKPOINTS = "Several seeds", "Before and after", "Several weights", "Checkpoints"
MODES = (SEEDS, BEFORE_AFTER, WEIGHTS, CHECKPOINTS)
_SHARES = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25)  # of the weights in the prompt
_MAX_COLUMNS = 6


@dataclass(frozen=True)
class Plan:
    """The images of a click, row by row."""

    requests: Mapping[str, ImageRequest]
    """Label -> what the engine is asked for."""
    columns: int
    """Images beside each other."""


def plan(request: ImageRequest, mode: str, seeds: Sequence[int], variants: Mapping[str, str] | None = None) -> Plan:
    """Return the images of a click.

    Args:
        request: with the prompt as written, perhaps with tags.
        mode: of `MODES`, what is compared.
        seeds: of the images; for comparisons each has a row.
        variants: label -> prompt, of the checkpoints that are compared.

    Raises:
        UserError: the prompt is empty, or there is nothing to compare.
    """
    text, weights = split_tags(request.prompt)
    if not text.strip():
        raise UserError("found no prompt; write what the image should show")
    if mode == SEEDS:
        return Plan({f"seed {seed}": replace(request, seed=seed) for seed in seeds}, 3)
    if mode == CHECKPOINTS:
        prompts = dict(variants or {})
        if len(prompts) < 2:
            raise UserError(f"found {len(prompts)} checkpoints; choose a training, and two or more of its steps")
    elif not weights:
        raise UserError("found no concept to compare; choose one above, or compare several seeds")
    elif mode == BEFORE_AFTER:
        prompts = {"base": text, "concepts": request.prompt}
    else:
        prompts = {f"weight x {share:g}": _scaled(request.prompt, weights, share) for share in _SHARES}
    requests = {
        f"seed {seed}, {label}": replace(request, prompt=prompt, seed=seed)
        for seed in seeds
        for label, prompt in prompts.items()
    }
    return Plan(requests, min(len(prompts), _MAX_COLUMNS))


def consecutive_seeds(first: float | None, count: int) -> range:
    """Return the seeds of images.

    Args:
        first: None: its number box is empty.
        count: how many.

    Raises:
        UserError: there is no first seed.
    """
    if first is None:
        raise UserError("found no first seed; write a whole number, 0 or more")
    return range(int(first), int(first) + count)


def checkpoint_prompts(prompt: str, concept: str, checkpoints: Mapping[str, str]) -> dict[str, str]:
    """Return the prompt with each checkpoint of a training, with the weight of the trained concept if it has its tag.

    Args:
        prompt: as written, perhaps with tags.
        concept: name of what was trained.
        checkpoints: label -> name of the checkpoint's concept.

    Raises:
        UserError: the prompt's tags cannot be read.
    """
    weight = tag_value(split_tags(prompt)[1].get(concept, AdapterWeight()))
    without = set_tag(prompt, concept, None)
    return {label: set_tag(without, name, weight) for label, name in checkpoints.items()}


def choose_concepts(prompt: str, chosen: Iterable[str], known: Iterable[str]) -> str:
    """Return a prompt whose tags name the concepts that are chosen; other tags than those of known concepts stay.

    Raises:
        UserError: the prompt's tags cannot be read, or cannot name a concept.
    """
    chosen, tagged = list(chosen), split_tags(prompt)[1]
    for name in known:
        if name in tagged and name not in chosen:
            prompt = set_tag(prompt, name, None)
    for name in chosen:
        if name not in tagged:
            if {*name} & {*"<>:"} or name != name.strip():
                raise UserError(f"no tag can name {name!r}, for its '<', '>', ':' or blanks; rename it under Library")
            prompt = set_tag(prompt, name, 1.0)
    return prompt


def add_phrase(prompt: str, phrase: str) -> str:
    """Return a prompt with a trigger phrase, before its tags, unless it has it already.

    Raises:
        UserError: the prompt's tags cannot be read.
    """
    text, weights = split_tags(prompt)
    if has_word(text, phrase):
        return prompt
    prompt = re.sub(r"\s+", " ", f"{text.rstrip()} {phrase}").strip() if text.strip() else f"a photo of {phrase}"
    for name, weight in weights.items():
        prompt = set_tag(prompt, name, tag_value(weight))
    return prompt


def _scaled(prompt: str, weights: Mapping[str, AdapterWeight], share: float) -> str:
    for name, weight in weights.items():
        prompt = set_tag(prompt, name, tag_value(scaled(weight, share)))
    return prompt
