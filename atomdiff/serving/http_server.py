"""The HTTP server around the application, which stops its engine when it is asked to stop."""

from __future__ import annotations

import socket
import threading

import uvicorn
from fastapi import FastAPI

from atomdiff.serving.config import ServeConfig
from atomdiff.utils.errors import UserError

_ANSWER_SECONDS = 5  # for the last answers, after `shutdown_timeout`


class HttpServer(uvicorn.Server):
    """Serves an application until SIGINT or SIGTERM.

    Then it takes no more connections, refuses further requests of those that are open with status 503, and lets what
    runs come to its end, within `shutdown_timeout`; what is not done by then is answered with status 503, too.

    Args:
        app: as `make_app` makes it.
        config: address and times.
        **options: of uvicorn.
    """

    def __init__(self, app: FastAPI, config: ServeConfig, **options: object) -> None:
        self._engine, self._shutdown_timeout = app.state.engine, config.shutdown_timeout
        usual = {
            "host": config.host,
            "port": config.port,
            "timeout_graceful_shutdown": int(config.shutdown_timeout) + _ANSWER_SECONDS,
            "server_header": False,
        }
        super().__init__(uvicorn.Config(app, **{**usual, **options}))  # type: ignore[arg-type]

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop the engine while the connections come to their end."""
        threading.Thread(target=self._engine.close, args=(self._shutdown_timeout,), daemon=True).start()
        await super().shutdown(sockets)  # ends the application, which waits for the engine, unless Ctrl-C comes again


def check_address(host: str, port: int) -> None:
    """Check that an address can be listened on.

    Raises:
        UserError: it cannot, as where the port is taken.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        socket.create_server((host, port), family=family).close()
    except OSError as error:
        advice = "give another --port or --host, or stop what listens there"
        raise UserError(
            f"host={host!r}, port={port}: this address cannot be used ({error.strerror}); {advice}"
        ) from error
