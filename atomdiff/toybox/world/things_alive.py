"""Living things: cat, bird, fish, mushroom."""

from __future__ import annotations

import torch
from torch import Tensor

from atomdiff.toybox.world.canvas import ObjectCanvas
from atomdiff.toybox.world.distances import Value, both, circle, cone, either, ellipse, line, polygon, ring, turn

LIGHT, DARK, ROSE, BEAK = (248, 246, 240), (44, 40, 50), (242, 132, 146), (250, 170, 50)


def _eye(c: ObjectCanvas, x: Tensor, y: Tensor, cx: Value, cy: Value, size: Value) -> None:
    c.paint(circle(x, y, cx, cy, size), LIGHT, 0.0, 0.014)
    c.paint(ellipse(x, y, cx - 0.12 * size, cy, size * 0.55, size * 0.68), DARK, 0.0, 0.0)
    c.paint(circle(x, y, cx - 0.3 * size, cy + 0.28 * size, size * 0.24), (255, 255, 255), 0.0, 0.0)


def cat(c: ObjectCanvas) -> None:
    """A sitting cat; head, ears, body and tail vary."""
    half, tall = c.p(3, 0.18, 0.33), c.p(4, 0.38, 0.58)
    head, wide = c.p(0, 0.155, 0.235), c.p(7, 1.0, 1.3)
    face = tall + head * 0.62
    side = c.x.abs()
    curl = c.p(5, 0.09, 0.17)
    tail = ring(ellipse(c.x, c.y, half * 0.75, curl * 1.5 + 0.03, curl + 0.04, curl * 1.5), 0.036)
    c.paint(torch.maximum(tail, 0.4 * half - c.x), "accent")
    body = both(ellipse(c.x, c.y, 0.0, tall * 0.44, half, tall * 0.58), -c.y, 0.06)
    c.paint(body, "body", 0.2)
    for foot in (-1.0, 1.0):
        c.paint(both(ellipse(c.x, c.y, foot * half * 0.42, 0.035, 0.075, 0.06), -c.y, 0.03), "accent", 0.1)
    ear, lean = c.p(1, 0.09, 0.25), c.p(2, 0.0, 0.09)
    base = face + head * 0.30
    tip = (head * wide * 0.72 + lean, base + ear + 0.06)
    outer = polygon(side, c.y, (head * 0.18, base), (head * wide * 0.98, base - 0.03), tip, radius=0.03)
    c.paint(outer, "accent", 0.1)
    inner = polygon(
        side, c.y, (head * 0.42, base), (head * wide * 0.82, base), (tip[0] - 0.012, tip[1] - 0.065), radius=0.02
    )
    c.paint(inner, ROSE, 0.0, 0.0)
    c.paint(ellipse(c.x, c.y, 0.0, face, head * wide, head), "body", 0.2)
    size = c.p(6, 0.042, 0.066)
    spot = head * 0.46
    c.paint(ellipse(side, c.y, spot, face + 0.02, size, size * 1.12), LIGHT, 0.0, 0.014)
    c.paint(ellipse(side, c.y, spot * 0.94, face + 0.02, size * 0.42, size * 0.85), DARK, 0.0, 0.0)
    c.paint(circle(c.x, c.y, spot * 0.84, face + 0.045, size * 0.2), LIGHT, 0.0, 0.0)
    c.paint(circle(c.x, c.y, -spot * 1.04, face + 0.045, size * 0.2), LIGHT, 0.0, 0.0)
    muzzle = face - head * 0.42
    c.paint(ellipse(side, c.y, 0.045, muzzle - 0.012, 0.055, 0.042), LIGHT, 0.0, 0.012)
    c.paint(
        polygon(c.x, c.y, (0.0, muzzle), (0.032, muzzle + 0.04), (-0.032, muzzle + 0.04), radius=0.015),
        ROSE,
        0.0,
        0.012,
    )
    c.paint(line(side, c.y, 0.12, muzzle, head * wide + 0.05, muzzle + 0.025, 0.004), DARK, 0.0, 0.0)


def bird(c: ObjectCanvas) -> None:
    """A standing bird; body, head, beak, tail, wing, crest and legs vary."""
    leg, rx, ry = c.p(5, 0.06, 0.25), c.p(0, 0.21, 0.31), c.p(1, 0.16, 0.26)
    head = c.p(2, 0.125, 0.18)
    x, y = c.x, c.y
    middle = leg + ry
    hx, hy = -rx * 0.72, middle + ry * 0.72 + head * 0.42
    for foot in (-0.05, 0.09):
        c.paint(line(x, y, foot, leg + 0.06, foot - 0.01, 0.015, 0.013), BEAK, 0.0, 0.014)
        c.paint(line(x, y, foot - 0.07, 0.016, foot + 0.03, 0.016, 0.013), BEAK, 0.0, 0.014)
    u, v = turn(x, y, rx * 0.7, middle + 0.03, c.p(7, -0.15, 0.55))
    far = c.p(4, 0.15, 0.36)
    fan = c.p(7, 0.10, 0.05)
    c.paint(polygon(u, v, (0.0, -0.05), (far, -fan), (far + 0.02, fan), (0.0, 0.06), radius=0.03), "accent")
    crest = c.p(3, -0.02, 0.15)
    for lean in (-0.03, 0.05):
        c.paint(cone(x, y, hx, hy + head * 0.5, hx + lean + 0.02, hy + head + crest, 0.035, 0.012), "accent", 0.0)
    beak = c.p(4, 0.19, 0.07)
    c.paint(
        polygon(
            x,
            y,
            (hx - head * 0.8, hy + 0.05),
            (hx - head - beak, hy - 0.015),
            (hx - head * 0.8, hy - 0.06),
            radius=0.012,
        ),
        BEAK,
        0.1,
    )
    body = either(ellipse(x, y, 0.0, middle, rx, ry), circle(x, y, hx, hy, head), 0.09)
    c.paint(body, "body", 0.2)
    _eye(c, x, y, hx - head * 0.28, hy + head * 0.18, 0.045)
    wing, w = turn(x, y, rx * 0.15, middle + 0.02, 0.25)
    size = c.p(6, 0.13, 0.19)
    shape = both(ellipse(wing, w, 0.0, 0.0, size * 1.25, size * 0.75), w - 0.3 * size, 0.04)
    c.paint(shape, "accent", 0.14)
    feather = torch.maximum(ring(ellipse(wing, w, -0.3 * size, 0.0, size * 0.95, size * 0.45), 0.005), shape + 0.02)
    c.paint(feather, DARK, 0.0, 0.0)


def fish(c: ObjectCanvas) -> None:
    """A fish; length, height, tail, fins and eye vary."""
    rx, ry = c.p(0, 0.26, 0.37), c.p(1, 0.14, 0.30)
    x, y = c.x + 0.09, c.y - ry - 0.10
    reach, fork, tall = c.p(2, 0.13, 0.21), c.p(4, 0.0, 0.09), c.p(2, 0.13, 0.24)
    sx, sy = x - rx * 0.88, y.abs()
    half = polygon(
        sx, sy, (-0.02, -0.02), (reach - fork, -0.02), (reach + 0.04, tall), (reach - 0.04, tall), radius=0.03
    )
    c.paint(half, "accent")
    fin = c.p(3, 0.08, 0.2)
    top = polygon(
        x,
        y,
        (-rx * 0.5, ry * 0.5),
        (rx * 0.62, ry * 0.4),
        (rx * 0.5, ry * 0.82 + fin * 0.6),
        (-rx * 0.02, ry + fin),
        radius=0.05,
    )
    c.paint(top, "accent")
    low = polygon(x, y, (rx * 0.05, -ry * 0.6), (rx * 0.35, -ry - fin * 0.7), (rx * 0.52, -ry * 0.5), radius=0.04)
    c.paint(low, "accent")
    pull = c.p(7, 0.0, 0.25)
    body = ellipse(x, y * (1 + pull * (x / rx)), 0.0, 0.0, rx, ry)
    c.paint(body, "body", 0.22)
    c.glow(ellipse(x, y, -rx * 0.15, ry * 0.6, rx * 0.4, 0.025), (255, 255, 255), 0.4, 0.07)
    gill = torch.maximum(ring(circle(x, y, -rx * 0.95, 0.0, rx * 0.58), 0.007), body + 0.03)
    c.paint(gill, DARK, 0.0, 0.0)
    _eye(c, x, y, -rx * 0.62, ry * 0.24, c.p(5, 0.042, 0.068))
    c.paint(line(x, y, -rx * 0.97, -ry * 0.2, -rx * 0.76, -ry * 0.30, 0.007), DARK, 0.0, 0.0)
    size = c.p(6, 0.07, 0.13)
    u, v = turn(x, y, rx * 0.02, -ry * 0.25, -0.5)
    c.paint(both(ellipse(u, v, size * 0.6, 0.0, size, size * 0.6), -u, 0.03), "accent", 0.1)


def mushroom(c: ObjectCanvas) -> None:
    """A mushroom; cap, gills, stem and ring vary."""
    width, top, low = c.p(0, 0.34, 0.5), c.p(1, 0.74, 0.96), c.p(2, 0.40, 0.54)
    stem, swell = c.p(3, 0.085, 0.15), c.p(4, 0.0, 0.09)
    t = (c.y / low).clamp(0, 1)
    stalk = both((c.x.abs() - stem - swell * (1 - t) ** 2) * 0.96, torch.maximum(-c.y, c.y - low - 0.02), 0.05)
    c.paint(stalk, (242, 232, 212), 0.22)
    skirt = low * c.p(6, 0.55, 0.75)
    c.paint(
        both(ellipse(c.x, c.y, 0.0, skirt - 0.03, stem + 0.055, 0.075), skirt - 0.03 - c.y, 0.02),
        (226, 210, 184),
        0.1,
        0.016,
    )
    depth = c.p(5, 0.05, 0.10)
    under = ellipse(c.x, c.y, 0.0, low, width, depth)
    c.paint(under, (222, 196, 164), 0.1)
    c.glow(ellipse(c.x, c.y, 0.0, low - 0.01, stem + 0.06, depth * 0.6), (90, 60, 50), 0.4, 0.06)
    point = c.p(7, 0.0, 0.5)
    height = (top - low) * (1 - point * 0.25 * (c.x / width).abs())
    dome = ellipse(c.x, c.y, 0.0, low, width, height)
    cap = both(dome, low - c.y - depth * 0.35 * (1 - (c.x / width) ** 2).clamp(min=0), 0.03)
    c.paint(cap, "body", 0.2)
    c.glow(ellipse(c.x, c.y, -0.4 * width, low + 0.62 * (top - low), 0.09, 0.035), (255, 255, 255), 0.5, 0.08)
