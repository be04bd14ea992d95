"""What training runs survive: kills and other faults, after which a run has to end as if nothing had happened.

    python -m benchmarks.survival

A small run on the tiny base of the tests (class images, masks, captions, moving average, checkpoints, validation, push
to a stand-in for the Hub) is done once without faults. Then, in processes of their own:

- `kill -9` at random moments of each phase, at once or a few milliseconds later, or at any time. The run goes on from
  its latest checkpoint.
- Other faults, `survival_faults.py`: full disks, vanished and replaced photos, torn and corrupt files and so on. Each
  has to end in a clear error or in a recovery that the user is told of; then it is mended, and the run goes on.

A fault is survived if no checkpoint that was finished is lost, and the run ends with the same bytes in the concept
file, in the folder and on the Hub.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import re
import shutil
import tempfile
import threading
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from atomdiff.utils.options import parse_config
from benchmarks.result_file import command_line, write_result
from benchmarks.survival_case import LAST_STEP, Case, told
from benchmarks.survival_faults import FAULTS, Fault, small_disk
from benchmarks.survival_run import (
    ANY,
    CACHING,
    CHECKPOINT,
    CLASS_IMAGES,
    LOGGING,
    PUSHING,
    ROTATING,
    SAVING,
    Moment,
    Outcome,
    kill,
)
from tests.fake_hub import FakeHub

PHASES = (CACHING, CLASS_IMAGES, CHECKPOINT, ROTATING, SAVING, PUSHING, ANY)
LONGEST_DELAY = 0.004  # seconds


@dataclass(frozen=True)
class BenchmarkConfig:
    """How many faults."""

    kills: int = 20
    """Kills, of all phases in turn."""
    faults: str = ""
    """Regular expression of the names of the other faults to inject; empty: all of them."""
    seed: int = 0
    """Of the moments of the kills."""
    output: str = "benchmarks/results/survival.json"
    """The result file."""


@dataclass(frozen=True)
class Result:
    """What came of a fault."""

    name: str
    ended: str
    """How the run ended to which it happened."""
    said: str
    """What that run said of it."""
    resumed_from: int
    """The step from which the next run went on."""
    checkpoints_lost: int
    bytes_equal: bool
    problem: str = ""
    """Why it is not survived."""

    @property
    def survived(self) -> bool:
        """Whether all is as it should be."""
        return self.bytes_equal and not self.checkpoints_lost and not self.problem


class Survival:
    """The run without faults, and all that happens to copies of it."""

    def __init__(self, work: Path, hub: FakeHub) -> None:
        self.work, self.hub = work, hub
        self.redrawn = 0
        """Moments that were after the end of a run."""
        processes = multiprocessing.get_context("forkserver")
        processes.set_forkserver_preload(["benchmarks.survival_run"])
        self.new = Case(work / "new", processes)
        self.new.write_photos()
        whole = self.new.copy_to(work / "whole")
        self.operations = self.must_be_done(whole).operations
        self.expected = whole.concept.read_bytes()
        again = self.new.copy_to(work / "again")
        started = time.perf_counter()  # now that all is imported
        self.must_be_done(again)
        self.seconds = time.perf_counter() - started
        if again.concept.read_bytes() != self.expected:
            raise RuntimeError("two runs without faults have not the same bytes")
        self.killed = self.new.copy_to(work / "killed")
        self.killed.train(Moment(LOGGING, 4, kill))
        if list(self.killed.checkpoints()) != ["checkpoint-2", "checkpoint-4"]:
            raise RuntimeError(f"the run was not killed in its fifth step: {self.killed.checkpoints()}")

    def must_be_done(self, case: Case) -> Outcome:
        """Run a case to which nothing happens."""
        outcome = case.train(resume=False)
        if outcome.status != "done" or outcome.warnings:
            raise RuntimeError(f"the run without faults: {outcome}")
        return outcome

    def kill(self, number: int, phase: str, rng: random.Random) -> Result:
        """Kill a run at a random moment of a phase, and let it go on; a moment after the run's end is drawn anew."""
        while True:
            folder = self.work / f"kill-{number}"
            shutil.rmtree(folder, ignore_errors=True)
            case = self.new.copy_to(folder)
            name, moment = self.draw(phase, rng)
            outcome = case.train(moment)
            if outcome.status != "done":
                break
            self.redrawn += 1
            self.hub.repositories.pop(case.repository, None)
        problem = "" if outcome.status == "killed" else f"was not killed: {outcome}"
        return self.go_on(case, f"kill: {name}", outcome, case.finished(), problem)

    def draw(self, phase: str, rng: random.Random) -> tuple[str, Moment]:
        """Return a random moment of a phase at which a run is killed, and its name."""
        delay = rng.choice((0.0, rng.uniform(0, LONGEST_DELAY)))
        if phase == ANY:
            at = rng.uniform(0.05, 0.9)
            return f"at {at:.0%} of the time", Moment(ANY, at * self.seconds, kill)
        place = rng.randrange(self.operations[phase])
        name = f"{phase}, {place + 1} of {self.operations[phase]}" + (f" + {delay * 1000:.1f} ms" if delay else "")
        return name, Moment(phase, place, kill, delay)

    def inject(self, number: int, fault: Fault) -> Result | None:
        """Let a fault happen, mend it and go on; None where this machine cannot do it."""
        folder = self.work / f"fault-{number}"
        case = (self.killed if fault.before and not fault.during else self.new).copy_to(folder)
        case.as_nobody = fault.as_nobody
        with small_disk(case.out, fault.disk) if fault.disk else nullcontext(True) as possible:
            if not possible:
                return None
            before = case.checkpoints()
            if fault.before:
                fault.before(case)
            outcome = case.train(*(fault.during(case) if fault.during else ()))
            problem = ""
            if outcome.status != fault.ends:
                problem = f"ended with {outcome.status}, expected {fault.ends}"
            elif not any(re.search(fault.says, text) for text in (*told(outcome), "")):
                problem = f"expected to be told {fault.says!r}"
            elif fault.before and fault.ends == "done" and case.resumed_from() != (there := _newest(fault)):
                problem = f"went on from step {case.resumed_from()}, expected {there}"
            fault.mend(case)
            after = case.checkpoints()
            if outcome.status == "error" and {name: after.get(name) for name in before} != before and not fault.spoils:
                problem = problem or "checkpoints were changed"
            finished = case.finished()
            while f"checkpoint-{finished}" in fault.spoils:
                finished -= 2
            return self.go_on(case, fault.name, outcome, max(finished, 0), problem)

    def go_on(self, case: Case, name: str, outcome: Outcome, finished: int, problem: str) -> Result:
        """Let a run go on from its latest checkpoint, and compare."""
        last = case.train()
        resumed = case.resumed_from()
        if last.status != "done":
            problem = problem or f"could not go on: {last.message}"
        elif f"checkpoint-{LAST_STEP}" not in case.checkpoints():
            problem = problem or "the last checkpoint is not there"
        pushed = self.hub.repositories.get(case.repository, {"files": {}})["files"].get(case.concept.name)
        equal = case.concept.is_file() and case.concept.read_bytes() == self.expected == pushed
        left = [file.name for file in case.out.rglob(".atomdiff-*")] if case.out.is_dir() else []
        if left:
            problem = problem or f"left behind: {', '.join(left)}"
        said = "; ".join(told(outcome)).replace(str(case.folder), "").replace(str(self.work), "")
        lost = max(0, finished - resumed) if last.status == "done" else finished
        result = Result(name, outcome.status, said[:300], resumed, lost, equal, problem)
        print(f"{'survived' if result.survived else 'LOST'}: {result}", flush=True)
        return result


def _newest(fault: Fault) -> int:
    """Return the step of the newest checkpoint of the killed run that a fault leaves."""
    return next(step for step in (4, 2) if f"checkpoint-{step}" not in fault.spoils)


def main(config: BenchmarkConfig) -> None:
    """Inject all faults and write the result file."""
    started = time.perf_counter()
    os.environ.update(SOURCE_DATE_EPOCH="1700000000", HF_TOKEN="hf_writer", OMP_NUM_THREADS="1")
    hub = FakeHub()
    os.environ["HF_ENDPOINT"] = hub.url
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    work = Path(tempfile.mkdtemp(prefix="atomdiff-survival-"))
    work.chmod(0o1777)
    os.environ["TMPDIR"] = str(work)  # for what a run saves where its own disk is full
    try:
        survival = Survival(work, hub)
        rng = random.Random(config.seed)
        kills = [survival.kill(number, PHASES[number % len(PHASES)], rng) for number in range(config.kills)]
        chosen = [fault for fault in FAULTS if re.search(config.faults, fault.name)]
        injected = [survival.inject(number, fault) for number, fault in enumerate(chosen)]
    finally:
        hub.shutdown()
        shutil.rmtree(work, ignore_errors=True)
    faults = [result for result in injected if result is not None]
    figures: dict[str, Any] = {}
    for kind, results in (("kills", kills), ("faults", faults)):
        figures[kind] = len(results)
        figures[f"{kind}_survived"] = sum(result.survived for result in results)
        figures[f"{kind}_bytes_equal"] = sum(result.bytes_equal for result in results)
        figures[f"{kind}_checkpoints_lost"] = sum(result.checkpoints_lost for result in results)
    figures["faults_recovered"] = sum(result.ended == "done" for result in faults)
    figures["faults_errors"] = sum(result.ended != "done" for result in faults)
    figures["kills_drawn_anew"] = survival.redrawn
    figures["not_possible_here"] = len(injected) - len(faults)
    figures["seconds"] = round(time.perf_counter() - started)
    command = command_line("survival", config)
    write_result(config.output, command, figures, kills=[*map(asdict, kills)], faults=[*map(asdict, faults)])


if __name__ == "__main__":
    main(parse_config(BenchmarkConfig))
