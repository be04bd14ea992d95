"""Small parts that the tabs share."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import gradio as gr


def heading(title: str, text: str) -> None:
    """Add the heading of a part, with a line that says what to do."""
    gr.Markdown(f"### {title}\n{text}", elem_classes="step")


def showing_errors(function: Callable[..., Any]) -> Callable[..., Any]:
    """Show errors on the page: the messages of atomdiff and of the operating system; others are bugs, and called so."""
    if inspect.isgeneratorfunction(function):

        @functools.wraps(function)
        def yielding(*args: Any) -> Iterator[Any]:
            try:
                yield from function(*args)
            except Exception as error:
                raise _shown(error) from error

        return yielding

    @functools.wraps(function)
    def returning(*args: Any) -> Any:
        try:
            return function(*args)
        except Exception as error:
            raise _shown(error) from error

    return returning


def _shown(error: Exception) -> gr.Error:
    is_own = type(error).__module__.partition(".")[0] == "atomdiff"  # their messages are for users
    if is_own or isinstance(error, OSError):
        return gr.Error(str(error), duration=None, print_exception=False)
    found = f"{type(error).__name__}: {error}. This is a bug in atomdiff; its traceback is in the server's terminal"
    return gr.Error(found, duration=None)
