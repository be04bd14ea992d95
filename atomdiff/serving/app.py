"""The HTTP application around an engine."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request, Security
from fastapi.exceptions import RequestValidationError
from fastapi.security import HTTPBearer
from fastapi_offline import FastAPIOffline
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from atomdiff.concepts.library_index import LibraryFolderError
from atomdiff.serving import concepts_api, openai_api, webui_api
from atomdiff.serving.config import EngineConfig
from atomdiff.serving.engine import Engine
from atomdiff.serving.errors import EngineClosedError, NotFoundError, QueueFullError, RequestTimeoutError, error_body
from atomdiff.serving.generation import ClientLeftError
from atomdiff.serving.metrics import Metrics
from atomdiff.serving.protection import BodyTooLargeError, Protection
from atomdiff.utils.errors import UserError
from atomdiff.utils.versions import atomdiff_version

_FORM_BYTES = 64 << 10  # of a body, beside a file
_MAX_MESSAGE = 2000  # characters of an error

_STATUS: dict[type[Exception], int] = {
    LibraryFolderError: 500,
    UserError: 400,
    NotFoundError: 404,
    FileExistsError: 409,
    QueueFullError: 429,
    ClientLeftError: 499,  # nobody reads it; as nginx logs it
    EngineClosedError: 503,
    RequestTimeoutError: 504,
}


def make_app(engine: Engine, config: EngineConfig, host: str = "127.0.0.1") -> FastAPI:
    """Make the application; its documentation at /docs needs no network. It closes the engine when it ends.

    Args:
        engine: what generates the images.
        config: what is served.
        host: the address that is listened on.
    """

    @asynccontextmanager
    async def closing(_: FastAPI) -> AsyncIterator[None]:
        yield
        await run_in_threadpool(engine.close, config.shutdown_timeout)

    app = FastAPIOffline(
        title="atomdiff",
        version=atomdiff_version(),
        description="Images with concepts: many requests share the denoising steps.",
        redoc_url=None,
        lifespan=closing,
        # For the page at /docs to ask for the key; it is checked before, by `Protection`.
        dependencies=[] if config.api_key is None else [Security(HTTPBearer(auto_error=False))],
    )
    app.state.engine, app.state.metrics = engine, Metrics(engine)
    app.state.model_name = config.pretrained_model_name_or_path.rstrip("/").rpartition("/")[2]
    for router in (openai_api.router, concepts_api.router, webui_api.router):
        app.include_router(router)
    app.add_api_route("/health", _health, methods=["GET"], tags=["server"])
    app.add_api_route("/health", _health, methods=["HEAD"], include_in_schema=False)  # as monitors ask
    app.add_api_route("/metrics", _metrics, methods=["GET"], tags=["server"], response_class=Response)
    for kind in (*_STATUS, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, _answer_error)
    max_bytes = int(config.max_upload_mb * 1e6) + _FORM_BYTES
    app.add_middleware(
        Protection,  # type: ignore[arg-type]
        host=host,
        api_key=config.api_key,
        max_bytes=max_bytes,
        on_refusal=app.state.metrics.count_refusal,
    )
    return app


def _health(http: Request) -> JSONResponse:
    """Tell whether requests are taken, and how many there are."""
    engine: Engine = http.app.state.engine
    state = {
        "status": "ok" if engine.is_running else "stopping",
        "model": http.app.state.model_name,
        "running": engine.num_running,
        "waiting": engine.num_waiting,
        "concepts": 0 if engine.concepts is None else len(engine.concepts.library),
    }
    return JSONResponse(state, 200 if engine.is_running else 503)


def _metrics(http: Request) -> Response:
    """Give the figures that Prometheus collects."""
    return Response(http.app.state.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


async def _answer_error(http: Request, error: Exception) -> Response:
    status, message = _describe(error)
    if (concepts := http.app.state.engine.concepts) is not None:
        message = message.replace(str(concepts.library.folder), "the library")
    if len(message) > _MAX_MESSAGE:  # it quotes what was sent
        message = f"{message[: _MAX_MESSAGE // 2]} ... {message[-_MAX_MESSAGE // 2 :]}"
    http.app.state.metrics.count_refusal(status)
    headers = error.headers if isinstance(error, HTTPException) else None  # such as Allow
    answer = JSONResponse(error_body(status, message), status, headers)
    if isinstance(error, QueueFullError):
        answer.headers["Retry-After"] = str(error.retry_after)
    return answer


def _describe(error: Exception) -> tuple[int, str]:
    """Return the status and the message of an error."""
    if isinstance(error, RequestValidationError):
        if isinstance(error.body, bytes):
            return 400, "found a body that is not said to be JSON; send the header 'Content-Type: application/json'"
        return 400, "; ".join(map(_describe_field, error.errors()))
    if isinstance(error, BodyTooLargeError):
        return error.status_code, error.detail
    if isinstance(error, HTTPException):
        if (cause := error.__cause__) is not None:  # as of text that is not in UTF-8
            return error.status_code, f"the body cannot be read ({cause}); expected JSON in UTF-8"
        return error.status_code, f"{error.detail.rstrip('.')}; /docs lists what this server answers"
    for kind, status in _STATUS.items():
        if isinstance(error, kind):
            return status, str(error)
    return 500, f"the server failed: {type(error).__name__}; its log says more"


def _describe_field(found: dict[str, Any]) -> str:
    if found["type"] == "json_invalid":
        return f"found a body that is no JSON: {found['ctx']['error']} at character {found['loc'][-1]}"
    place = ".".join(str(part) for part in found["loc"] if part != "body") or "the body"
    if found["type"] == "missing":
        return f"{place} is missing"
    value = repr(found.get("input"))[:100]
    return f"{place}={value}: {found['msg']}"
