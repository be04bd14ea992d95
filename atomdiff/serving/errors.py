"""Errors as answers of the server: a status, and JSON that says what was found, what was expected and what to do."""

from __future__ import annotations

from typing import Any


class NotFoundError(Exception):
    """There is nothing of the name that was asked for."""


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
    """Return an error in the shape of OpenAI's API."""
    kind = KINDS.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": None, "code": status}}
