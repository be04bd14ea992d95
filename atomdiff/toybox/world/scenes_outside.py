"""Scenes under the open sky: beach, forest, desert, snow, city."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from atomdiff.toybox.world.canvas import RGB, SceneCanvas
from atomdiff.toybox.world.distances import Value, circle, either, ellipse, length, line
from atomdiff.toybox.world.scatter import columns, grid


def clouds(s: SceneCanvas, first: int, y: float, color: RGB, opacity: float = 0.85) -> None:
    """Two clouds at random places around height `y`."""
    for k, cx in enumerate((s.q(first, 0.0, 0.45), s.q(first + 1, 0.55, 1.0))):
        size, cy = s.q(first + 2 + k, 0.07, 0.13), y + s.q(first + 3 - k, -0.05, 0.06)
        puff = either(
            ellipse(s.x, s.y, cx, cy, size * 1.5, size * 0.35),
            ellipse(s.x, s.y, cx - 0.02, cy - size * 0.3, size * 0.7, size * 0.42),
            0.04,
        )
        puff = either(puff, ellipse(s.x, s.y, cx + size * 0.7, cy - size * 0.15, size * 0.5, size * 0.3), 0.03)
        s.fill(puff, color, opacity, 3.0)


def sun(s: SceneCanvas, cx: Value, cy: Value, radius: float, color: RGB, halo: RGB) -> None:
    """A sun with a soft halo."""
    far = length(s.x - cx, s.y - cy)
    s.fill(far - radius, halo, 0.55, 36.0)
    s.fill(far - radius, color, 1.0, 1.5)


def hills(s: SceneCanvas, height: Value, swing: Value, run: float, key: Tensor) -> Tensor:
    """Distance to the ground below a rolling horizon at y = height."""
    wave = torch.sin(s.x * run + key * 20) + 0.5 * torch.sin(s.x * run * 2.3 + key * 47)
    return (height + swing * wave - s.y) * 0.9


def _fir(across: Tensor, depth: Tensor, height: Value, half: Value) -> Tensor:
    """Distance to a fir tree of a half width at its foot, by the offset from its middle and the depth below its top."""
    share = (depth / height).clamp(min=0)
    tier = torch.remainder(share * 6, 1)
    width = half * (0.86 * share + 0.20 * tier - 0.06)
    return torch.maximum((across.abs() - width) * 0.8, torch.maximum(-depth, depth - height))


def firs(s: SceneCanvas, count: float, key: Tensor, foot: Value, low: float, high: float) -> Tensor:
    """Distance to a wood of fir trees of heights between `low` and `high`, standing at y = foot."""
    rows = []
    for shift in (0.0, 0.5):
        across, tall, _ = columns(s, count, key + shift, 0.2)
        height = low + (high - low) * tall
        rows.append(_fir(across, s.y - foot + height, height, 0.39 / count))
    return torch.minimum(*rows)


def beach(s: SceneCanvas) -> None:
    """Sky, sea with foam, sand with ripples and shells, and a palm."""
    horizon, late = s.q(0, 0.40, 0.48), s.q(1) * 0.8
    s.cover(
        s.gradient(
            s.mix(late, (92, 180, 245), (140, 170, 230)), s.mix(late, (206, 236, 252), (255, 214, 170)), 0.0, horizon
        )
    )
    sun(s, s.q(2, 0.1, 0.9), s.q(3, 0.08, 0.24), 0.055, (255, 244, 190), (255, 240, 190))
    clouds(s, 4, 0.2, (255, 255, 255), 0.8)
    s.fill(hills(s, horizon - 0.015, 0.02, 6.0, s.q(8)), s.mix(late, (120, 165, 180), (150, 150, 180)), 0.9, 2.0)
    sea = s.gradient((28, 118, 190), (92, 205, 210), horizon, horizon + 0.2)
    s.fill(horizon - s.y, sea)
    across, down, chance = grid(s, 9.0, s.q(9), 0.8, 3.4)
    glint = torch.maximum(ellipse(across, down, 0.0, 0.0, 0.03, 0.004), horizon + 0.015 - s.y)
    s.fill(glint, (235, 250, 255), 0.75 * (chance > 0.4), 1.5)
    shore = horizon + 0.17 + 0.018 * torch.sin(s.x * 9 + s.q(10) * 20) + 0.008 * torch.sin(s.x * 23 + s.q(11) * 20)
    s.fill(shore - 0.02 - s.y, (245, 252, 252), 0.95, 2.0)
    s.fill(shore + 0.008 - s.y, s.gradient((196, 164, 112), (236, 208, 150), shore, shore + 0.07), 1.0, 2.0)
    sand = s.gradient((246, 222, 164), (226, 190, 126), 0.6, 1.0)
    s.fill(shore + 0.04 - s.y, sand, 1.0, 8.0)
    ripple = torch.sin((s.y * 60 + torch.sin(s.x * 11 + s.q(12) * 9) * 1.2) * 1.5)
    s.fill((0.72 - ripple) * 0.02 + (0.66 - s.y).clamp(min=0), (206, 166, 104), 0.45, 2.5)
    across, down, chance = grid(s, 6.0, s.q(13), 0.8)
    shell = torch.maximum(ellipse(across, down, 0.0, 0.0, 0.014, 0.010), 0.68 - s.y)
    s.fill(shell, (255, 246, 230), 0.9 * (chance > 0.6), 1.3)
    side = torch.where(s.q(14) < 0.5, 0.04, 0.96) + s.q(15, -0.05, 0.05)
    lean = (0.5 - side) * 0.22
    palm(s, side, 0.68, side + lean, s.q(16, 0.14, 0.26))


def palm(s: SceneCanvas, x0: Tensor, y0: float, x1: Tensor, y1: Tensor) -> None:
    """A palm from its foot to its crown."""
    share = ((s.y - y1) / (y0 - y1)).clamp(0, 1)
    middle = x1 + (x0 - x1) * share * share
    trunk = torch.maximum((s.x - middle).abs() - 0.012 - 0.012 * share, torch.maximum(y1 - s.y, s.y - y0))
    notch = (torch.sin(s.y * 150) * 0.5 + 0.5)[:, None]
    s.fill(trunk, torch.tensor([0.52, 0.36, 0.22], device=s.x.device).view(1, 3, 1, 1) * (0.85 + 0.25 * notch))
    for k, angle in enumerate((-2.7, -2.0, -0.9, -0.25, 0.45, 2.75)):
        tip_x, tip_y = x1 + 0.17 * math.cos(angle), y1 + 0.11 * math.sin(angle) + 0.03
        u, v = s.x - x1, s.y - y1
        dx, dy = tip_x - x1, tip_y - y1
        reach = ((u * dx + v * dy) / (dx * dx + dy * dy)).clamp(0, 1)
        sag = 0.05 * reach * reach
        leaf = length(u - reach * dx, v - reach * dy - sag) - 0.024 * (reach * (1 - reach) * 4).clamp(min=0.02)
        s.fill(leaf, (46, 140, 76) if k % 2 else (34, 112, 66), 1.0, 1.3)


def forest(s: SceneCanvas) -> None:
    """A clearing between fir trees in three depths, with ferns and mushrooms."""
    late = s.q(0)
    s.cover(
        s.gradient(
            s.mix(late, (168, 214, 214), (206, 222, 170)), s.mix(late, (226, 240, 206), (250, 238, 190)), 0.0, 0.55
        )
    )
    sun(s, s.q(1, 0.2, 0.8), 0.16, 0.05, (255, 252, 220), (255, 250, 205))
    ground = 0.60
    s.fill(firs(s, 9.0, s.q(2), ground + 0.02, 0.16, 0.36), (150, 194, 166), 1.0, 2.0)
    s.fill(firs(s, 6.0, s.q(3), ground + 0.03, 0.24, 0.50), (92, 152, 114), 1.0, 1.6)
    s.fill(hills(s, ground, 0.008, 9.0, s.q(4)), s.gradient((122, 166, 84), (58, 110, 52), ground, 1.0), 1.0, 2.0)
    s.fill(ellipse(s.x, s.y, 0.5, 0.86, 0.48, 0.2), (164, 190, 104), 0.6, 22.0)
    for k, cx in enumerate((s.q(8, 0.14, 0.24), s.q(9, 0.78, 0.88), s.q(10, -0.02, 0.06), s.q(11, 0.94, 1.02))):
        foot, height = 0.66 + 0.025 * k, s.q(12 + k, 0.44, 0.60)
        across = s.x - cx
        s.fill(torch.maximum(across.abs() - 0.016, (s.y - foot - 0.02).abs() - 0.03), (98, 70, 50))
        tree = _fir(across, s.y - foot + height, height, 0.10)
        s.fill(tree, (44, 108, 70), 1.0, 1.3)
        s.fill(tree + 0.004 + across.clamp(min=0), (66, 134, 86), 0.8, 2.5)
    tuft_x, tuft_y, chance = grid(s, 9.0, s.q(6), 0.7, 2.0)
    blade = torch.maximum(tuft_x.abs() - (0.012 - tuft_y.abs() * 0.35), 0.66 - s.y)
    s.fill(blade + torch.where(chance > 0.35, 0.0, 1.0), (44, 96, 46), 0.8, 1.5)
    u, v, chance = grid(s, 5.0, s.q(7), 0.6, 1.3)
    far = torch.where((chance > 0.72) & (s.y > 0.68), 0.0, 1.0)
    s.fill(torch.maximum(u.abs() - 0.006, (v - 0.012).abs() - 0.014) + far, (240, 228, 208))
    s.fill(torch.maximum(ellipse(u, v, 0.0, 0.0, 0.022, 0.02), v) + far, (206, 70, 60))


def desert(s: SceneCanvas) -> None:
    """Dunes, mesas far away, a low sun, cacti and stones."""
    late = s.q(0)
    s.cover(
        s.gradient(
            s.mix(late, (96, 176, 226), (244, 150, 96)), s.mix(late, (250, 224, 180), (255, 220, 160)), 0.0, 0.52
        )
    )
    sun(s, s.q(1, 0.15, 0.85), s.q(2, 0.12, 0.32), 0.07, (255, 246, 206), (255, 226, 150))
    across, tall, wide = columns(s, 4.0, s.q(3), 0.4)
    top = 0.44 - 0.14 * tall
    mesa = torch.maximum(across.abs() - 0.03 - 0.04 * wide - (s.y - top) * 0.25, top - s.y)
    s.fill(mesa, s.gradient((206, 120, 84), (226, 160, 116), 0.3, 0.55), 1.0, 1.8)
    s.fill((torch.sin(s.y * 110) - 0.5) * 0.01 + (mesa + 0.01).clamp(min=0) * 2, (180, 98, 72), 0.5, 2.0)
    for k, (height, light, dark) in enumerate((
        (0.50, (242, 190, 118), (222, 160, 92)),
        (0.58, (236, 176, 102), (206, 138, 76)),
        (0.70, (232, 170, 98), (196, 124, 66)),
    )):  # fmt: skip
        dune = hills(s, height + s.q(4 + k, -0.02, 0.02), 0.022 + 0.006 * k, 5.0 - k, s.q(7 + k))
        s.fill(dune, s.gradient(light, dark, height - 0.03, height + 0.2), 1.0, 1.6)
    ripple = torch.sin((s.y + 0.02 * torch.sin(s.x * 9 + s.q(10) * 9)) * 110)
    s.fill((0.8 - ripple) * 0.02 + (0.74 - s.y).clamp(min=0), (176, 108, 58), 0.4, 2.5)
    for k, cx in enumerate((s.q(11, 0.06, 0.16), s.q(12, 0.84, 0.94))):
        tall_k, arm = s.q(13 + k, 0.26, 0.38), 0.62 + 0.04 * k
        foot = 0.64 + 0.06 * k
        cactus = line(s.x, s.y, cx, foot, cx, foot - tall_k, 0.026)
        for way, height in ((1.0, 0.45), (-1.0, 0.62)):
            bend = cx + way * 0.07
            elbow = foot - tall_k * height
            cactus = torch.minimum(cactus, line(s.x, s.y, cx, elbow, bend, elbow, 0.017))
            cactus = torch.minimum(cactus, line(s.x, s.y, bend, elbow, bend, elbow - 0.08 * arm - 0.03, 0.017))
        s.fill(cactus, (62, 128, 78), 1.0, 1.3)
        s.fill(cactus + 0.012 + (s.x - cx).clamp(min=0), (98, 162, 98), 0.8, 1.5)
    u, v, chance = grid(s, 7.0, s.q(16), 0.7, 1.4)
    stone = torch.maximum(ellipse(u, v, 0.0, 0.0, 0.02, 0.012), v - 0.006)
    s.fill(stone + torch.where((chance > 0.7) & (s.y > 0.74), 0.0, 1.0), (150, 96, 68))


def snow(s: SceneCanvas) -> None:
    """Mountains with white caps, snowed-in firs, soft drifts and falling flakes."""
    late = s.q(0)
    s.cover(
        s.gradient(
            s.mix(late, (132, 180, 228), (150, 150, 206)), s.mix(late, (222, 236, 248), (250, 220, 214)), 0.0, 0.58
        )
    )
    jag = 0.09 + 0.03 * (torch.remainder(s.x * 22, 1) - 0.5).abs() * 2
    for k, cx in enumerate((s.q(8, 0.40, 0.60), s.q(9, 0.0, 0.25), s.q(10, 0.75, 1.0))):
        peak, across = s.q(11 + k, 0.14, 0.32), s.x - cx
        ridge = (peak + across.abs() * 1.25 - s.y) * 0.6
        s.fill(ridge, s.gradient((112, 136, 172), (176, 194, 216), 0.15, 0.58), 1.0, 1.5)
        s.fill(ridge + (across * 0.8 + 0.02 * torch.sin(s.y * 40)).clamp(min=0), (146, 168, 198), 0.8, 2.0)
        s.fill(torch.maximum(ridge, (s.y - peak - jag) * 0.7), (250, 252, 255), 1.0, 1.5)
    s.fill(hills(s, 0.54, 0.015, 6.0, s.q(2)), (214, 226, 242), 1.0, 2.0)
    fir = firs(s, 6.0, s.q(3), 0.62, 0.14, 0.28)
    s.fill(fir, (86, 124, 132), 1.0, 1.4)
    s.fill(fir + 0.010 + torch.remainder(s.y * 26 + 0.3, 1) * 0.02, (240, 246, 252), 0.9, 2.0)
    s.fill(hills(s, 0.61, 0.015, 5.0, s.q(4)), s.gradient((250, 252, 255), (214, 226, 244), 0.58, 0.85), 1.0, 2.0)
    s.fill(hills(s, 0.76, 0.02, 4.0, s.q(5)), s.gradient((255, 255, 255), (206, 220, 242), 0.73, 1.0), 1.0, 3.0)
    for key, count, size in ((6, 8.0, 0.007), (7, 5.0, 0.011)):
        u, v, chance = grid(s, count, s.q(key), 0.9)
        s.fill(length(u, v) - size * (0.6 + 0.6 * chance), (255, 255, 255), 0.95, 1.6)


def city(s: SceneCanvas) -> None:
    """Two rows of buildings with windows, a pavement, a street and a lamp post."""
    late = s.q(0)
    s.cover(
        s.gradient(
            s.mix(late, (120, 184, 232), (92, 96, 160)), s.mix(late, (226, 236, 240), (250, 190, 150)), 0.0, 0.68
        )
    )
    clouds(s, 1, 0.14, (255, 255, 255), 0.6)
    across, tall, _ = columns(s, 8.0, s.q(5), 0.2)
    s.fill(
        torch.maximum(across.abs() - 0.056, 0.42 - 0.24 * tall - s.y),
        s.mix(late, (170, 188, 208), (140, 128, 168)),
        1.0,
        1.8,
    )
    across, tall, tone = columns(s, 4.6, s.q(6), 0.12)
    top = 0.42 - 0.28 * tall
    house = torch.maximum(across.abs() - 0.097, top - s.y)
    wall = torch.lerp(
        s.mix(tone, (176, 120, 104), (112, 130, 156)), s.mix(tone, (110, 84, 110), (70, 78, 116)), late[:, None]
    )
    s.fill(house, wall.expand(-1, -1, *s.x.shape[1:]))
    s.fill(torch.maximum(across.abs() - 0.104, (s.y - top).abs() - 0.012), (90, 84, 98))
    wu, wv = torch.remainder(across * 21 + 0.5, 1) - 0.5, torch.remainder((s.y - top) * 14, 1) - 0.5
    window = torch.maximum((wu.abs() - 0.26) / 21, (wv.abs() - 0.28) / 14)
    window = torch.maximum(torch.maximum(window, across.abs() - 0.08), torch.maximum(top + 0.03 - s.y, s.y - 0.66))
    _, _, chance = grid(s, 21.0, s.q(7), 0.0, 0.7)
    glass = torch.where(
        (chance > 0.4)[:, None],
        s.mix(late, (190, 220, 240), (255, 224, 140)),
        s.mix(late, (130, 164, 194), (76, 76, 110)),
    )
    s.fill(window, glass)
    s.fill(0.69 - s.y, s.gradient((196, 192, 190), (176, 172, 172), 0.69, 0.78))
    s.fill(
        torch.maximum(
            (torch.remainder(s.x * 7 + s.q(8) * 7 - (s.y - 0.69) * 4 * (s.x - 0.5), 1) - 0.5).abs() / 7 - 0.003,
            torch.maximum(0.69 - s.y, s.y - 0.78),
        ),
        (150, 146, 148),
        1.0,
        1.3,
    )
    s.fill(0.78 - s.y, (128, 124, 128))
    s.fill(0.795 - s.y, s.gradient((92, 92, 102), (70, 70, 80), 0.79, 1.0))
    dash = torch.maximum((torch.remainder(s.x * 3 + s.q(9) * 3, 1) - 0.5).abs() / 3 - 0.09, (s.y - 0.965).abs() - 0.012)
    s.fill(dash, (240, 236, 214))
    post = torch.where(s.q(10) < 0.5, 0.08, 0.92) + s.q(11, -0.04, 0.04)
    s.fill(
        torch.minimum(line(s.x, s.y, post, 0.22, post, 0.74, 0.008), line(s.x, s.y, post, 0.74, post, 0.70, 0.016)),
        (52, 56, 66),
    )
    s.fill(circle(s.x, s.y, post, 0.20, 0.02), (255, 236, 170), 0.8, 9.0)
    s.fill(circle(s.x, s.y, post, 0.20, 0.026), (255, 246, 210), 1.0, 1.3)
