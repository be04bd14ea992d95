"""Changes of objects that belong to others: each is an exact inverse of itself, also with exceptions and threads.

What is changed lies in an object's own `__dict__`, and so in copies of the object, but not in others of its class.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

Hook = Callable[[Any, tuple[Any, ...], dict[str, Any]], None]
"""Is given a model, the arguments and the keywords of a call."""
MISSING: Any = inspect.Parameter.empty  # an attribute that an object does not have; its copies are itself

_LOCK = threading.RLock()
_OVERRIDES: dict[tuple[int, str], _Override] = {}


class _Override:
    """The values that several callers give an attribute of one object at a time; the latest that is in use counts."""

    def __init__(self, owner: Any, name: str) -> None:
        self.owner, self.name, self.values = owner, name, [[vars(owner).get(name, MISSING)]]

    def add(self, entry: list[Any]) -> None:
        self.values.append(entry)
        _set(self.owner, self.name, entry[0])

    def remove(self, entry: list[Any]) -> None:
        shown = self.values[-1][0]
        self.values = [each for each in self.values if each is not entry]
        if vars(self.owner).get(self.name, MISSING) is shown:  # else somebody has set it meanwhile
            _set(self.owner, self.name, self.values[-1][0])


@contextmanager
def attributes_set(owner: Any, **values: Any) -> Iterator[None]:
    """Within, an object has these attributes of its own; what others set meanwhile stays. `MISSING` hides one."""
    entries = {name: [value] for name, value in values.items()}
    with _LOCK:
        for name, entry in entries.items():
            _OVERRIDES.setdefault((id(owner), name), _Override(owner, name)).add(entry)
    try:
        yield
    finally:
        with _LOCK:
            for name, entry in entries.items():
                override = _OVERRIDES[id(owner), name]
                override.remove(entry)
                if len(override.values) == 1:
                    del _OVERRIDES[id(owner), name]


def _set(owner: Any, name: str, value: Any) -> None:
    if value is MISSING:
        vars(owner).pop(name, None)
    else:
        vars(owner)[name] = value


class ReplacedMethod:
    """A method of one object in place of its class's, with the same signature; copies of the object have their own."""

    def __init__(self, owner: Any, name: str, function: Callable[..., Any]) -> None:
        self.owner, self.name, self.function = owner, name, function
        self.before = vars(owner).get(name, MISSING)
        if isinstance(self.before, ReplacedMethod):
            self.before = self.before.before

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function with the object first."""
        return self.function(self.owner, *args, **kwargs)

    @property
    def __signature__(self) -> inspect.Signature:
        """Pipelines look at what a model's `save_pretrained` takes."""
        return inspect.signature(getattr(type(self.owner), self.name).__get__(self.owner))


def replace_methods(owner: Any, functions: Mapping[str, Callable[..., Any]]) -> None:
    """Give an object other methods, of those that it has, until `restore_methods`; each is given the object first."""
    for name, function in functions.items():
        if hasattr(type(owner), name):
            vars(owner)[name] = ReplacedMethod(owner, name, function)


def restore_methods(owner: Any, names: Iterable[str]) -> None:
    """Give an object back the methods that `replace_methods` has replaced."""
    for name in names:
        replaced = vars(owner).get(name)
        if isinstance(replaced, ReplacedMethod):
            _set(owner, name, replaced.before)


class _WrappedMethod:
    """A method of one object with functions around it, the first one outermost."""

    def __init__(self, owner: Any, name: str) -> None:
        self.before, self.method = vars(owner).get(name, MISSING), getattr(owner, name)
        self.wrappers: tuple[Callable[..., Any], ...] = ()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call = self.method
        for wrapper in reversed(self.wrappers):
            call = partial(wrapper, call)
        return call(*args, **kwargs)


def wrap_method(owner: Any, name: str, wrapper: Callable[..., Any]) -> Callable[[], None]:
    """Call a function in place of a method of one object; it is given the method, then the arguments.

    Returns:
        What undoes this; several may wrap a method, and stop in any order. A copy of it undoes this in the copy.
    """
    with _LOCK:
        wrapped = vars(owner).get(name)
        if not isinstance(wrapped, _WrappedMethod):
            wrapped = vars(owner)[name] = _WrappedMethod(owner, name)
        wrapped.wrappers = (*wrapped.wrappers, wrapper)
    return partial(_unwrap, owner, name, wrapped, wrapper)


def _unwrap(owner: Any, name: str, wrapped: _WrappedMethod, wrapper: Callable[..., Any]) -> None:
    with _LOCK:
        wrapped.wrappers = tuple(each for each in wrapped.wrappers if each is not wrapper)
        if not wrapped.wrappers and vars(owner).get(name) is wrapped:
            _set(owner, name, wrapped.before)


@contextmanager
def method_wrapped(owner: Any, name: str, wrapper: Callable[..., Any]) -> Iterator[None]:
    """`wrap_method` for the time of a block."""
    undo = wrap_method(owner, name, wrapper)
    try:
        yield
    finally:
        undo()


def before_calls(model: Any, hook: Hook, after: Callable[..., None] = lambda *_: None) -> Callable[[], None]:
    """Call a function before each call of a model, and another one after it, also where the call fails.

    Code compiled by `model.compile()` has hooks within it; the function is called before it, and nothing is recompiled.

    Returns:
        What undoes this.
    """
    if model._compiled_call_impl is not None:
        return wrap_method(model, "_compiled_call_impl", partial(_call_between, model, hook, after))
    handles = (
        model.register_forward_pre_hook(hook, with_kwargs=True),
        model.register_forward_hook(after, always_call=True),
    )
    return partial(_remove_all, handles)


def _call_between(
    model: Any, hook: Hook, after: Callable[..., None], call: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    try:
        hook(model, args, kwargs)
        return call(*args, **kwargs)
    finally:
        after()


def _remove_all(handles: Iterable[Any]) -> None:
    for handle in handles:
        handle.remove()
