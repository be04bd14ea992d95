"""The words of the world's captions: classes, scenes, colors and patterns."""

from __future__ import annotations

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (215, 35, 40),
    "orange": (245, 130, 30),
    "yellow": (250, 215, 40),
    "green": (50, 165, 65),
    "blue": (40, 85, 205),
    "purple": (130, 50, 170),
    "pink": (250, 140, 185),
    "brown": (120, 72, 38),
    "gray": (135, 138, 145),
    "black": (42, 42, 50),
    "white": (242, 242, 240),
}

SCENES: dict[str, str] = {
    "beach": "on the beach",
    "forest": "in the forest",
    "desert": "in the desert",
    "snow": "in the snow",
    "city": "in the city",
    "kitchen": "in the kitchen",
    "space": "in space",
    "sea": "under the sea",
}
