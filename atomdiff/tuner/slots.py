"""Slots: children that a module gets for adapters of what it computes inside, and a forward that calls them.

The module stays the same object at the same path, so that adapters of the layers in it, and their files, are not
concerned. As with PyTorch's parametrizations, it has a subclass of its own class while it has slots.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache, partial, wraps
from types import MethodType
from typing import Any, cast

from torch import nn

_SLOTS = "adapter_slots"
Run = Callable[..., Any]
"""A forward with slots, see `add_slot`."""


def add_slot(module: nn.Module, name: str, run: Run) -> nn.Module:
    """Give a module a slot, which at first holds an `Identity`; it may have it already.

    Several tuners may have slots in one module. Their forwards are nested, in an order that does not depend on which
    came first.

    Args:
        module: is called with its slots from now on.
        name: that of the child.
        run: takes the module, the class that it had, and the arguments of its forward, which it gives the result of.

    Returns:
        What the slot holds.

    Raises:
        ValueError: another library has replaced the module's forward, which would pass the slots by.
    """
    slots: dict[str, Run] = vars(module).get(_SLOTS, {})
    if "forward" in vars(module) and run not in slots.values():
        raise ValueError(
            f"another library has replaced the forward of this {type(module).__name__}, as offloading does: add the "
            "adapter before"
        )
    if name not in slots:
        _set_slots(module, {**slots, name: run})
        module.add_module(name, nn.Identity().train(module.training))
    return module.get_submodule(name)


def remove_empty_slots(module: nn.Module) -> None:
    """Take the slots away in which there is no adapter; without any, a module is of its own class again."""
    slots: dict[str, Run] = vars(module).get(_SLOTS, {})
    empty = sorted(name for name in slots if type(module._modules[name]) is nn.Identity)
    for name in empty:
        del module._modules[name]
    if empty:
        _set_slots(module, {name: run for name, run in slots.items() if name not in empty})


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


def _set_slots(module: nn.Module, slots: dict[str, Run]) -> None:
    """Note the slots of a module, and give it the class that goes with them."""
    kind: Any = type(module)
    own = kind.without_slots if _SLOTS in vars(module) else kind
    vars(module).pop(_SLOTS, None)
    if slots:
        vars(module)[_SLOTS] = slots
    module.__class__ = _with_slots(own, _ordered(slots.values()))


def _ordered(runs: Iterable[Run]) -> tuple[Run, ...]:
    return tuple(sorted(set(runs), key=lambda run: (run.__module__, run.__qualname__)))


@cache
def _with_slots(own: Any, runs: tuple[Run, ...]) -> Any:
    """The subclass whose forward is the last of `runs` around the others; its name is that of `own`, as in pickles."""
    if not runs:
        return own
    *inner, run = runs
    cls = _with_slots(own, tuple(inner))

    @wraps(own.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if run not in vars(self).get(_SLOTS, {}).values():  # taken away since accelerate's hooks came, which call this
            return cls.forward(self, *args, **kwargs)
        return run(self, cls, *args, **kwargs)

    def reduce(self: nn.Module, protocol: int) -> tuple[Any, ...]:
        _, _, *state = cast(tuple[Any, ...], object.__reduce_ex__(self, max(protocol, 2)))
        return (_new_with_slots, (own, runs), *state)

    names = {name: getattr(own, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(own.__name__, (cls,), {**names, "forward": forward, "__reduce_ex__": reduce, "without_slots": own})


def _new_with_slots(own: Any, runs: tuple[Run, ...]) -> Any:
    """A module with slots that has no state yet, for pickles and copies."""
    return object.__new__(_with_slots(own, runs))
