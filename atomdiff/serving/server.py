"""`atomdiff serve`: open the base, start the engine, and answer until the process is asked to stop."""

from __future__ import annotations

import signal
from contextlib import suppress
from importlib.util import find_spec

from atomdiff.concepts.library import ConceptLibrary
from atomdiff.pipelines.open import open_base
from atomdiff.serving.config import EngineConfig, ServeConfig
from atomdiff.serving.engine import Engine
from atomdiff.utils.errors import UserError
from atomdiff.utils.precision import choose_precision, compute_device, log_precision

_PACKAGES = ("fastapi", "fastapi_offline", "uvicorn", "multipart", "prometheus_client")


def check_packages() -> None:
    """Check that the packages of the extra `serve` are installed.

    Raises:
        UserError: one is missing; the message says how to install it.
    """
    for package in _PACKAGES:
        if find_spec(package) is None:
            raise UserError(f'atomdiff serve: {package} is missing; pip install "atomdiff[serve]"')


def open_engine(config: EngineConfig) -> Engine:
    """Open the base and start an engine on it, without HTTP.

    Raises:
        UserError: the base or the library cannot be used.
    """
    from atomdiff.serving.concepts import ServedConcepts

    concepts = None if config.library is None else ServedConcepts(ConceptLibrary(config.library))
    device = compute_device()
    precision = choose_precision(config.dtype, device, field="dtype")
    log_precision(precision, device)
    return Engine(
        open_base(config, precision.dtype).to(device),
        concepts,
        max_batch=config.max_batch,
        max_queue=config.max_queue,
        timeout=config.request_timeout,
        max_side=config.max_side,
    )


def serve(config: ServeConfig) -> None:
    """Serve until SIGINT or SIGTERM; requests that are running then are finished, within `shutdown_timeout`.

    Raises:
        UserError: a package, the address, the base or the library cannot be used.
    """
    check_packages()
    from atomdiff.serving.app import make_app
    from atomdiff.serving.http_server import HttpServer, check_address

    check_address(config.host, config.port)  # before the base is opened, which takes longer
    server = HttpServer(make_app(open_engine(config), config, config.host), config)
    usual = signal.signal(signal.SIGTERM, signal.default_int_handler)  # uvicorn raises signals again, once it has ended
    try:
        with suppress(KeyboardInterrupt):
            server.run()
    finally:
        signal.signal(signal.SIGTERM, usual)
