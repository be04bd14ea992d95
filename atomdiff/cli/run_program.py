"""The exit status of a program, and the one line that tells what went wrong."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable

from atomdiff.utils.errors import UserError

_GRACE_SECONDS = 20.0  # in which a launcher ends the other processes, once one has ended


def run_program(name: str, work: Callable[[], int | None]) -> int:
    """Do the work of a program called `name`; return its exit status, as `main` says: what `work` returns, if it ends.

    What goes wrong in one of several processes goes wrong in the others too, or cuts them off; so only one tells of it:
    the first of them if it meets a mistake or is stopped. All else waits, and the launcher ends the processes that wait
    as soon as one has ended. Asked to stop, it waits for all of them instead; so the others then end without a word.
    """
    first = os.environ.get("RANK", "0") == "0"  # from the launcher, if there is one
    several = os.environ.get("WORLD_SIZE", "1") != "1"

    def report(message: str) -> None:
        if not first:
            time.sleep(_GRACE_SECONDS)
        print(message, file=sys.stderr)

    try:
        try:
            status = work()
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # whoever reads the output has gone, as head does
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python would complain at its end
        return 141
    except (UserError, OSError) as error:
        report(f"{name}: error: {error}")
        return 2
    except SystemExit as end:
        if not isinstance(end.code, str):  # --help
            raise
        report(end.code)
        return 2
    except KeyboardInterrupt as stop:
        if first:
            print(str(stop) or "stopped", file=sys.stderr)
        return 130
    except Exception as error:
        if several and first:
            time.sleep(_GRACE_SECONDS)
        report(f"{name}: {_describe_bug(error)}")
        return 1
    return status or 0


def _describe_bug(error: Exception) -> str:
    """Say in one line what happened that no check has foreseen; its traceback goes to a file."""
    what = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    if isinstance(error, MemoryError) or "out of memory" in str(error) or "can't allocate memory" in str(error):
        return f"error: out of memory ({what}); take smaller images or batches, or shorten the list of prompts"
    trace = "".join(traceback.format_exception(error))
    try:
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", prefix="atomdiff-error-", suffix=".txt", delete=False
        ) as file:
            file.write(trace)
    except OSError:
        return f"error: {what}. This is a bug in atomdiff; please report it with these lines:\n{trace}"
    return f"error: {what}. This is a bug in atomdiff; please report it with {file.name}"
