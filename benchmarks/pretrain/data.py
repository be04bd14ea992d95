"""The images that the networks learn from, rendered on the device they train on."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from einops import rearrange
from torch import Tensor

from atomdiff.toybox.world import (
    CLASSES,
    FAMILY_NAMES,
    IMAGE_SIZE,
    SCENES,
    Individuals,
    draw_individuals,
    individuals_of,
    render,
    sample_captions,
    sample_views,
)
from atomdiff.toybox.world.held_out import is_near
from atomdiff.toybox.world.subjects import all_subjects

if TYPE_CHECKING:
    from transformers import CLIPTokenizer


@dataclass
class World:
    """Captioned images: bytes (n, 3, 128, 128), masks (n, 1, 16, 16), labels by kind (n,), texts."""

    images: Tensor
    masks: Tensor
    labels: dict[str, Tensor]
    texts: list[str]


def as_bytes(images: Tensor) -> Tensor:
    """Images in [0, 1] as bytes."""
    return (images * 255).round().clamp(0, 255).to(torch.uint8)


def as_signal(images: Tensor) -> Tensor:
    """Bytes (n, 3, h, w) as floats in [-1, 1], channels last in memory."""
    return (images.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)


def render_world(
    count: int, seconds: float, seed: int, device: torch.device, batch: int = 512, held_out: bool = False
) -> World:
    """Captioned images, at most `count` and no more than fit into the seconds.

    Args:
        count: most images.
        seconds: after that long no batch is begun.
        seed: of captions, individuals and views.
        device: where they are rendered and kept.
        batch: images rendered at once.
        held_out: captions kept out of pretraining instead of those for it.
    """
    generator = torch.Generator().manual_seed(seed)
    begin, masks = time.perf_counter(), []
    texts: list[str] = []
    images = torch.empty(count, 3, IMAGE_SIZE, IMAGE_SIZE, dtype=torch.uint8, device=device)
    labels: dict[str, list[Tensor]] = {"class": [], "scene": [], "color": [], "pattern": []}
    while len(texts) < count and time.perf_counter() - begin < seconds:
        captions = sample_captions(min(batch, count - len(texts)), generator, held_out=held_out)
        individuals = individuals_of(captions, generator, device)
        scenes = captions.scene_index
        scenes = torch.where(scenes < 0, torch.randint(len(SCENES), scenes.shape, generator=generator), scenes)
        views = sample_views(len(captions.texts), generator, device, scene_index=scenes)
        picture = render(individuals, views, supersampling=1)  # 48 dB from two, and twice as fast
        images[len(texts) : len(texts) + len(captions)] = as_bytes(picture.images)
        masks.append(torch.nn.functional.adaptive_avg_pool2d(picture.mask, 16).half())
        texts += captions.texts
        for kind, known in zip(
            labels,
            (captions.class_index, captions.scene_index, captions.color_index, captions.pattern_index),
            strict=True,
        ):
            labels[kind].append(known.to(device))
    print(f"rendered {len(texts)} images in {time.perf_counter() - begin:.0f} s", flush=True)
    return World(images[: len(texts)], torch.cat(masks), {k: torch.cat(v) for k, v in labels.items()}, texts)


def relatives(originals: Individuals, donors: Individuals) -> list[Individuals]:
    """Individuals that differ from the originals in one thing: shape, pattern or colors, taken from the donors."""
    changed = []
    for names in (("shape",), ("family", "pattern"), ("colors",)):
        fields = {
            name: getattr(donors if name in names else originals, name)
            for name in ("class_index", "shape", "family", "pattern", "colors")
        }
        changed.append(Individuals(**fields))
    return changed


def _unlike_subjects(classes: Tensor, generator: torch.Generator) -> Individuals:
    """Individuals of the classes (n,), of any family and color, but none like one of the subjects."""
    families = torch.randint(len(FAMILY_NAMES), classes.shape, generator=generator)
    result = draw_individuals(len(classes), generator, classes, families)
    while (again := is_near(result, all_subjects())).any():
        rows = again.nonzero()[:, 0]
        fresh = draw_individuals(len(rows), generator, classes[rows], families[rows])
        for name in ("shape", "pattern", "colors"):
            getattr(result, name)[rows] = getattr(fresh, name)
    return result


def render_families(
    count: int, seconds: float, seed: int, device: torch.device, views: int = 3, batch: int = 64
) -> Tensor:
    """Images (k, 4, views, 3, 128, 128) of individuals and their relatives, each with its own views, as bytes.

    The four of a row are an individual and three that differ from it in shape, pattern or colors alone.
    """
    generator = torch.Generator().manual_seed(seed)
    begin = time.perf_counter()
    rows: list[Tensor] = []
    while sum(map(len, rows)) < count and time.perf_counter() - begin < seconds:
        n = min(batch, count)
        classes = torch.randint(len(CLASSES), (n,), generator=generator)
        pair = [_unlike_subjects(classes, generator).to(device) for _ in range(2)]
        images = []
        for relative in (pair[0], *relatives(*pair)):
            for _ in range(views):
                images.append(as_bytes(render(relative, sample_views(n, generator, device), supersampling=1).images))
        rows.append(rearrange(torch.stack(images), "(r v) n c h w -> n r v c h w", v=views))
    print(f"rendered {sum(map(len, rows))} families in {time.perf_counter() - begin:.0f} s", flush=True)
    return torch.cat(rows)


def token_ids(tokenizer: CLIPTokenizer, texts: list[str], device: torch.device) -> Tensor:
    """Token ids (n, tokens) of texts; the last row stands for the empty prompt."""
    ids: Tensor = tokenizer([*texts, ""], padding="max_length", truncation=True, return_tensors="pt").input_ids
    return ids.to(device)
