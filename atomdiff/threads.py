"""What each thread has for itself."""

from __future__ import annotations

import threading
from typing import Any


class ThisThread(threading.local):
    """A value of each thread's own, None at first; copies start anew. Compiled code looks at it again in each call."""

    value: Any

    def __init__(self) -> None:
        self.value = None

    def __reduce__(self) -> Any:
        return ThisThread, ()
