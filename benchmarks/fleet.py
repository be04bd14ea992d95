"""What a concept costs in a fleet, beside a process of `atomdiff train` for each, and how many workers fare.

    python -m benchmarks.fleet

"cost": subjects of the toybox with a few steps each, by a process for each, one after another, by a fleet of one worker
and by one of two. All take turns, with one thread a process; figures are medians of wall seconds, and of processor
seconds of all processes together, which depend less on what else the machine does.

"queue": the queue of `atomdiff fleet` itself, with simulated workers and a simulated clock. A subject takes what "cost"
recorded outside of the steps, and steps drawn from the recorded ones. Workers are lost at random times, and tries fail.
*Utilization* is the share of the workers' time that went into tries that ended well.
"""

from __future__ import annotations

import csv
import heapq
import json
import math
import os
import random
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from atomdiff.training.config import TrainConfig, load_config
from atomdiff.training.fleet.queue import Event, Queue
from atomdiff.training.fleet.state import SubjectState
from atomdiff.training.fleet.workers import ProcessPool
from atomdiff.training.run_log import LOG_FILE, read_log
from atomdiff.utils.options import parse_config
from benchmarks.result_file import command_line, write_result

SUBJECTS = Path("samples/subjects")


@dataclass(frozen=True)
class BenchmarkConfig:
    """What to measure."""

    parts: tuple[str, ...] = ("cost", "queue")
    """Parts to run; queue takes what cost has recorded from the result file, if cost is not run."""
    subjects: tuple[str, ...] = ("mug", "robot")
    """Subjects of the toybox."""
    steps: int = 10
    """Training steps of each."""
    repeats: int = 2
    """Times each way takes its turn."""
    queue_subjects: int = 10_000
    """Subjects of the simulation."""
    queue_steps: int = 300
    """Training steps of each of them."""
    queue_workers: tuple[int, ...] = (1, 10, 100, 1000)
    """Numbers of simulated workers."""
    output: str = "benchmarks/results/fleet.json"
    """The result file; figures of parts that are not run again stay in it."""


def main(config: BenchmarkConfig | None = None) -> None:
    """Run the parts and write the result file."""
    config = config or parse_config(BenchmarkConfig)
    known = json.loads(Path(config.output).read_text("utf-8")) if Path(config.output).exists() else {}
    figures, recorded = known.get("figures", {}), known.get("recorded", {})
    with TemporaryDirectory(prefix="atomdiff-fleet-") as folder:
        if "cost" in config.parts:
            costs, recorded = measure_cost(config, Path(folder))
            figures |= costs
        if "queue" in config.parts:
            figures |= simulate(config, recorded)
            figures["driver_ms_per_subject"] = driver_time(Path(folder))
    write_result(config.output, command_line("fleet", config), figures, recorded=recorded)


def measure_cost(config: BenchmarkConfig, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the figures of "cost", and what the simulation needs to know of a run."""
    table = folder / "subjects.csv"
    rows = [{"name": name, "instance_data_dir": SUBJECTS / name, "class_name": name} for name in config.subjects]
    with table.open("w") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    options = ["--config", "configs/demo.yaml", "--lr_warmup_steps", "0", "--logging_steps", "1"]
    options += ["--max_train_steps", str(config.steps), "--validation_steps", "0"]
    output = folder / "out"

    def fleet(workers: int) -> list[list[str]]:
        own = ["--subjects", str(table), "--num_workers", str(workers), "--output_dir", str(output)]
        return [["fleet", *options, *own]]

    def alone(name: str) -> list[str]:
        own = ["--instance_data_dir", str(SUBJECTS / name), "--class_name", name, "--output_dir", str(output / name)]
        return ["train", *options, *own]

    ways = {"separate": [alone(name) for name in config.subjects], "fleet_1": fleet(1), "fleet_2": fleet(2)}
    wall: dict[str, list[float]] = {way: [] for way in ways}
    processor: dict[str, list[float]] = {way: [] for way in ways}
    steps: list[list[float]] = []
    outside: list[float] = []
    order = random.Random(0)
    for _ in range(config.repeats):
        for way in order.sample(list(ways), len(ways)):
            shutil.rmtree(output, ignore_errors=True)
            # one thread a process: those of a fleet are shared among its workers
            seconds = [_run(command, threads=2 if way == "fleet_2" else 1) for command in ways[way]]
            wall[way].append(sum(each for each, _ in seconds) / len(config.subjects))
            processor[way].append(sum(each for _, each in seconds) / len(config.subjects))
            if way == "fleet_1":
                for name, told in json.loads((output / "report.json").read_text())["subjects"].items():
                    lines, size = read_log(output / "subjects" / name / LOG_FILE), _demo_run().train_batch_size
                    steps.append([size / line["samples_per_second"] for line in lines])
                    outside.append(told["seconds"] - sum(steps[-1]))
    figures: dict[str, Any] = {}
    for way in ways:
        figures[f"seconds_per_concept_{way}"] = round(statistics.median(wall[way]), 2)
        figures[f"processor_seconds_per_concept_{way}"] = round(statistics.median(processor[way]), 2)
    pairs = zip(wall["fleet_1"], wall["fleet_2"], strict=True)
    figures["speedup_of_two_workers"] = round(statistics.median(one / two for one, two in pairs), 2)
    figures["seconds_of_steps"] = round(statistics.median(map(sum, steps)), 2)
    figures["repeats"] = {"wall": wall, "processor": processor}
    recorded = {"start_seconds": _start_seconds(folder), "outside_seconds": outside, "step_seconds": steps}
    return figures, recorded


def _run(command: Sequence[str], threads: int) -> tuple[float, float]:
    """Run a command of `atomdiff`; return its wall and processor seconds, those of its processes included."""
    environment = {**os.environ, **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))}
    started = time.perf_counter()
    words = [sys.executable, "-m", "atomdiff", *command]
    process = subprocess.Popen(words, env=environment, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"{' '.join(command)} ended with {status}")
    return time.perf_counter() - started, usage.ru_utime + usage.ru_stime


def _demo_run() -> TrainConfig:
    return load_config(["--config", "configs/demo.yaml", "--instance_data_dir", "x", "--class_name", "x"])


def _start_seconds(folder: Path) -> float:
    """Return how long it takes until a worker process is ready."""
    pool = ProcessPool({"x": _demo_run()}, 1, folder / "logs")
    started = time.perf_counter()
    pool.start(0)
    while not pool.wait(1.0):
        pass
    seconds = time.perf_counter() - started
    pool.close()
    return seconds


class SimulatedPool:
    """Workers that take the time that they are told to, on a clock of their own.

    Args:
        durations: Seconds that each subject takes.
        start_seconds: Seconds until a worker is ready.
        losses_per_second: How often a worker is lost while it trains.
        failing: Share of the tries that fail at their end.
    """

    def __init__(
        self, durations: Mapping[str, float], start_seconds: float, losses_per_second: float, failing: float
    ) -> None:
        self.clock, self.useful, self.lost = 0.0, 0.0, 0
        self._durations, self._start_seconds = durations, start_seconds
        self._losses_per_second, self._failing = losses_per_second, failing
        self._random = random.Random(1)
        self._events: list[tuple[float, int, Event]] = []

    def start(self, worker: int) -> None:
        """Let a worker be ready in a while."""
        self._in(self._start_seconds, Event(worker, "ready"))

    def assign(self, worker: int, name: str) -> None:
        """Let a try end when it would, or earlier if the worker is lost."""
        seconds = self._durations[name]
        until_loss = self._random.expovariate(self._losses_per_second) if self._losses_per_second else math.inf
        if until_loss < seconds:
            self._in(until_loss, Event(worker, "lost"))
        else:
            failed = self._random.random() < self._failing
            self._in(seconds, Event(worker, "failed" if failed else "done", seconds))

    def wait(self, seconds: float) -> Sequence[Event]:
        """Put the clock forward to what happens next."""
        self.clock, _, event = heapq.heappop(self._events)
        self.useful += event.seconds if event.kind == "done" else 0
        self.lost += event.kind == "lost"
        return [event]

    def kill(self, worker: int) -> None:
        """Do nothing: no worker hangs."""

    def close(self) -> None:
        """Do nothing: there is nothing to end."""

    def _in(self, seconds: float, event: Event) -> None:
        heapq.heappush(self._events, (self.clock + seconds, event.worker, event))


class _Counter:
    """Counts the subjects that are given up."""

    given_up = 0

    def started(self, name: str, worker: int) -> None:
        pass

    def ended(self, name: str, event: Event, again: bool) -> None:
        self.given_up += event.kind != "done" and not again


# How often an hour a worker is lost, and the share of tries that fail.
FAILURES = {"none": (0.0, 0.0), "some": (1 / 24, 0.01), "many": (1.0, 0.05)}


def simulate(config: BenchmarkConfig, recorded: Mapping[str, Any]) -> dict[str, Any]:
    """Return the figures of "queue"."""
    draw = random.Random(0)

    def duration() -> float:
        run = draw.randrange(len(recorded["step_seconds"]))
        return recorded["outside_seconds"][run] + sum(draw.choices(recorded["step_seconds"][run], k=config.queue_steps))

    durations = {str(number): duration() for number in range(config.queue_subjects)}
    figures: dict[str, Any] = {"mean_seconds_of_a_simulated_subject": round(statistics.mean(durations.values()), 1)}
    for name, (losses, failing) in FAILURES.items():
        for workers in config.queue_workers:
            pool = SimulatedPool(durations, recorded["start_seconds"], losses / 3600, failing)
            counter = _Counter()
            Queue([*durations], pool, workers, 3, counter).run()
            figures[f"{name}_{workers}_workers"] = {
                "makespan_hours": round(pool.clock / 3600, 3),
                "utilization": round(pool.useful / (pool.clock * workers), 4),
                "workers_lost": pool.lost,
                "subjects_given_up": counter.given_up,
            }
    return figures


def driver_time(folder: Path, subjects: int = 200) -> float:
    """Return the milliseconds that the driver's notes of a subject take on disk, its start and its end."""
    run, states = _demo_run(), []
    for number in range(subjects):
        own = replace(run, output_dir=str(folder / "notes" / str(number)))
        states.append(SubjectState(own, run.snapshot()))
        states[-1].folder.mkdir(parents=True)
    started = time.perf_counter()
    for state in states:
        state.write()
        state.write()
    return round((time.perf_counter() - started) / subjects * 1000, 2)


if __name__ == "__main__":
    main()
