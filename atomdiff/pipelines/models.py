"""The models of a pipeline, and a lock for those who change them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

_LOCKS: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()  # model or tokenizer -> RLock
_LOCK = threading.Lock()  # of the locks


def pipeline_models(pipe: Any) -> dict[str, nn.Module]:
    """Component name -> model, for all parts that are models; of what `torch.compile` gave the model within."""
    parts = {name: getattr(part, "_orig_mod", part) for name, part in pipe.components.items()}
    return {name: part for name, part in parts.items() if isinstance(part, nn.Module)}


def changeable_parts(pipe: Any) -> list[Any]:
    """What concepts change: the models and tokenizers of a pipeline."""
    tokenizers = [part for name, part in pipe.components.items() if "token" in name and part is not None]
    return [*pipeline_models(pipe).values(), *tokenizers]


@contextmanager
def locked(pipe: Any) -> Iterator[None]:
    """Keep other threads from changing the concepts of a pipeline for the time of a `with` block.

    What loads, unloads, merges and switches concepts takes turns by itself, also through other pipelines that share the
    models. Calls of a pipeline do not: where several threads change concepts, each holds this lock from its change to
    the end of the call that is to see it. A thread may take it several times.

    Args:
        pipe: a diffusers pipeline.
    """
    with _LOCK:
        locks = [_LOCKS.setdefault(part, threading.RLock()) for part in sorted(changeable_parts(pipe), key=id)]
    with ExitStack() as stack:
        for lock in locks:  # always in the same order, so that no two threads wait for each other
            stack.enter_context(lock)
        yield
