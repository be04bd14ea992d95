"""What worker processes are given: a GPU and threads."""

import os

import pytest
import torch

from atomdiff.training import processes


class Process:
    """Notes what a process would start with."""

    def __init__(self, target, args):
        self.args, self.device = args, None

    def start(self):
        self.device = os.environ.get("CUDA_VISIBLE_DEVICES")


@pytest.fixture
def started(monkeypatch):
    """Starts three workers of four CPU threads and returns what they were started with."""
    context = type("Context", (), {"Process": Process})

    def start(gpus, visible=None):
        monkeypatch.setattr(processes.multiprocessing, "get_context", lambda _: context)
        monkeypatch.setattr(processes, "_num_gpus", lambda: gpus)
        monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if visible:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        workers = [processes.start_worker(pow, ("a",), worker, 3) for worker in range(3)]
        assert os.environ.get("CUDA_VISIBLE_DEVICES") == visible
        return [worker.device for worker in workers], [worker.args for worker in workers]

    return start


def test_workers_share_gpus_and_threads(started):
    assert started(2) == (["0", "1", "0"], [("builtins", "pow", ("a",), 2)] * 3)
    assert started(2, "4,6")[0] == ["4", "6", "4"]
    assert started(0)[0] == [None] * 3


def test_there_is_a_worker_for_each_gpu(monkeypatch):
    monkeypatch.setattr(processes, "_num_gpus", lambda: 4)
    assert processes.choose_num_workers(None) == 4 and processes.choose_num_workers(1) == 1
    monkeypatch.setattr(processes, "_num_gpus", lambda: 0)
    assert processes.choose_num_workers(None) == 1
