"""The fastest of several ways to compute the same loss, among those whose gradients are right; CUDA graphs of steps."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from atomdiff.utils.atomic import new_file

_WARM, _TIMED, _COMPARED = 3, 8, 4
CAPTURED = ", captured"  # ends the name of a way whose steps are replayed as one CUDA graph


def captured(step: Callable[[], None]) -> Callable[[], None]:
    """A step as one CUDA graph, so that nothing waits for Python to launch kernels; the first calls run it as it is.

    Args:
        step: works on tensors that stay where they are, and never waits for the GPU. Random numbers of the default
            generator are fresh at each replay.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(_WARM):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def _norms(model: nn.Module, step: Callable[[], None]) -> dict[str, float]:
    """The norm of the gradient of every parameter that has one, its mean over some steps."""
    sums: dict[str, Tensor] = {}
    for _ in range(_COMPARED):
        step()
        for name, p in model.named_parameters():
            if p.grad is not None:
                sums[name] = sums.get(name, 0.0) + p.grad.float().norm()
    return {name: total.item() / _COMPARED for name, total in sums.items()}


def _differs(norms: dict[str, float], plain: dict[str, float]) -> str | None:
    """What is wrong with the norms of gradients, if anything is: noise, bf16 and another order of sums are not."""
    total, expected = (math.hypot(*some.values()) for some in (norms, plain))
    if not abs(total / expected - 1) <= 0.2:
        return f"{total:.3g} instead of {expected:.3g}"
    for name, norm in plain.items():
        if norm > 1e-2 * expected and not 0.4 < norms.get(name, 0.0) / norm < 2.5:
            return name
    return None


def fastest(task: str, folder: Path, model: nn.Module, ways: dict[str, Callable[[], Tensor]]) -> str:
    """The name of the fastest way whose gradients are those of the first one; known from the folder the next time.

    Args:
        task: what is computed.
        folder: where a file `way-<task>.json` notes the fastest way.
        model: what the gradients are for; they are cleared.
        ways: by name, functions that give the loss, the same up to rounding; where the name ends with `CAPTURED`, loss
            and gradients are replayed as a CUDA graph. A way that fails is left out (on a CPU with bf16 autocast,
            torch 2.13 compiles a UNet to one without any gradient for the text).
    """
    path = folder / f"way-{task.replace(' ', '-')}.json"
    if path.exists():
        return str(json.loads(path.read_text())["way"])
    if len(ways) == 1:
        return next(iter(ways))
    times: dict[str, float] = {}
    plain: dict[str, float] = {}
    for name, loss_of in ways.items():
        begin = time.perf_counter()

        def step(loss_of: Callable[[], Tensor] = loss_of) -> None:
            model.zero_grad()
            loss_of().backward()

        try:
            run = captured(step) if name.endswith(CAPTURED) else step
            for turn in range(_WARM + _TIMED):
                if turn == _WARM:
                    _wait()
                    start = time.perf_counter()
                run()
            _wait()
            took, norms = (time.perf_counter() - start) / _TIMED, _norms(model, run)
        except Exception as error:
            print(f"{task}, {name}: {type(error).__name__}: {str(error)[:400]}", flush=True)
            continue
        plain = plain or norms
        wrong = _differs(norms, plain)
        verdict = f"other gradients: {wrong}" if wrong else f"{took * 1000:.1f} ms"
        print(f"{task}, {name}: {verdict} (ready after {start - begin:.0f} s)", flush=True)
        if wrong is None:
            times[name] = took
            with new_file(path) as file:  # after each, in case the next one ends the process
                file.write_text(json.dumps({"way": min(times, key=times.__getitem__), "seconds": times}) + "\n")
    model.zero_grad()
    return min(times, key=times.__getitem__)


def print_profile(loss_of: Callable[[], Tensor], model: nn.Module) -> None:
    """Print which kernels of a training step's gradients take the time."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as record:
        for _ in range(3):
            loss_of().backward()
        _wait()
    model.zero_grad()
    print(
        record.key_averages().table(sort_by="self_cuda_time_total", row_limit=25, max_name_column_width=60), flush=True
    )


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
