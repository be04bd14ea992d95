"""Things that move: car, boat, rocket, balloon, robot."""

from __future__ import annotations

import torch

from atomdiff.toybox.world.canvas import ObjectCanvas
from atomdiff.toybox.world.distances import both, box, circle, ellipse, line, polygon, ring, taper

LIGHT, DARK, GLASS, WOOD = (243, 240, 232), (52, 48, 58), (176, 220, 242), (142, 98, 60)
FLAME, STEEL, SHINE = (252, 160, 44), (168, 174, 186), (255, 255, 255)


def car(c: ObjectCanvas) -> None:
    """A car; body, cabin, wheels and their places vary."""
    wheel, belt = c.p(4, 0.10, 0.145), c.p(0, 0.30, 0.42)
    roof = belt + c.p(1, 0.17, 0.29)
    front, rear = -0.5 + c.p(2, 0.16, 0.30), 0.5 - c.p(3, 0.04, 0.22)
    slant, back = c.p(7, 0.07, 0.16), c.p(3, 0.03, 0.10)
    x, y = c.x, c.y
    cabin = polygon(
        x, y, (front, belt - 0.03), (rear, belt - 0.03), (rear - back, roof), (front + slant, roof), radius=0.06
    )
    c.paint(cabin, "accent", 0.1)
    pillar = (front + rear + slant) / 2
    glass = torch.maximum(cabin + 0.045, 0.022 - (x - pillar).abs())
    c.paint(torch.maximum(glass, belt + 0.012 - y), GLASS, 0.0, 0.013)
    low = wheel * 0.75
    body = box(x, y, 0.0, (belt + low) / 2, 0.5, (belt - low) / 2, c.p(6, 0.05, 0.11))
    c.paint(body, "body", 0.16)
    c.paint(box(x, y, pillar + 0.07, belt - 0.07, 0.035, 0.011, 0.01), LIGHT, 0.0, 0.01)
    c.paint(ellipse(x, y, -0.47, belt - 0.075, 0.035, 0.04), (255, 236, 150), 0.0, 0.014)
    c.paint(box(x, y, 0.485, belt - 0.08, 0.022, 0.035, 0.01), (225, 50, 50), 0.0, 0.014)
    gap = c.p(5, 0.27, 0.345)
    u = x.abs() - gap
    c.glow(circle(u, y, 0.0, wheel, wheel + 0.02), (20, 15, 30), 0.7, 0.03)
    c.paint(circle(u, y, 0.0, wheel, wheel), DARK, 0.0)
    hub = wheel * c.p(6, 0.42, 0.66)
    c.paint(circle(u, y, 0.0, wheel, hub), STEEL, 0.0, 0.012)
    c.paint(circle(u, y, 0.0, wheel, hub * 0.4), "accent", 0.0, 0.01)


def boat(c: ObjectCanvas) -> None:
    """A sailing boat; hull, mast and sails vary."""
    deck, mast = c.p(1, 0.20, 0.32), c.p(2, 0.82, 0.98)
    half, flare = c.p(0, 0.38, 0.5), c.p(5, 0.08, 0.24)
    at = c.p(6, -0.10, 0.06)
    x, y = c.x, c.y
    c.paint(box(x, y, at, (deck + mast) / 2, 0.016, (mast - deck) / 2 + 0.02), WOOD, 0.0)
    flag = polygon(x, y, (at, mast - 0.06), (at + 0.11, mast - 0.025), (at, mast + 0.01))
    c.paint(flag, "accent", 0.0)
    boom, bulge = deck + c.p(7, 0.05, 0.09), c.p(7, 0.0, 0.09)
    reach, peak = c.p(3, 0.24, 0.36), mast - 0.08
    curve = bulge * (1 - ((y - (boom + peak) / 2) / ((peak - boom) / 2)) ** 2).clamp(0, 1)
    main = polygon(x - curve, y, (at + 0.03, boom), (at + reach, boom), (at + 0.05, peak))
    main = torch.maximum(main, at + 0.03 - x)
    c.paint(main, "body", 0.1)
    jib = c.p(4, 0.16, 0.32)
    fore = polygon(x, y, (at - 0.03, boom + 0.02), (at - 0.045, peak - c.p(4, 0.16, 0.04)), (at - jib, boom + 0.02))
    c.paint(fore, LIGHT, 0.1)
    keel = half - flare
    hull = polygon(
        x, y, (-half, deck), (-keel, 0.0 * deck), (keel + 0.05, 0.0 * deck), (half, deck + 0.03), radius=0.05
    )
    c.paint(hull, "body", 0.16)
    strake = torch.maximum((y - deck + 0.05).abs() - 0.022, hull + 0.004)
    c.paint(strake, "accent", 0.0, 0.013)


def rocket(c: ObjectCanvas) -> None:
    """A rocket; hull, nose, fins, windows and flame vary."""
    base, top, half = 0.20, c.p(1, 0.84, 0.99), c.p(0, 0.15, 0.23)
    x, y = c.x, c.y
    side = x.abs()
    long = c.p(6, 0.08, 0.16)
    for size, color in ((1.0, FLAME), (0.55, (255, 232, 120))):
        c.paint(
            polygon(
                x,
                y,
                (-half * 0.6 * size, base),
                (0.0 * half, base - long * size - 0.02),
                (half * 0.6 * size, base),
                radius=0.03,
            ),
            color,
            0.0,
            0.014 if size == 1.0 else 0.0,
        )
    fin, sweep, tall = c.p(3, 0.09, 0.20), c.p(4, 0.0, 0.12), c.p(3, 0.30, 0.40)
    wing = polygon(
        side,
        y,
        (half * 0.6, base + 0.02),
        (half + fin, base - sweep),
        (half + fin, base - sweep + 0.09),
        (half * 0.6, base + tall),
        radius=0.02,
    )
    c.paint(wing, "accent")
    t = ((y - base) / (top - base)).clamp(0, 1)
    blunt = c.p(2, 1.9, 4.0)
    radius = half * (1 - t**blunt) * (0.80 + 0.20 * (t * 3).clamp(max=1))
    hull = both((side - radius) * 0.85, base - y, 0.03)
    hull = torch.maximum(hull, y - top)
    c.paint(hull, "body", 0.22)
    nose = base + (top - base) * c.p(5, 0.74, 0.84)
    c.paint(torch.maximum(hull, nose - y), "accent", 0.2)
    c.paint(taper(x, y, base - 0.04, base + 0.025, half * 0.75, half * 0.86, 0.015), STEEL, 0.1)
    pane = half * c.p(5, 0.34, 0.52)
    high = base + (top - base) * 0.60
    c.paint(circle(x, y, 0.0, high, pane + 0.02), LIGHT, 0.1, 0.014)
    c.paint(circle(x, y, 0.0, high, pane), GLASS, 0.0, 0.012)
    c.glow(line(x, y, -pane * 0.4, high, -pane * 0.1, high + pane * 0.45, 0.008), SHINE, 0.9, 0.02)
    second = half * 0.30 * c.p(7, 0.0, 1.0)
    c.paint(circle(x, y, 0.0, base + (top - base) * 0.25, second), GLASS, 0.0, 0.013)
    c.glow(line(x, y, -half * 0.55, base + 0.15, -half * 0.5, nose - 0.1, 0.006), SHINE, 0.45, 0.045)


def balloon(c: ObjectCanvas) -> None:
    """A hot-air balloon; envelope, ropes and basket vary."""
    rx, ry = c.p(0, 0.28, 0.38), c.p(1, 0.28, 0.36)
    basket, deep = c.p(2, 0.075, 0.13), c.p(3, 0.10, 0.16)
    x, y = c.x, c.y
    side = x.abs()
    middle = 0.985 - ry
    throat = deep + c.p(4, 0.07, 0.15)
    neck = c.p(5, 0.06, 0.13)
    c.paint(line(side, y, basket * 0.8, deep, neck * 0.85, throat + 0.03, 0.008), DARK, 0.0, 0.0)
    cone = taper(x, y, throat, middle - 0.25 * ry, neck, rx * c.p(6, 0.80, 0.93), 0.03)
    envelope = torch.minimum(ellipse(x, y, 0.0, middle, rx, ry), cone)
    c.paint(envelope, "body", 0.22)
    seam = torch.maximum(ring(ellipse(x, y, 0.0, middle, rx * 0.5, ry * 1.02), 0.005), envelope + 0.015)
    c.paint(torch.maximum(seam, middle - 0.3 * ry - y), "accent", 0.0, 0.0)
    c.glow(ellipse(x, y, -0.42 * rx, middle + 0.42 * ry, 0.06, 0.08), SHINE, 0.5, 0.1)
    band = throat + c.p(7, 0.04, 0.12)
    c.paint(torch.maximum(envelope, y - band), "accent", 0.1)
    c.paint(taper(x, y, 0.0 * deep, deep, basket * 0.85, basket, 0.025), (186, 134, 78), 0.14)
    c.paint(box(x, y, 0.0, deep, basket + 0.015, 0.02, 0.015), WOOD, 0.0)


def robot(c: ObjectCanvas) -> None:
    """A robot; head, trunk, arms, legs, eyes and antenna vary."""
    leg, wide, tall = c.p(5, 0.12, 0.22), c.p(2, 0.18, 0.28), c.p(3, 0.28, 0.38)
    head, high = c.p(0, 0.14, 0.24), c.p(1, 0.10, 0.14)
    x, y = c.x, c.y
    side = x.abs()
    trunk = leg + tall
    face = trunk + 0.035 + high
    tip = face + high + c.p(7, 0.02, 0.09)
    c.paint(line(x, y, 0.0, face + high, 0.0, tip, 0.012), DARK, 0.0, 0.0)
    c.paint(circle(x, y, 0.0, tip + 0.02, 0.034), FLAME, 0.1, 0.015)
    c.paint(box(x, y, 0.0, trunk + 0.02, 0.06, 0.05), STEEL, 0.0)
    hand_x, hand_y = wide + c.p(4, 0.06, 0.15), leg + tall * c.p(4, 0.25, 0.6)
    shoulder = trunk - 0.07
    c.paint(line(side, y, wide, shoulder, hand_x, hand_y, 0.033), STEEL, 0.1)
    c.paint(circle(side, y, hand_x, hand_y - 0.01, 0.055), "accent", 0.1)
    c.paint(box(side, y, wide * 0.5, leg / 2 + 0.01, 0.055, leg / 2 + 0.02), STEEL, 0.1)
    c.paint(both(ellipse(side, y, wide * 0.5 + 0.015, 0.02, 0.095, 0.075), -y, 0.02), "accent", 0.1)
    c.paint(box(x, y, 0.0, leg + tall / 2, wide, tall / 2, 0.045), "body", 0.14)
    c.paint(box(x, y, 0.0, face, head, high, 0.05), "accent", 0.14)
    c.paint(box(side, y, head + 0.015, face, 0.02, high * 0.45, 0.01), STEEL, 0.0, 0.015)
    size = c.p(6, 0.035, 0.055)
    c.paint(circle(side, y, head * 0.46, face + 0.02, size), LIGHT, 0.0, 0.014)
    c.paint(circle(side, y, head * 0.46, face + 0.02, size * 0.5), DARK, 0.0, 0.0)
    c.paint(box(x, y, 0.0, face - high * 0.55, head * 0.5, 0.014, 0.012), LIGHT, 0.0, 0.012)
