"""The renderer: an individual thing of a class, seen once in a place, as a 64x64 image; deterministic from a seed."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from atomdiff.toybox.places import PLACES, Brush
from atomdiff.toybox.shapes import OBJECTS, PATTERNS, RGB, SUBJECT_COLORS, SUBJECT_PATTERNS, draw_part

COLORS: dict[str, RGB] = {
    "red": (215, 35, 40),
    "orange": (245, 130, 30),
    "yellow": (250, 215, 40),
    "green": (50, 165, 65),
    "blue": (40, 85, 205),
    "purple": (130, 50, 170),
    "pink": (250, 140, 185),
    "brown": (120, 72, 38),
    "black": (38, 38, 44),
    "white": (242, 242, 240),
}
CLASSES = tuple(OBJECTS)
SCENES = tuple(PLACES)

IMAGE_SIZE = 64
_CANVAS = 4 * IMAGE_SIZE
_OBJECT = 3 * IMAGE_SIZE
_HELD_OUT_SHARE = 8


@dataclass(frozen=True)
class Individual:
    """One particular thing: its class, its pattern and its two colors; the pattern's phase is part of it."""

    class_name: str
    pattern: str
    first: RGB
    second: RGB
    phase: tuple[float, float] = (0.0, 0.0)


@dataclass(frozen=True)
class Caption:
    """What an image of the base world shows, in words; None leaves the word out and the attribute open."""

    class_name: str
    scene: str | None = None
    color: str | None = None
    pattern: str | None = None

    def __str__(self) -> str:
        """The caption as the base model reads it, such as "a photo of a red striped mug on the beach"."""
        words = " ".join(word for word in (self.color, self.pattern, self.class_name) if word)
        article = "an" if words[0] in "aeiou" else "a"
        place = f" {PLACES[self.scene][0]}" if self.scene else ""
        return f"a photo of {article} {words}{place}"

    def is_held_out(self) -> bool:
        """Whether the full combination is kept out of pretraining (one in eight, by a checksum of its words)."""
        key = f"{self.class_name} {self.scene} {self.color} {self.pattern}"
        return zlib.crc32(key.encode()) % _HELD_OUT_SHARE == 0


def random_caption(rng: np.random.Generator, held_out: bool = False) -> Caption:
    """A full caption drawn evenly from the combinations of the base world, seen or held out in pretraining."""
    while True:
        caption = Caption(*(str(rng.choice(list(words))) for words in (CLASSES, SCENES, COLORS, PATTERNS)))
        if caption.is_held_out() == held_out:
            return caption


def shorten(caption: Caption, rng: np.random.Generator, keep: float = 0.8) -> Caption:
    """The caption with each of scene, color and pattern kept with probability `keep`."""
    scene, color, pattern = (
        word if rng.random() <= keep else None for word in (caption.scene, caption.color, caption.pattern)
    )
    return Caption(caption.class_name, scene, color, pattern)


def _contrast(color: RGB) -> RGB:
    """The second color of a pattern in the base world: a tint of dark colors, a shade of light ones."""
    light = sum(color) > 430
    target = (50, 45, 55) if light else (250, 248, 240)
    red, green, blue = (round(c + (t - c) * (0.55 if light else 0.75)) for c, t in zip(color, target, strict=True))
    return red, green, blue


def distance(one: RGB, other: RGB) -> int:
    """How far apart two colors are: the sum over channels, 0 to 765."""
    return sum(abs(a - b) for a, b in zip(one, other, strict=True))


def random_palette(rng: np.random.Generator) -> tuple[RGB, RGB]:
    """Two colors out of the whole cube, but for its darkest and lightest shell."""
    first, second = ((int(r), int(g), int(b)) for r, g, b in rng.integers(20, 250, (2, 3)))
    return first, second


def _open_palette(rng: np.random.Generator) -> tuple[RGB, RGB]:
    """Two clearly different colors, neither near one of the shipped subjects'."""
    while True:
        first, second = random_palette(rng)
        taken = min(distance(color, other) for color in (first, second) for other in SUBJECT_COLORS.values())
        if distance(first, second) > 180 and taken > 75:
            return first, second


def base_individual(caption: Caption, rng: np.random.Generator) -> Individual:
    """A random individual that the words of the caption describe; open words are drawn.

    Where no color is named, both colors are free. Its pattern has no phase of its own, so that the words say where on
    the object the pattern lies: with a phase drawn for each, all patterns would look the same on average, and the loss
    would hardly tell their words apart.
    """
    pattern = caption.pattern or str(rng.choice(list(PATTERNS)))
    if caption.color is None:
        return Individual(caption.class_name, pattern, *_open_palette(rng))
    red, green, blue = (int(c) for c in np.clip(np.add(COLORS[caption.color], rng.integers(-8, 9, 3)), 0, 255))
    return Individual(caption.class_name, pattern, (red, green, blue), _contrast((red, green, blue)))


def _paint_object(individual: Individual) -> Image.Image:
    """The individual alone, upright, as an RGBA image on a transparent ground, with a margin for what sticks out."""
    inner, margin = _OBJECT * 3 // 4, _OBJECT // 8
    v, u = np.mgrid[-margin : inner + margin, -margin : inner + margin] / inner
    rule = {**PATTERNS, **SUBJECT_PATTERNS}[individual.pattern]
    shows = rule(u + individual.phase[0], v + individual.phase[1])
    light = (1.1 - 0.3 * u)[..., None]
    body = np.where(shows[..., None], individual.second, individual.first) * light
    texture = Image.fromarray(np.clip(body, 0, 255).astype(np.uint8))
    red, green, blue = (round(0.68 * c) for c in individual.first)
    layer = Image.new("RGBA", texture.size)
    for part in OBJECTS[individual.class_name]:
        shifted = part._replace(points=tuple((p * inner + margin) / inner for p in part.points))
        if part.paint == "body":
            mask = Image.new("L", layer.size)
            draw_part(ImageDraw.Draw(mask), shifted, inner, 255, None)
            layer.paste(texture, (0, 0), mask)
            draw_part(ImageDraw.Draw(layer), shifted, inner, None, (35, 32, 40))
        else:
            fill = (red, green, blue) if part.paint == "accent" else part.paint
            draw_part(ImageDraw.Draw(layer), shifted, inner, fill, (35, 32, 40))
    return layer


def draw(individual: Individual, scene: str, rng: np.random.Generator) -> Image.Image:
    """An image of the individual in the place: random position, size, tilt, mirror and light.

    Returns:
        An RGB image of 64x64 pixels, drawn at four times that size.
    """
    brush = Brush(_CANVAS, rng)
    PLACES[scene][1](brush)
    thing = _paint_object(individual)
    if rng.random() < 0.5:
        thing = thing.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    side = rng.uniform(0.64, 0.82) * _CANVAS
    thing = thing.resize((round(side / 0.75),) * 2, Image.Resampling.BILINEAR)
    thing = thing.rotate(rng.uniform(-9, 9), Image.Resampling.BILINEAR)
    x, foot = rng.uniform(0.42, 0.58) * _CANVAS, rng.uniform(0.88, 0.95) * _CANVAS
    shadow = Image.new("L", brush.image.size)
    extent = (x - 0.46 * side, foot - 0.06 * side, x + 0.46 * side, foot + 0.05 * side)
    ImageDraw.Draw(shadow).ellipse(extent, fill=90)
    brush.image.paste((10, 10, 25), (0, 0), shadow)
    brush.image.paste(thing, (round(x - thing.width / 2), round(foot - 0.875 * thing.height)), thing)
    small = brush.image.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BOX)
    light = rng.uniform(0.86, 1.08) * (1 + rng.uniform(-0.05, 0.05) * np.array([1.0, 0.0, -1.0]))
    return Image.fromarray(np.clip(np.asarray(small) * light, 0, 255).astype(np.uint8))
