"""Images of subjects: five to learn from, and others, in other views, to compare with."""

from __future__ import annotations

import zlib
from pathlib import Path

import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from atomdiff.toybox.world.renderer import IMAGE_SIZE, Rendering, render
from atomdiff.toybox.world.subjects import SUBJECTS, TUNING_SUBJECTS
from atomdiff.toybox.world.views import sample_views
from atomdiff.toybox.world.words import SCENES

NUM_TRAINING_IMAGES = 5
NUM_UNSEEN_IMAGES = 2 * len(SCENES)


def to_images(images: Tensor) -> list[Image.Image]:
    """Images (n, 3, h, w) in [0, 1] as RGB images."""
    pixels = rearrange(images.clamp(0, 1) * 255, "n c h w -> n h w c").round().to(torch.uint8).cpu()
    return [Image.fromarray(image.numpy()) for image in pixels]


def subject_images(name: str, unseen: bool = False, size: int = IMAGE_SIZE) -> tuple[Rendering, Tensor]:
    """The images of a subject, always the same: five to train on, in different scenes, or sixteen others.

    Args:
        name: of an evaluation or tuning subject.
        unseen: the others, two in each scene, instead of those to train on.
        size: pixels a side.

    Returns:
        The rendering, and the scene of each image as an index into `SCENES` (n,).

    Raises:
        KeyError: there is no subject of that name.
    """
    subject = {**SUBJECTS, **TUNING_SUBJECTS}[name]
    generator = torch.Generator().manual_seed(zlib.crc32(f"{name} {'unseen' if unseen else 'training'}".encode()))
    if unseen:
        scenes = torch.arange(NUM_UNSEEN_IMAGES) % len(SCENES)
    else:
        scenes = torch.randperm(len(SCENES), generator=generator)[:NUM_TRAINING_IMAGES]
    views = sample_views(len(scenes), generator, scene_index=scenes)
    return render(subject.repeat(len(scenes)), views, size), scenes


def write_subject_images(folder: Path, names: tuple[str, ...] = tuple(SUBJECTS)) -> None:
    """Write `folder/<subject>/training/0.png` and so on, and `folder/<subject>/unseen/00.png` and so on."""
    for name in names:
        for kind in ("training", "unseen"):
            target = folder / name.replace(" ", "-") / kind
            target.mkdir(parents=True, exist_ok=True)
            images = to_images(subject_images(name, kind == "unseen")[0].images)
            for index, image in enumerate(images):
                image.save(target / f"{index:02d}.png")
