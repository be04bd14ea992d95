"""Scenes without an open sky: kitchen, space, under the sea."""

from __future__ import annotations

import torch

from atomdiff.toybox.world.canvas import SceneCanvas
from atomdiff.toybox.world.distances import box, circle, ellipse, length, line
from atomdiff.toybox.world.scatter import columns, grid
from atomdiff.toybox.world.scenes_outside import hills


def kitchen(s: SceneCanvas) -> None:
    """A tiled wall with a window, a shelf with jars, and a wooden worktop."""
    tone, edge = s.q(0), 0.68
    s.cover(
        s.gradient(
            s.mix(tone, (248, 232, 204), (214, 232, 226)), s.mix(tone, (232, 208, 172), (190, 214, 210)), 0.0, edge
        )
    )
    rows = (s.y + s.q(1) * 0.1) * 9
    shift = 0.5 * torch.remainder(rows.floor(), 2)
    joint = torch.minimum(
        0.5 - (torch.remainder(s.x * 5 + s.q(2) + shift, 1) - 0.5).abs(),
        (0.5 - (torch.remainder(rows, 1) - 0.5).abs()) * 5 / 9,
    )
    tiles = torch.maximum(joint / 5 - 0.003, 0.40 - s.y)
    s.fill(tiles, s.mix(tone, (250, 244, 232), (236, 246, 244)), 0.9, 1.4)
    s.fill((s.y - 0.40).abs() - 0.007, s.mix(tone, (206, 160, 116), (120, 160, 156)))
    left = s.q(3) < 0.5
    window, shelf = (
        torch.where(left, 0.22, 0.78) + s.q(4, -0.04, 0.04),
        torch.where(left, 0.76, 0.24) + s.q(5, -0.03, 0.03),
    )
    frame = box(s.x, s.y, window, 0.20, 0.175, 0.165, 0.012)
    s.fill(frame - 0.006, (150, 120, 90), 0.5, 5.0)
    s.fill(frame, (252, 250, 244))
    pane = frame + 0.022
    s.fill(pane, s.gradient((130, 198, 246), (218, 240, 252), 0.05, 0.33))
    s.fill(torch.maximum(pane, hills(s, 0.30, 0.015, 14.0, s.q(6))), (122, 178, 110))
    s.fill(torch.maximum(torch.minimum((s.x - window).abs(), (s.y - 0.20).abs()) - 0.007, frame), (252, 250, 244))
    s.fill(box(s.x, s.y, window, 0.375, 0.20, 0.014, 0.006), (240, 234, 222))
    s.fill(box(s.x, s.y, shelf, 0.255, 0.21, 0.013, 0.004), (160, 112, 70))
    s.fill(box(s.x, s.y, shelf, 0.275, 0.20, 0.008), (120, 84, 56), 0.35, 3.0)
    for k, color in enumerate(((214, 106, 86), (240, 196, 96), (112, 160, 140), (236, 232, 222))):
        cx, tall = shelf - 0.15 + 0.10 * k, s.q(7 + k, 0.035, 0.06)
        s.fill(box(s.x, s.y, cx, 0.242 - tall, 0.034, tall, 0.012), color)
        s.fill(box(s.x, s.y, cx - 0.014, 0.242 - tall, 0.005, tall * 0.7, 0.004), (255, 255, 255), 0.4, 2.0)
        s.fill(box(s.x, s.y, cx, 0.238 - tall * 2, 0.024, 0.010, 0.004), (128, 96, 72))
    wood = s.mix(s.q(11), (186, 128, 80), (150, 100, 66))
    dark = s.mix(s.q(11), (150, 98, 58), (116, 74, 48))
    s.fill(edge - s.y, s.gradient(wood[:, :, 0, 0], dark[:, :, 0, 0], edge, 1.0))
    plank = torch.remainder((s.x - 0.5) / (0.35 + s.y) * 5 + s.q(12), 1)
    s.fill(((plank - 0.5).abs() - 0.49) * -0.1 + (edge - s.y).clamp(min=0), dark[:, :, 0, 0] * 0.8, 0.7, 1.5)
    grain = torch.sin(s.y * 95 + 2.2 * torch.sin(s.x * 5 + s.q(13) * 9))
    s.fill((0.6 - grain) * 0.02 + (edge - s.y).clamp(min=0), dark[:, :, 0, 0] * 0.9, 0.3, 2.5)
    s.fill((s.y - edge - 0.012).abs() - 0.012, wood[:, :, 0, 0] * 1.12)
    s.fill((s.y - edge + 0.02).abs() - 0.012, (70, 50, 40), 0.3, 5.0)


def space(s: SceneCanvas) -> None:
    """Stars, a nebula, a ringed planet and a moon above cratered ground."""
    tone = s.q(0)
    s.cover(s.gradient((14, 12, 38), s.mix(tone, (58, 32, 98), (24, 52, 104)), 0.0, 0.8))
    fog = torch.sin(s.x * 5 + s.q(1) * 9 + 1.5 * torch.sin(s.y * 4 + s.q(2) * 9)) * torch.sin(
        s.y * 6 + s.x * 2 + s.q(3) * 9
    )
    s.fill(0.10 - fog * 0.3, s.mix(tone, (170, 70, 160), (50, 140, 180)), 0.38, 40.0)
    for key, count, star in ((4, 12.0, 0.0045), (5, 6.0, 0.008)):
        u, v, chance = grid(s, count, s.q(key), 0.9)
        s.fill(length(u, v) - star * (0.5 + 0.7 * chance), (255, 250, 236), 0.4 + 0.6 * chance, 1.6)
    left = s.q(6) < 0.5
    cx, cy, size = torch.where(left, 0.20, 0.80) + s.q(7, -0.06, 0.06), s.q(8, 0.16, 0.26), s.q(9, 0.085, 0.13)
    far = length(s.x - cx, s.y - cy)
    planet = far - size
    light = ((s.x - cx) * 0.7 - (s.y - cy) * 0.8) / size
    globe = s.gradient((244, 178, 120), (206, 110, 110), cy - size, cy + size)
    globe = torch.lerp(globe, s.mix(s.q(10), (250, 220, 160), (120, 190, 220)), s.q(11)[:, None] * 0.8)
    stripe = 0.92 + 0.10 * torch.sin((s.y - cy + 0.2 * (s.x - cx)) / size * 7 + s.q(12) * 6)
    u, v = s.x - cx, (s.y - cy) + 0.28 * (s.x - cx)
    hoop = ellipse(u, v, 0.0, 0.0, size * 1.75, size * 0.42).abs() - size * 0.09
    s.fill(hoop, (232, 214, 190), 0.85, 1.5)
    s.fill(planet, globe * (stripe * (0.84 + 0.22 * light))[:, None], 1.0, 1.4)
    s.fill(torch.maximum(hoop, -v), (248, 232, 206), 0.95, 1.5)
    mx, my = torch.where(left, 0.80, 0.20) + s.q(13, -0.08, 0.08), s.q(14, 0.12, 0.34)
    moon = length(s.x - mx, s.y - my) - 0.042
    s.fill(moon, (214, 214, 224), 1.0, 1.4)
    s.fill(torch.maximum(moon, 0.042 - length(s.x - mx + 0.018, s.y - my + 0.014)), (150, 150, 172), 0.8, 2.0)
    s.fill(hills(s, 0.70, 0.02, 7.0, s.q(15)), s.gradient((128, 122, 150), (88, 84, 112), 0.66, 0.85), 1.0, 1.5)
    s.fill(hills(s, 0.76, 0.012, 4.0, s.q(16)), s.gradient((176, 168, 184), (116, 110, 136), 0.74, 1.0), 1.0, 1.5)
    u, v, chance = grid(s, 4.0, s.q(17), 0.5, 2.6)
    wide = 0.035 + 0.04 * chance
    low = torch.where((s.y > 0.80) & (chance > 0.25), 0.0, 1.0)
    s.fill(ellipse(u, v, 0.0, 0.006, wide, wide * 0.30) + low, (206, 198, 212), 0.9, 1.5)
    s.fill(ellipse(u, v, 0.0, 0.0, wide, wide * 0.28) + low, (100, 94, 120), 0.9, 1.5)


def sea(s: SceneCanvas) -> None:
    """Rays of light in blue water, rocks, waving kelp, corals, bubbles and a sandy floor."""
    tone = s.q(0)
    s.cover(
        s.gradient(s.mix(tone, (110, 214, 236), (90, 190, 214)), s.mix(tone, (14, 84, 150), (16, 92, 120)), 0.0, 0.85)
    )
    slant = (s.x - s.q(1, 0.2, 0.8)) / (s.y + 0.35)
    ray = torch.sin(slant * 16 + s.q(2) * 9) + 0.6 * torch.sin(slant * 37 + s.q(3) * 9)
    s.fill(0.12 - ray * 0.2 + s.y * 0.6, (226, 250, 250), 0.38, 40.0)
    s.fill(hills(s, 0.62, 0.05, 8.0, s.q(4)), (36, 116, 158), 0.9, 4.0)
    s.fill(hills(s, 0.70, 0.03, 11.0, s.q(5)), (26, 94, 128), 0.9, 2.0)
    middle = torch.where((s.x > 0.24) & (s.x < 0.76), 1.0, 0.0)
    across, tall, tone_k = columns(s, 9.0, s.q(6), 0.4)
    top = 0.50 - 0.28 * tall
    sway = 0.016 * torch.sin(s.y * 24 + tall * 20)
    leaf = (across + sway).abs() - 0.019 * ((s.y - top) * 9).clamp(0, 1) * (0.75 + 0.25 * torch.sin(s.y * 70))
    kelp = torch.maximum(torch.maximum(leaf, top - s.y), s.y - 0.86) + middle
    s.fill(kelp, s.mix(tone_k, (38, 142, 92), (92, 158, 70)).expand(-1, -1, *s.x.shape[1:]), 1.0, 1.3)
    floor = hills(s, 0.81, 0.012, 6.0, s.q(7))
    s.fill(floor, s.gradient((226, 208, 158), (176, 156, 118), 0.80, 1.0), 1.0, 1.5)
    ripple = torch.sin((s.y + 0.014 * torch.sin(s.x * 13 + s.q(8) * 9)) * 150)
    s.fill((0.8 - ripple) * 0.02 + (floor + 0.02).clamp(min=0), (150, 132, 100), 0.45, 2.5)
    for k, color in enumerate(((244, 110, 120), (250, 160, 80), (196, 110, 200))):
        cx = s.q(9 + k, 0.02, 0.20) if k != 1 else s.q(9 + k, 0.80, 0.98)
        foot, size = 0.86 + 0.02 * k, s.q(12 + k, 0.8, 1.25)
        coral = line(s.x, s.y, cx, foot, cx, foot - 0.13 * size, 0.013)
        for way in (-1.0, 1.0):
            bend, rise = cx + way * 0.045 * size, foot - (0.07 + 0.02 * way) * size
            coral = torch.minimum(coral, line(s.x, s.y, cx, rise + 0.03, bend, rise, 0.011))
            coral = torch.minimum(coral, line(s.x, s.y, bend, rise, bend, rise - 0.05 * size, 0.011))
        s.fill(coral, color, 1.0, 1.3)
    u, v, chance = grid(s, 6.0, s.q(16), 0.8)
    radius = 0.007 + 0.013 * chance
    bubble = length(u, v) - radius
    seen = torch.where((chance > 0.35) & (s.y < 0.78), 1.0, 0.0)
    s.fill(bubble, (200, 240, 250), 0.35 * seen, 1.4)
    s.fill(bubble.abs() - 0.002, (240, 252, 255), 0.85 * seen, 1.3)
    s.fill(circle(u, v, -radius * 0.35, -radius * 0.35, radius * 0.25), (255, 255, 255), 0.9 * seen, 1.3)
