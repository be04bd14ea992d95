"""The classes of things, each with the function that paints it; shape parameters are continuous."""

from __future__ import annotations

from collections.abc import Callable

from atomdiff.toybox.world import things_alive, things_house, things_moving
from atomdiff.toybox.world.canvas import ObjectCanvas

SHAPE_PARAMETERS = 8
THINGS: dict[str, Callable[[ObjectCanvas], None]] = {
    "mug": things_house.mug,
    "teapot": things_house.teapot,
    "car": things_moving.car,
    "house": things_house.house,
    "cat": things_alive.cat,
    "bird": things_alive.bird,
    "fish": things_alive.fish,
    "robot": things_moving.robot,
    "boat": things_moving.boat,
    "umbrella": things_house.umbrella,
    "rocket": things_moving.rocket,
    "mushroom": things_alive.mushroom,
    "vase": things_house.vase,
    "balloon": things_moving.balloon,
    "backpack": things_house.backpack,
    "lamp": things_house.lamp,
}
CLASSES = tuple(THINGS)
