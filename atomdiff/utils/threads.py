"""What each thread has for itself, and calls that threads make one at a time."""

from __future__ import annotations

import sys
import threading
from typing import Any

_LOCK = threading.Lock()


class ThreadLocal(threading.local):
    """A value of each thread's own, None at first; copies start anew. Compiled code looks at it again in each call."""

    value: Any

    def __init__(self) -> None:
        self.value = None

    def __reduce__(self) -> Any:
        return ThreadLocal, ()


class CallLock:
    """Lets the calls of one thread at a time into a model; copies are free."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._owner: int | None = None

    def take(self, model: Any) -> None:
        """Wait until no other thread is in a call of the model."""
        me = threading.get_ident()
        while self._owner != me:  # an interrupt may have ended a call without `give`
            if self._lock.acquire(timeout=1):
                self._owner = me
            else:
                self._take_over(model, me)

    def give(self) -> None:
        """Let another thread in."""
        if self._owner == threading.get_ident():
            self._owner = None
            self._lock.release()

    def _take_over(self, model: Any, me: int) -> None:
        with _LOCK:
            frame = None if self._owner is None else sys._current_frames().get(self._owner)
            while frame is not None and frame.f_locals.get("self") is not model:
                frame = frame.f_back
            if frame is None and self._owner is not None:
                self._owner = me

    def __reduce__(self) -> Any:
        return CallLock, ()
