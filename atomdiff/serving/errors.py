"""What can go wrong with a request beside its contents, and errors as answers of the server."""

from __future__ import annotations

from typing import Any


class NotFoundError(Exception):
    """There is nothing of the name that was asked for."""


class QueueFullError(Exception):
    """There are as many requests as the engine takes; `retry_after` seconds later there should be room."""

    def __init__(self, message: str, retry_after: int) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class EngineClosedError(Exception):
    """The engine takes no more requests, as it is being stopped."""


class RequestTimeoutError(Exception):
    """A request was not done in time."""


KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    409: "conflict_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "server_stopping",
    504: "timeout_error",
}


def error_body(status: int, message: str) -> dict[str, Any]:
    """Return an error, with a message that says what to do, in the shape of OpenAI's API."""
    kind = KINDS.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": None, "code": status}}
