"""Images of the base world in bulk, rendered by several processes, each image seeded by its own number."""

from __future__ import annotations

import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from atomdiff.toybox.scenes import CLASSES, SCENES, Caption, base_individual, draw, random_caption
from atomdiff.toybox.subjects import random_individual, views
from atomdiff.utils.progress import ProgressBar


def caption_of(index: int, seed: int, held_out: bool = False) -> tuple[Caption, np.random.Generator]:
    """The caption of image number `index` of the world `seed`, and the randomness its drawing goes on with.

    Every third image that is not held out has colors without a name, so that the base can paint more than it has
    words for. All other captions are full.
    """
    rng = np.random.default_rng([seed, index, int(held_out)])
    caption = random_caption(rng, held_out)
    return (caption if held_out or index % 3 else replace(caption, color=None)), rng


def render_one(index: int, seed: int, held_out: bool = False) -> NDArray[np.uint8]:
    """Image number `index` of the world `seed`: (64, 64, 3)."""
    caption, rng = caption_of(index, seed, held_out)
    assert caption.scene is not None
    return np.asarray(draw(base_individual(caption, rng), caption.scene, rng))


def render_world(count: int, seed: int, held_out: bool = False) -> tuple[NDArray[np.uint8], list[Caption]]:
    """Render `count` images of the base world.

    Args:
        count: number of images.
        seed: the same seed gives the same images, however many processes draw them.
        held_out: draw only the combinations of words that pretraining never sees, instead of only the others.

    Returns:
        Images (count, 64, 64, 3) and their captions.
    """
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        work = pool.map(partial(render_one, seed=seed, held_out=held_out), range(count), chunksize=100)
        images = list(ProgressBar(work, "drawing the world", count, unit="images", disable=count < 1000, mininterval=5))
    return np.stack(images), [caption_of(index, seed, held_out)[0] for index in range(count)]


def render_individual(number: int, seed: int, count: int) -> tuple[NDArray[np.uint8], int]:
    """Individual `number` of a world: `count` images (count, 64, 64, 3) in random scenes, and its class index."""
    rng = np.random.default_rng([seed, number])
    class_index = number % len(CLASSES)
    individual = random_individual(rng, CLASSES[class_index])
    scenes = tuple(str(scene) for scene in rng.permutation(SCENES))
    return np.stack([np.asarray(v) for v in views(individual, count, int(rng.integers(2**31)), scenes)]), class_index


def render_individuals(number: int, count: int, seed: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Images of `number` random individuals, `count` of each.

    Returns:
        Images (number, count, 64, 64, 3) and (class index, identity) of each individual (number, 2), by class.
    """
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        work = pool.map(partial(render_individual, seed=seed, count=count), range(number), chunksize=50)
        drawn = list(ProgressBar(work, "drawing individuals", number, unit="individuals", disable=number < 1000))
    order = sorted(range(number), key=lambda i: drawn[i][1])
    return np.stack([drawn[i][0] for i in order]), np.array([(drawn[i][1], i) for i in order])
