"""Things of the household: mug, teapot, vase, lamp, backpack, house, umbrella."""

from __future__ import annotations

import torch

from atomdiff.toybox.world.canvas import ObjectCanvas
from atomdiff.toybox.world.distances import both, box, circle, ellipse, line, polygon, ring, taper

LIGHT, DARK, GLASS, WOOD = (243, 240, 232), (52, 48, 58), (176, 220, 242), (142, 98, 60)
SHINE = (255, 255, 255)


def mug(c: ObjectCanvas) -> None:
    """A mug; its height, width, taper and handle vary."""
    top, half, narrow = c.p(0, 0.62, 0.94), c.p(1, 0.22, 0.33), c.p(2, 0.7, 1.12)
    reach, thick, rim = c.p(3, 0.10, 0.19), c.p(4, 0.024, 0.048), c.p(6, 0.045, 0.085)
    x, y = c.x + 0.10, c.y
    center = top * c.p(5, 0.46, 0.58)
    grip = ellipse(x, y, half * (0.5 + 0.5 * narrow), center, reach, top * c.p(7, 0.2, 0.3))
    c.paint(ring(grip, thick), "accent")
    bow = 0.6 * rim * (1 - (x / half) ** 2).clamp(0, 1)  # the bottom edge seen from above
    body = taper(x, y + bow - 0.6 * rim, 0.0 * top, top - 0.6 * rim, half * narrow, half, 0.05)
    c.paint(body, "body")
    c.glow(line(x, y, -0.58 * half * narrow, 0.25 * top, -0.62 * half, 0.75 * top, 0.012), SHINE, 0.45, 0.06)
    c.paint(ellipse(x, y, 0.0, top - 0.3 * rim, half, rim), LIGHT)
    c.paint(ellipse(x, y, 0.0, top - 0.34 * rim, half * 0.84, rim * 0.68), (96, 60, 40), 0.0)


def teapot(c: ObjectCanvas) -> None:
    """A teapot; belly, spout, handle and lid vary."""
    rx, ry = c.p(0, 0.24, 0.32), c.p(1, 0.24, 0.35)
    x, y = c.x - 0.02, c.y
    reach, lid, knob = c.p(4, 0.11, 0.19), c.p(5, 0.45, 0.8) * rx, c.p(6, 0.035, 0.075)
    grip = ellipse(x, y, rx * 0.86, ry * 1.1, reach, ry * c.p(4, 0.5, 0.68))
    c.paint(ring(grip, 0.034), "accent")
    tip_x, tip_y = -rx - c.p(2, 0.10, 0.19), ry * c.p(3, 1.35, 1.95)
    spout = polygon(
        x, y, (-rx * 0.75, ry * 0.45), (-rx * 0.55, ry * 1.3), (tip_x + 0.07, tip_y), (tip_x - 0.02, tip_y), radius=0.04
    )
    c.paint(spout, "accent")
    body = both(ellipse(x, y, 0.0, ry, rx, ry * 1.06), 0.015 - y, 0.05)
    body = torch.minimum(body, box(x, y, 0.0, 0.02, rx * 0.55, 0.03, 0.02))
    c.paint(body, "body", 0.2)
    c.glow(ellipse(x, y, -0.45 * rx, 1.45 * ry, 0.05, 0.035), SHINE, 0.6, 0.07)
    c.paint(circle(x, y, 0.0, 2 * ry + knob * 1.35, knob), LIGHT)
    height = c.p(7, 0.045, 0.10)
    c.paint(both(ellipse(x, y, 0.0, 1.9 * ry, lid, height + 0.03), 1.87 * ry - y, 0.03), "accent")


def vase(c: ObjectCanvas) -> None:
    """A vase; belly, neck, lip and height vary."""
    top, belly, at = c.p(0, 0.78, 0.98), c.p(1, 0.18, 0.33), c.p(2, 0.25, 0.55)
    neck, lip, foot = c.p(3, 0.06, 0.13), c.p(4, 0.02, 0.09), c.p(5, 0.10, 0.17)
    t = (c.y / top).clamp(0, 1)
    width = c.p(6, 0.22, 0.34)
    swell = torch.exp(-(((t - at) / width) ** 2))
    flare = (t - 0.8).clamp(min=0) / 0.2
    radius = foot + (neck - foot) * t + (belly - foot) * swell + lip * flare * flare
    slope = 0.75
    body = both((c.x.abs() - radius) * slope, torch.maximum(-c.y, c.y - top), 0.025)
    c.paint(body, "body", 0.24)
    c.glow(line(c.x, c.y, -0.5 * belly, top * (at - 0.12), -0.5 * belly, top * (at + 0.10), 0.012), SHINE, 0.5, 0.06)
    mouth = neck + lip + (belly - foot) * torch.exp(-(((1 - at) / width) ** 2))
    c.paint(ellipse(c.x, c.y, 0.0, top, mouth, 0.035), "accent")
    c.paint(ellipse(c.x, c.y, 0.0, top + 0.003, mouth * 0.7, 0.018), DARK, 0.0, 0.0)


def lamp(c: ObjectCanvas) -> None:
    """A table lamp; shade, stem and foot vary."""
    bottom, top = c.p(0, 0.40, 0.56), c.p(1, 0.86, 0.98)
    low, high = c.p(2, 0.28, 0.42), c.p(3, 0.12, 0.26)
    foot, stem = c.p(4, 0.14, 0.24), c.p(5, 0.02, 0.045)
    c.paint(box(c.x, c.y, 0.0, bottom / 2, stem, bottom / 2 + 0.02, 0.01), "accent")
    c.paint(
        ellipse(c.x, c.y, 0.0, bottom * c.p(6, 0.35, 0.65), stem + c.p(7, 0.02, 0.13), bottom * 0.24), "accent", 0.2
    )
    c.paint(box(c.x, c.y, 0.0, 0.035, foot, 0.035, 0.03), "accent")
    c.paint(circle(c.x, c.y, 0.0, bottom, 0.055), (255, 240, 170), 0.0)
    c.paint(taper(c.x, c.y, bottom, top, low, high, 0.02), "body", 0.1)
    c.glow(ellipse(c.x, c.y, 0.0, (bottom + top) / 2 - 0.06, low * 0.5, 0.12), (255, 250, 220), 0.35, 0.2)


def backpack(c: ObjectCanvas) -> None:
    """A backpack; outline, flap, pocket and straps vary."""
    half, top, round_ = c.p(0, 0.26, 0.36), c.p(1, 0.74, 0.90), c.p(2, 0.10, 0.24)
    c.paint(ring(ellipse(c.x, c.y, 0.0, top, 0.10, c.p(3, 0.05, 0.09)), 0.02), "accent")
    side = c.x.abs()
    c.paint(box(side, c.y, half + 0.015, top * 0.30, c.p(4, 0.03, 0.085), top * 0.2, 0.04), "accent")
    body = box(c.x, c.y, 0.0, top / 2, half, top / 2, round_)
    c.paint(body, "body", 0.2)
    flap = both(body + 0.002, top * c.p(5, 0.58, 0.70) - c.y + 0.5 * c.x * c.x, 0.04)
    c.paint(flap, "accent", 0.1)
    height = top * c.p(6, 0.13, 0.19)
    c.paint(box(c.x, c.y, 0.0, height + 0.05, half * 0.72, height, 0.05), "body", 0.12)
    c.paint(line(c.x, c.y, -half * 0.5, height * 1.55 + 0.05, half * 0.5, height * 1.55 + 0.05, 0.008), DARK, 0.0, 0.0)
    strap = half * c.p(7, 0.3, 0.55)
    c.paint(box(side, c.y, strap, top * 0.6, 0.03, top * 0.11, 0.01), WOOD, 0.0)
    c.paint(box(side, c.y, strap, top * 0.5, 0.04, 0.025, 0.008), (245, 205, 90), 0.0)


def house(c: ObjectCanvas) -> None:
    """A house; walls, roof, chimney, door and windows vary."""
    half, wall = c.p(0, 0.25, 0.43), c.p(1, 0.32, 0.58)
    ridge, eave = wall + c.p(2, 0.16, 0.38), half + c.p(3, 0.03, 0.08)
    chimney = half * c.p(4, 0.35, 0.65)
    c.paint(box(c.x, c.y, chimney, ridge - 0.11, 0.045, 0.12), (176, 92, 74))
    c.paint(box(c.x, c.y, chimney, ridge + 0.01, 0.06, 0.022), (205, 190, 180))
    c.paint(box(c.x, c.y, 0.0, wall / 2, half, wall / 2), "body", 0.1)
    c.glow(box(c.x, c.y, 0.0, wall, half, 0.03), (20, 15, 40), 0.35, 0.07)
    flat = c.p(5, 0.0, 0.30) * half
    c.paint(
        polygon(c.x, c.y, (-eave, wall), (eave, wall), (flat + 0.005, ridge), (-flat - 0.005, ridge)), "accent", 0.12
    )
    door, tall = half * 0.24, wall * c.p(6, 0.50, 0.66)
    frame = torch.minimum(box(c.x, c.y, 0.0, tall / 2, door, tall / 2), circle(c.x, c.y, 0.0, tall, door))
    c.paint(frame, WOOD, 0.1)
    c.paint(circle(c.x, c.y, door * 0.55, tall * 0.5, 0.014), (250, 215, 90), 0.0, 0.0)
    size, radius = half * 0.2, c.p(7, 0.0, 1.0)
    u, v = c.x.abs() - half * 0.64, c.y - wall * 0.58
    c.paint(box(u, v, 0.0, 0.0, size, size, radius * size), GLASS, 0.0)
    cross = torch.maximum(torch.minimum(u.abs(), v.abs()) - 0.007, torch.maximum(u.abs(), v.abs()) - size)
    c.paint(cross, LIGHT, 0.0, 0.0)


def umbrella(c: ObjectCanvas) -> None:
    """An open umbrella; canopy, scallops, stick and hook vary."""
    width, top, low = c.p(0, 0.36, 0.50), c.p(1, 0.84, 0.95), c.p(2, 0.44, 0.58)
    hook = c.p(3, 0.05, 0.095)
    c.paint(box(c.x, c.y, 0.0, (top + hook) / 2, 0.016, (top - hook) / 2 + 0.03), WOOD, 0.0)
    bend = ring(circle(c.x, c.y, hook, hook + 0.02, hook), 0.02)
    c.paint(torch.maximum(bend, c.y - hook - 0.02), WOOD, 0.0)
    c.paint(box(c.x, c.y, 0.0, top + 0.03, 0.016, c.p(4, 0.02, 0.06), 0.01), DARK, 0.0)
    height = top - low
    dome = ellipse(c.x, c.y, 0.0, low, width, height)
    count = 4.0
    cell = (c.x / width * count / 2 + count / 2).clamp(0, count - 1e-3)
    offset = (cell - cell.floor() - 0.5) * 2 * width / count
    arch = ellipse(offset, c.y, 0.0, low - 0.005, width / count, c.p(5, 0.03, 0.10))
    canopy = both(both(dome, low - c.y, 0.01), -arch, 0.01)
    c.paint(canopy, "body", 0.14)
    c.glow(ellipse(c.x, c.y, -0.4 * width, low + 0.66 * height, 0.09, 0.03), SHINE, 0.4, 0.08)
    rib = ring(ellipse(c.x, c.y, 0.0, low, width * 0.48, height), 0.007)
    c.paint(torch.maximum(rib, canopy + 0.012), "accent", 0.0, 0.0)
    c.paint(
        torch.maximum(box(c.x, c.y, 0.0, low + 0.5 * height, 0.006, 0.5 * height), canopy + 0.012), "accent", 0.0, 0.0
    )
