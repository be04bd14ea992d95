"""What is changed of an object of others is afterwards as it was: with exceptions, in any order, and in threads."""

import copy
import inspect
import threading
from functools import partial

import pytest
import torch
from torch import nn

from atomdiff.pipelines.hooks import (
    MISSING,
    attributes_set,
    before_calls,
    method_wrapped,
    replace_methods,
    restore_methods,
    wrap_method,
)


class Thing:
    """Something that others own."""

    def double(self, x, *, plus=0):
        return 2 * x + plus


@pytest.fixture(params=["of the class", "of its own"])
def thing(request):
    made = Thing()
    made.known = 1
    if request.param == "of its own":
        made.double = lambda x, plus=0: 3 * x + plus
    before = dict(vars(made))
    yield made
    assert vars(made) == before


def test_attributes_are_set_for_the_time_of_a_block(thing):
    with pytest.raises(KeyError), attributes_set(thing, known=2, new=3):
        assert (thing.known, thing.new) == (2, 3)
        with attributes_set(thing, known=MISSING):
            assert not hasattr(thing, "known") and thing.new == 3
        assert thing.known == 2
        raise KeyError


def test_blocks_may_end_in_any_order(thing):
    first, second = attributes_set(thing, known=2), attributes_set(thing, known=3)
    first.__enter__(), second.__enter__()
    first.__exit__(None, None, None)
    assert thing.known == 3
    second.__exit__(None, None, None)
    assert thing.known == 1


def test_what_others_set_meanwhile_stays():
    thing = Thing()
    with attributes_set(thing, known=2):
        thing.known = 5
    assert thing.known == 5


def test_methods_are_wrapped_the_first_outermost(thing):
    own = thing.double(1)
    seen = []

    def wrapper(name):
        return lambda call, x: seen.append(name) or call(x) + 1

    outer = wrap_method(thing, "double", wrapper("outer"))
    with pytest.raises(KeyError), method_wrapped(thing, "double", wrapper("inner")):
        assert thing.double(1) == own + 2 and seen == ["outer", "inner"]
        outer()
        outer()  # once is enough
        assert thing.double(1) == own + 1 and seen[2:] == ["inner"]
        raise KeyError


def test_methods_are_replaced_with_their_signature(thing):
    replace_methods(thing, {"double": lambda self, x: (self, x), "other": print})
    replace_methods(thing, {"double": lambda self, x: (x, self)})
    assert thing.double(1) == (1, thing) and not hasattr(thing, "other")
    assert list(inspect.signature(thing.double).parameters) == ["x", "plus"]
    copied = copy.deepcopy(thing)
    assert copied.double(1) == (1, copied)
    restore_methods(copied, ["double", "other"])
    assert copied.double(1) == 3 if "double" in vars(copied) else copied.double(1) == 2
    restore_methods(thing, ["double", "other"])
    restore_methods(thing, ["double"])


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("fails", [False, True])
def test_functions_are_called_before_and_after_a_model(compiled, fails):
    model, seen = nn.Linear(2, 2), []
    if compiled:
        model.compile(backend="eager")
    before = dict(vars(model))
    undo = [
        before_calls(model, lambda m, args, kwargs, n=n: seen.append((n, m, len(args))), lambda *_, n=n: seen.append(n))
        for n in "ab"
    ]
    try:
        model(torch.ones(1, 3 if fails else 2))
    except Exception:
        assert fails
    assert seen[:2] == [("a", model, 1), ("b", model, 1)] and sorted(seen[2:]) == ["a", "b"]
    for each in undo:
        each()
        each()
    assert vars(model) == before and not model._forward_pre_hooks and not model._forward_hooks


def note(seen, *_):
    seen.append(1)


def test_what_undoes_a_hook_is_copied_with_the_model():
    model, seen = nn.Linear(2, 2), []
    undo = before_calls(model, partial(note, seen))
    copied, undo_copied = copy.deepcopy((model, undo))
    undo_copied()
    assert not copied._forward_pre_hooks and len(model._forward_pre_hooks) == 1
    undo()
    assert not model._forward_pre_hooks


def test_threads_come_and_go():
    thing, errors = Thing(), []
    thing.known = 1
    before, start = dict(vars(thing)), threading.Barrier(4)

    def run(number):
        try:
            start.wait()
            for _ in range(300):
                with attributes_set(thing, known=number, new=number):
                    with method_wrapped(thing, "double", lambda call, x: call(x)):
                        assert thing.double(2) == 4
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and vars(thing) == before
