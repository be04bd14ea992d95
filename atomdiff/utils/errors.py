"""The one exception for problems that the person at the keyboard can solve, and warnings at the line that led there."""

import sys
import warnings

_PASSED_OVER = ("atomdiff", "contextlib")


class UserError(ValueError):
    """Wrong input, whose message says what was found, what was expected and what to do.

    Scripts print the message as one line, without a traceback.
    """


def warn(message: str) -> None:
    """Warn the user, at the line outside of this package that led here."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _PASSED_OVER:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)
