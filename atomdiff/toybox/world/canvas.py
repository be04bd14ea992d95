"""Painting with signed distances: layers of shapes with anti-aliased edges, dark outlines and soft shading."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from atomdiff.toybox.world.distances import Value

RGB = tuple[int, int, int]
PART_KINDS = ("background", "body", "motif", "accent", "detail", "outline")
BODY, MOTIF, ACCENT, DETAIL, OUTLINE = 1, 2, 3, 4, 5
INK = (38, 32, 42)
INK_WIDTH = 0.019  # of an outline, in object units


@lru_cache(maxsize=4096)
def _constant(color: RGB, device: torch.device) -> Tensor:
    """A color as (1, 3, 1, 1); kept, since each copy to a GPU would wait for what runs there."""
    return torch.tensor(color, dtype=torch.float32).view(1, 3, 1, 1).div(255).to(device)


def paint_of(color: RGB | Tensor, like: Tensor) -> Tensor:
    """A color as (1 or n, 3, 1, 1) or, where it already varies, (n, 3, h, w)."""
    if isinstance(color, Tensor):
        return color if color.ndim == 4 else color[:, :, None, None]
    return _constant(color, like.device)


class ObjectCanvas:
    """Where the objects of one class are painted, in object coordinates: x to the right, y up, standing on y = 0.

    Args:
        x, y: coordinates (n, h, w).
        pixel: size of a pixel in object units (n, 1, 1).
        shape: shape parameters (n, S) in [0, 1].
        surface: the share of the second color (n, h, w).
        colors: first, second and accent color (n, 3, 3).
        side: where the light comes from, -1 (left) to 1 (right), (n, 1, 1).
        supersampling: pixels per pixel of the final image, a side; what the parts are is kept for the final pixels.
    """

    def __init__(
        self,
        x: Tensor,
        y: Tensor,
        pixel: Tensor,
        shape: Tensor,
        surface: Tensor,
        colors: Tensor,
        side: Tensor,
        supersampling: int,
    ) -> None:
        self.x, self.y, self.pixel, self._shape = x, y, pixel, shape
        first, second, self.accent = colors[:, :, :, None, None].unbind(1)
        self.body = torch.lerp(first, second, surface[:, None])  # (n, 3, h, w)
        step = self.supersampling = supersampling
        self._motif = torch.where(surface[:, ::step, ::step] > 0.5, float(MOTIF), float(BODY))
        toward = side * x + 0.35 * (y - 0.5)  # grows towards the light
        self._light, self._dim = 1.02 + 0.26 * toward, 1 - 1.1 * toward
        self._ink = paint_of(INK, x)
        self.rgb = self._ink.expand(x.shape[0], 3, *x.shape[1:]).clone()
        self.alpha, self.kind = torch.zeros_like(x), torch.zeros_like(self._motif)

    def p(self, index: int, low: float, high: float) -> Tensor:
        """Shape parameter `index` between `low` and `high`, (n, 1, 1)."""
        return low + (high - low) * self._shape[:, index, None, None]

    def paint(self, distance: Tensor, fill: str | RGB | Tensor, round_: float = 0.16, ink: float = INK_WIDTH) -> None:
        """Paint one part over what is there.

        Args:
            distance: signed distance to the part (n, h, w).
            fill: `"body"`, `"accent"`, an RGB triple, or colors (n, 3, 1, 1).
            round_: how much darker the part gets towards its edge, which makes it look round.
            ink: width of its outline; 0 for none.
        """
        edge = distance / self.pixel  # in pixels
        outer = (0.5 + ink / 2 / self.pixel - edge).clamp_(0, 1)
        inner = (0.5 - ink / 2 / self.pixel - edge).clamp_(0, 1) if ink else outer
        color = self.body if fill == "body" else self.accent if fill == "accent" else paint_of(fill, self.x)  # type: ignore[arg-type]
        shade = self._light
        if round_:
            rim = (1 + distance * 9).clamp_(0, 1)
            shade = torch.addcmul(shade, rim * rim, self._dim, value=-round_)
        if ink:
            self.rgb.lerp_(self._ink.expand_as(self.rgb), outer[:, None])
        self.rgb.lerp_(color * shade[:, None], inner[:, None])
        self.alpha = torch.maximum(self.alpha, outer)
        kind = self._motif if fill == "body" else float(ACCENT if fill == "accent" else DETAIL)
        step = self.supersampling
        if ink:
            self.kind = torch.where(outer[:, ::step, ::step] > 0.5, float(OUTLINE), self.kind)
        self.kind = torch.where(inner[:, ::step, ::step] > 0.5, kind, self.kind)

    def glow(self, distance: Tensor, color: RGB, opacity: Value, soft: float) -> None:
        """Lighten or darken what is there, fading over `soft` object units; a shine or a shadow, no part of its own."""
        weight = (0.5 - distance / soft).clamp_(0, 1)
        weight = weight * weight * (3 - 2 * weight) * opacity * self.alpha
        self.rgb.lerp_(paint_of(color, self.x).expand_as(self.rgb), weight[:, None])


class SceneCanvas:
    """Where scenes are painted: x to the right and y down, both from 0 to 1.

    Args:
        layout: random numbers of the scene (n, L) in [0, 1].
        size: pixels a side.
    """

    def __init__(self, layout: Tensor, size: int) -> None:
        axis = (torch.arange(size, device=layout.device, dtype=layout.dtype) + 0.5) / size
        self.x = axis.view(1, 1, size).expand(layout.shape[0], size, size)
        self.y = axis.view(1, size, 1).expand(layout.shape[0], size, size)
        self.pixel = 1 / size
        self._layout = layout
        self.rgb = torch.zeros(layout.shape[0], 3, size, size, device=layout.device, dtype=layout.dtype)

    def q(self, index: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        """Layout number `index` between `low` and `high`, (n, 1, 1)."""
        return low + (high - low) * self._layout[:, index % self._layout.shape[1], None, None]

    def mix(self, share: Tensor, one: RGB, other: RGB) -> Tensor:
        """Colors (n, 3, 1, 1) or (n, 3, h, w) between two, by a share (n, 1, 1) or (n, h, w)."""
        return torch.lerp(paint_of(one, share), paint_of(other, share), share[:, None])

    def gradient(self, top: RGB | Tensor, bottom: RGB | Tensor, start: Value = 0.0, end: Value = 1.0) -> Tensor:
        """Colors (n, 3, h, w) from `top` at y = start to `bottom` at y = end."""
        share = ((self.y - start) / (end - start)).clamp(0, 1)
        return torch.lerp(paint_of(top, share), paint_of(bottom, share), share[:, None])

    def fill(self, distance: Tensor, color: RGB | Tensor, opacity: Value = 1.0, soft: float = 1.0) -> None:
        """Paint a shape; its edge is `soft` pixels wide."""
        weight = (0.5 - distance / (soft * self.pixel)).clamp_(0, 1) * opacity
        self.rgb.lerp_(paint_of(color, self.x).expand_as(self.rgb), weight[:, None])

    def cover(self, color: RGB | Tensor) -> None:
        """Paint everything."""
        self.rgb = paint_of(color, self.x).expand_as(self.rgb).clone()
