"""Slots: children that a module gets for adapters of what it computes inside, and a forward that calls them.

The module stays the same object at the same path, so that adapters of the layers in it, and their files, are not
concerned. As with PyTorch's parametrizations, it has a subclass of its own class while it has slots.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial, wraps
from types import MethodType
from typing import Any, cast

from torch import nn

_SLOTS = "adapter_slots"


def add_slot(module: nn.Module, name: str, run: Callable[..., Any]) -> nn.Module:
    """Give a module a slot, which at first holds an `Identity`; it may have it already.

    Args:
        module: is called with its slots from now on.
        name: that of the child.
        run: takes the module, the class that it had, and the arguments of its forward, which it gives the result of.

    Returns:
        What the slot holds.

    Raises:
        ValueError: another library has replaced the module's forward, which would pass the slots by.
    """
    if "forward" in vars(module):
        raise ValueError(
            f"another library has replaced the forward of this {type(module).__name__}, as offloading does: add the "
            "adapter before"
        )
    if _SLOTS not in vars(module):
        vars(module)[_SLOTS] = set()
        module.__class__ = _with_slots(cast(Any, type(module)), run)
    if name not in vars(module)[_SLOTS]:
        vars(module)[_SLOTS].add(name)
        module.add_module(name, nn.Identity().train(module.training))
    return module.get_submodule(name)


def remove_empty_slots(module: nn.Module) -> None:
    """Take the slots away in which there is no adapter; without any, a module is of its own class again."""
    slots: set[str] = vars(module).get(_SLOTS, set())
    for name in sorted(slots):
        if type(module._modules[name]) is nn.Identity:
            slots.remove(name)
            del module._modules[name]
    if _SLOTS in vars(module) and not slots:
        del vars(module)[_SLOTS]
        module.__class__ = cast(Any, type(module)).without_slots


def replace_children(module: nn.Module, cls: type[nn.Module], **children: Any) -> Any:
    """A copy of a module, for one call, with other children, which the module and other threads never see.

    Args:
        module: shares all else with its copy.
        cls: the class of the copy, so its forward.
        **children: by name; anything that its forward calls or goes through.
    """
    copied = object.__new__(cls)
    vars(copied).update(vars(module))
    vars(copied)["_modules"] = {**module._modules, **children}
    if (
        getattr(vars(module).get("_old_forward"), "__self__", None) is module
    ):  # by accelerate, which calls it with hooks
        vars(copied)["_old_forward"] = MethodType(cls.forward, copied)
        vars(copied)["forward"] = partial(vars(module)["forward"].func, copied)
    return copied


@cache
def _with_slots(cls: Any, run: Callable[..., Any]) -> Any:
    """The subclass whose forward is `run`; its name is the same, which others go by, and pickles name `cls`."""

    @wraps(cls.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if _SLOTS not in vars(self):  # taken away since accelerate's hooks were added, which call this forward
            return cls.forward(self, *args, **kwargs)
        return run(self, cls, *args, **kwargs)

    def reduce(self: nn.Module, protocol: int) -> tuple[Any, ...]:
        _, _, *state = cast(tuple[Any, ...], object.__reduce_ex__(self, max(protocol, 2)))
        return (_new_with_slots, (cls, run), *state)

    names = {name: getattr(cls, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(cls.__name__, (cls,), {**names, "forward": forward, "__reduce_ex__": reduce, "without_slots": cls})


def _new_with_slots(cls: Any, run: Callable[..., Any]) -> Any:
    """A module with slots that has no state yet, for pickles and copies."""
    return object.__new__(_with_slots(cls, run))
