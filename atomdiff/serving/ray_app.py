"""Servers on a Ray cluster: `serve run atomdiff.serving.ray_app:app pretrained_model_name_or_path=BASE library=FOLDER`.

Each has a base and an engine of its own. They share nothing but the library's folder, which is at the same path on all
machines.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from atomdiff.serving.config import ReplicasConfig
from atomdiff.serving.server import check_packages, open_engine
from atomdiff.utils.errors import UserError
from atomdiff.utils.options import parse_config

if TYPE_CHECKING:
    from fastapi import FastAPI

_RETRY_SECONDS = 5  # what a request is told that finds the queue full


def app(args: Mapping[str, Any]) -> Any:
    """Describe the servers to Ray, which starts them.

    Args:
        args: fields of `ReplicasConfig`, as `serve run` or a config file of Ray Serve gives them.

    Returns:
        A `ray.serve.Application`.

    Raises:
        UserError: a package is missing, or a field has a value that cannot be used.
    """
    check_packages()
    try:
        from ray import serve
    except ImportError as error:
        raise UserError(f'Ray Serve is missing ({error}); pip install "atomdiff[serve-ray]"') from error
    try:
        config = parse_config(ReplicasConfig, [f"--{name}={value}" for name, value in args.items()])
    except SystemExit as error:  # would end the process of Ray's that asks
        raise UserError(str(error.code)) from error
    library = None if config.library is None else os.path.abspath(config.library)
    config = replace(
        config, pretrained_model_name_or_path=_absolute(config.pretrained_model_name_or_path), library=library
    )
    return serve.deployment(**deployment_options(config))(serve.ingress()(Replica)).bind(config)


def deployment_options(config: ReplicasConfig) -> dict[str, Any]:
    """Return the options of Ray's deployment.

    A server gets twice the requests that it denoises together, so that its batches are full; all others wait where a
    further server finds them. There are as many servers as it takes to give each one full batch.
    """
    return {
        "name": "atomdiff",
        "ray_actor_options": {"num_cpus": config.num_cpus, "num_gpus": config.num_gpus},
        "max_ongoing_requests": 2 * config.max_batch,
        "max_queued_requests": config.max_queue,
        "backpressure_config": {"status_code": 429, "retry_after_s": _RETRY_SECONDS},
        "autoscaling_config": {
            "min_replicas": config.min_replicas,
            "max_replicas": config.max_replicas,
            "target_ongoing_requests": config.max_batch,
        },
        "graceful_shutdown_timeout_s": config.shutdown_timeout,
        "max_constructor_retry_count": 3,
    }


class Replica:
    """One server, in a process of its own."""

    def __init__(self, config: ReplicasConfig) -> None:
        self.engine, self.config = open_engine(config), config

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Return the application; Ray calls this once."""
        from atomdiff.serving.app import make_app

        return make_app(self.engine, self.config)

    def check_health(self) -> None:
        """Raise an error where the engine has stopped: Ray starts another server then."""
        if not self.engine.is_running:
            raise RuntimeError("the engine has stopped; the log of this replica says why")


def _absolute(base: str) -> str:
    """Return the path of a base as it is from any folder; a Hub id stays as it is."""
    return os.path.abspath(base) if os.path.exists(base) else base
