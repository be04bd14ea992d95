"""What a request must be like before it is read: its key, its origin and its size."""

from __future__ import annotations

import base64
import hmac
from binascii import Error as Base64Error
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import SplitResult, urlsplit

from fastapi import HTTPException
from starlette.datastructures import Headers
from starlette.responses import JSONResponse

from atomdiff.serving.errors import error_body

Message = MutableMapping[str, Any]
_LOOPBACK = ("localhost", "127.0.0.1", "::1")
MAX_JSON_BYTES = 1 << 20
_OPEN_PATHS = ("/health", "/docs", "/openapi.json", "/static-offline-docs")


class Protection:
    """Middleware that refuses requests without the key, of other web sites, and with large bodies.

    Without a key a server on this machine answers to names of this machine only, and never to a page of another site:
    a browser sends what any page asks it to.

    Args:
        app: the application.
        host: the address that the server listens on.
        api_key: the key; None: none is asked for.
        max_bytes: of a body with a file; others have at most `MAX_JSON_BYTES`.
        on_refusal: called with the status of each refusal.
    """

    def __init__(
        self, app: Any, host: str, api_key: str | None, max_bytes: int, on_refusal: Callable[[int], None]
    ) -> None:
        self.app, self.host, self.api_key, self.max_bytes = app, host, api_key, max_bytes
        self.on_refusal = on_refusal

    async def __call__(
        self, scope: Message, receive: Callable[[], Awaitable[Message]], send: Callable[[Message], Awaitable[None]]
    ) -> None:
        """Answer, or let the application answer."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)  # type: ignore[arg-type]
        path = scope["path"].removeprefix(scope.get("root_path", ""))  # such as Ray's `route_prefix`
        if refusal := self._refuse(path, headers):
            self.on_refusal(refusal.status_code)
            await refusal(scope, receive, send)
            return
        received, most = 0, self._max_bytes(headers)

        async def receive_limited() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > most:
                raise BodyTooLargeError(most)
            return message

        await self.app(scope, receive_limited, send)

    def _refuse(self, path: str, headers: Headers) -> JSONResponse | None:
        host, origin = headers.get("host", ""), headers.get("origin")
        if origin is not None and (not host or _split(origin).netloc != host):
            return _answer(403, f"found a request from the web site {origin!r}; expected none of another site's pages")
        if self.api_key is None and self.host in _LOOPBACK and _split(f"//{host}").hostname not in _LOOPBACK:
            return _answer(403, f"found the host {host!r}; expected localhost: to serve others, set --api_key")
        length, most = headers.get("content-length", "0"), self._max_bytes(headers)
        if not length.isdecimal() or int(length) > most:
            return _answer(413, f"found a body of {length} bytes; expected at most {most}")
        if self.api_key is not None and not path.startswith(_OPEN_PATHS):
            if not hmac.compare_digest(_sent_key(headers).encode(), self.api_key.encode()):
                answer = _answer(401, "found no valid key; send the header 'Authorization: Bearer KEY'")
                answer.headers["WWW-Authenticate"] = "Bearer"
                return answer
        return None

    def _max_bytes(self, headers: Headers) -> int:
        is_form = headers.get("content-type", "").lower().startswith("multipart/form-data")
        return self.max_bytes if is_form else MAX_JSON_BYTES


class BodyTooLargeError(HTTPException):  # others FastAPI takes for errors of its parser
    """A body is larger than it may be."""

    def __init__(self, max_bytes: int) -> None:
        super().__init__(413, f"found a body of more than {max_bytes} bytes, the most that is taken; send less")


def _split(address: str) -> SplitResult:
    """Return the parts of an address; none of one that is damaged."""
    try:
        return urlsplit(address)
    except ValueError:  # such as half of a pair of brackets
        return SplitResult("", "", "", "", "")


def _answer(status: int, message: str) -> JSONResponse:
    return JSONResponse(error_body(status, message), status)


def _sent_key(headers: Headers) -> str:
    """The key of a request: a bearer token, or the password of a client that knows users."""
    kind, _, value = headers.get("authorization", "").partition(" ")
    if kind.lower() == "basic":
        try:
            return base64.b64decode(value, validate=True).decode().partition(":")[2]
        except (Base64Error, UnicodeDecodeError):
            return ""
    return value.strip() if kind.lower() == "bearer" else ""
