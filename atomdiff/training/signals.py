"""How a training run is asked to stop."""

import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

_NAMES = ("SIGINT", "SIGTERM", "SIGBREAK")  # the last is Ctrl-Break, on Windows alone
_SAME_SIGNAL = 1.0  # seconds


class StopSignals:
    """A `with` block in which the first Ctrl-C, Ctrl-Break or SIGTERM only sets `requested`; a later one acts as usual.

    Launchers of several processes pass a Ctrl-C on to those who have heard it themselves: what comes within a second of
    the first is the same one.

    Raises:
        KeyboardInterrupt: At the block's end, in place of an error that it ends with once asked to stop. Such an error
            may be the end of another process, which the signal was to follow.
    """

    def __init__(self) -> None:
        self.requested = False
        self._since = 0.0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():  # others cannot handle signals
            for number in [getattr(signal, name) for name in _NAMES if hasattr(signal, name)]:
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()
        if self.requested and isinstance(error, Exception):
            raise KeyboardInterrupt(f"stopped; {type(error).__name__}: {error}") from error

    def _note(self, number: int, frame: FrameType | None) -> None:
        if not self.requested:
            self.requested, self._since = True, time.monotonic()
        elif time.monotonic() > self._since + _SAME_SIGNAL:
            self.__exit__(None, None, None)
            signal.raise_signal(number)
