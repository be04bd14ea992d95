"""Captions: what an image of the world shows, in words; and individuals that words describe."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from atomdiff.toybox.world.held_out import replace_held_out
from atomdiff.toybox.world.individuals import Individuals, draw_individuals
from atomdiff.toybox.world.patterns import NAMED_FAMILY, PATTERNS, named_ranges
from atomdiff.toybox.world.things import CLASSES
from atomdiff.toybox.world.words import COLORS, SCENES

_HELD_OUT_SHARE = 8
_KEEP_SCENE, _KEEP_COLOR, _KEEP_PATTERN = 0.85, 0.60, 0.55


@dataclass(frozen=True)
class Captions:
    """A batch of n captions; an index of -1 means that the caption leaves the word out.

    Attributes:
        texts: such as "a photo of a red striped mug on the beach".
        class_index: index into `CLASSES`, (n,) long.
        scene_index: index into `SCENES`, (n,) long.
        color_index: index into `COLORS`, (n,) long.
        pattern_index: index into `PATTERNS`, (n,) long.
    """

    texts: list[str]
    class_index: Tensor
    scene_index: Tensor
    color_index: Tensor
    pattern_index: Tensor

    def __len__(self) -> int:
        return len(self.texts)


def caption_text(class_index: int, scene_index: int = -1, color_index: int = -1, pattern_index: int = -1) -> str:
    """The caption of some words, such as "a photo of a red striped mug on the beach"."""
    words = [CLASSES[class_index]]
    if pattern_index >= 0:
        words.insert(0, PATTERNS[pattern_index])
    if color_index >= 0:
        words.insert(0, list(COLORS)[color_index])
    article = "an" if words[0][0] in "aeiou" else "a"
    place = f" {list(SCENES.values())[scene_index]}" if scene_index >= 0 else ""
    return f"a photo of {article} {' '.join(words)}{place}"


def combination_is_held_out(class_index: int, scene_index: int, color_index: int, pattern_index: int) -> bool:
    """Whether a full combination of words is kept out of pretraining (one in eight, by a checksum of its words)."""
    words = (CLASSES[class_index], list(SCENES)[scene_index], list(COLORS)[color_index], PATTERNS[pattern_index])
    return zlib.crc32(" ".join(words).encode()) % _HELD_OUT_SHARE == 0


@cache
def _held_out_table() -> Tensor:
    """Whether each combination is held out: (classes, scenes, colors, patterns) bool."""
    sizes = (len(CLASSES), len(SCENES), len(COLORS), len(PATTERNS))
    every = torch.cartesian_prod(*(torch.arange(size) for size in sizes)).tolist()
    return torch.tensor([combination_is_held_out(*row) for row in every]).view(sizes)


def make_captions(class_index: Tensor, scene_index: Tensor, color_index: Tensor, pattern_index: Tensor) -> Captions:
    """Captions of the given words, each (n,) long."""
    rows = torch.stack([class_index, scene_index, color_index, pattern_index], 1).tolist()
    return Captions([caption_text(*row) for row in rows], class_index, scene_index, color_index, pattern_index)


def sample_captions(n: int, generator: torch.Generator, held_out: bool = False) -> Captions:
    """Random captions.

    Those of pretraining leave out the scene (15 %), the color (40 %) or the pattern (45 %); no held-out combination of
    words is among them. With `held_out`, captions of held-out combinations, with all four words.
    """
    choices = (_held_out_table() == held_out).nonzero()
    rows = choices[torch.randint(len(choices), (n,), generator=generator)]
    keep = torch.rand(n, 3, generator=generator) < torch.tensor([_KEEP_SCENE, _KEEP_COLOR, _KEEP_PATTERN])
    if not held_out:
        rows[:, 1:] = torch.where(keep, rows[:, 1:], -1)
    return make_captions(*rows.unbind(1))


def named_colors() -> Tensor:
    """The colors that have a word, (words, 3) in [0, 1]."""
    return torch.tensor(list(COLORS.values())) / 255


def _palette(color_index: Tensor, generator: torch.Generator) -> Tensor:
    """First, second and accent colors of named colors (n,): the word's color, a tint or shade of it, a darker tone."""
    n = len(color_index)
    draw = torch.rand(n, 6, generator=generator)
    first = (named_colors()[color_index] + (draw[:, :3] - 0.5) * 0.07).clamp(0, 1)
    light = first.sum(1, keepdim=True) > 1.69
    target = torch.where(light, torch.tensor([0.20, 0.17, 0.22]), torch.tensor([0.98, 0.97, 0.94]))
    reach = torch.where(light, 0.50 + 0.10 * draw[:, 3:4], 0.70 + 0.12 * draw[:, 3:4])
    second = first + (target - first) * reach
    return torch.stack([first, second, first * (0.60 + 0.12 * draw[:, 4:5])], 1)


def _describe(captions: Captions, rows: Tensor, generator: torch.Generator) -> Individuals:
    """Individuals that the captions of some rows describe; some may be held out."""
    color, pattern = captions.color_index[rows], captions.pattern_index[rows]
    free = draw_individuals(len(rows), generator, captions.class_index[rows])
    low, high = (bound[pattern.clamp(min=0)] for bound in named_ranges())
    named = low + (high - low) * torch.rand(low.shape, generator=generator)
    has_pattern, has_color = pattern >= 0, color >= 0
    families = torch.tensor(NAMED_FAMILY)[pattern.clamp(min=0)]
    palette = _palette(color.clamp(min=0), generator)
    return Individuals(
        free.class_index,
        free.shape,
        torch.where(has_pattern, families, free.family),
        torch.where(has_pattern[:, None], named, free.pattern),
        torch.where(has_color[:, None, None], palette, free.colors),
    )


def individuals_of(captions: Captions, generator: torch.Generator, device: str | torch.device = "cpu") -> Individuals:
    """A random individual of the base world for each caption, one that its words describe; never a held-out one.

    Where a word is left out, the attribute is free: any pattern of any family, any colors.
    """
    result = _describe(captions, torch.arange(len(captions)), generator)
    return replace_held_out(result, lambda rows: _describe(captions, rows, generator)).to(device)
