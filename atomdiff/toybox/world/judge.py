"""The judge of 128x128 images: names what an image shows, and embeds individuals: the same are near each other."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from atomdiff.toybox.judge import ImageJudge, Residual
from atomdiff.toybox.world import CLASSES, COLORS, IMAGE_SIZE, PATTERNS, SCENES

LABELS: dict[str, tuple[str, ...]] = {
    "class": tuple(CLASSES),
    "scene": tuple(SCENES),
    "color": tuple(COLORS),
    "pattern": tuple(PATTERNS),
}


class Judge(ImageJudge):
    """The judge of 128x128 images.

    Args:
        widths: channels at 64, 32, 16, 8 and 4 pixels a side.
        embedding: length of the embedding.
    """

    labels = LABELS
    image_size = IMAGE_SIZE

    def __init__(self, widths: tuple[int, ...] = (24, 48, 96, 160, 224), embedding: int = 96) -> None:
        super().__init__()
        levels: list[nn.Module] = []
        for before, after in zip((3, *widths), widths, strict=False):
            down = nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False)
            levels.append(nn.Sequential(down, nn.BatchNorm2d(after), nn.ReLU(), Residual(after)))
        self.levels = nn.ModuleList(levels)
        self.add_heads(2 * (widths[-1] + widths[-2]), 384, embedding)

    def features(self, images: Tensor) -> list[Tensor]:
        """Maps of every level, (n, c, side, side) at 64 to 4 pixels a side, of images (n, 3, 128, 128) in [-1, 1]."""
        maps = []
        for level in self.levels:
            images = level(images)
            maps.append(images)
        return maps

    def pooled(self, images: Tensor) -> Tensor:
        """(n, 3, 128, 128) -> features (n, f) of the last two levels."""
        pools = [pool for maps in self.features(images)[-2:] for pool in (maps.mean((2, 3)), maps.amax((2, 3)))]
        return torch.cat(pools, dim=1)
