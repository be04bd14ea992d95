"""Worker processes of one machine: how many, which GPU each has, and how many threads."""

from __future__ import annotations

import importlib
import multiprocessing
import os
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from typing import Any

import torch

from atomdiff.utils.quiet import quiet_libraries


def choose_num_workers(asked: int | None) -> int:
    """Return the number of worker processes: the one that was asked for, or one for each GPU and at least one."""
    return asked or max(_num_gpus(), 1)


def start_worker(target: Callable[..., None], args: tuple[Any, ...], worker: int, count: int) -> BaseProcess:
    """Start a worker process, with a GPU of its own if there are any, and its share of the threads; return it.

    Args:
        target: What it runs, a function of a module.
        args: Its arguments.
        worker: Its number, from 0.
        count: How many workers there are.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = visible.split(",") if visible else [str(index) for index in range(_num_gpus())]
    threads = max(1, torch.get_num_threads() // count)
    named = (target.__module__, target.__qualname__)
    process = multiprocessing.get_context("spawn").Process(target=_run, args=(*named, args, threads))
    try:
        if devices:
            os.environ["CUDA_VISIBLE_DEVICES"] = devices[worker % len(devices)]  # the process starts with it
        process.start()
    finally:
        if visible is None:
            os.environ.pop("CUDA_VISIBLE_DEVICES", None)
        else:
            os.environ["CUDA_VISIBLE_DEVICES"] = visible
    return process


def _run(module: str, function: str, args: tuple[Any, ...], threads: int) -> None:
    """Be a worker process: silence the libraries before the module is imported, which imports them."""
    quiet_libraries()
    torch.set_num_threads(threads)
    getattr(importlib.import_module(module), function)(*args)


def _num_gpus() -> int:
    return torch.cuda.device_count() if torch.cuda.is_available() else 0
