"""Images of subjects: five to learn from, and others, in other views, to compare with."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from pathlib import Path

import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from atomdiff.toybox.world.individuals import Individuals
from atomdiff.toybox.world.renderer import IMAGE_SIZE, Rendering, render
from atomdiff.toybox.world.subjects import SUBJECTS, TUNING_SUBJECTS
from atomdiff.toybox.world.things import CLASSES
from atomdiff.toybox.world.views import sample_views
from atomdiff.toybox.world.words import SCENES
from atomdiff.utils.atomic import new_folder

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


def write_subject_images(folder: Path, subjects: Mapping[str, Individuals]) -> None:
    """Write the images of each subject to a folder named like its class: `<class>/01.png` and `<class>/unseen/01.png`.

    Args:
        folder: where the folders go; those of the same names are replaced.
        subjects: evaluation or tuning subjects, no two of one class.
    """
    for name, subject in subjects.items():
        with new_folder(folder / CLASSES[int(subject.class_index)]) as target:
            for unseen in (False, True):
                kind = target / "unseen" if unseen else target
                kind.mkdir(exist_ok=True)
                for number, image in enumerate(to_images(subject_images(name, unseen)[0].images), start=1):
                    image.save(kind / f"{number:02d}.png", optimize=True)
