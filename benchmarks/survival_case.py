"""A small training run in a folder of its own, which child processes of `benchmarks.survival` do."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.survival_run import Moment, Outcome, Plan, run

BASE = Path(__file__).parents[1] / "tests" / "fixtures" / "tiny-sd"
LAST_STEP = 6
_RESUMED = re.compile(r"^steps: \d+(?: \((\d+) of them done\))?", re.MULTILINE)


@dataclass
class Case:
    """The folder of a run: photos with captions and masks, and the run's output."""

    folder: Path
    processes: ForkServerContext
    changes: dict[str, Any] = field(default_factory=dict)
    """Fields of the run that are not as usual."""
    as_nobody: bool = False

    @property
    def photos(self) -> Path:
        """The folder of the instance images."""
        return self.folder / "teapot"

    @property
    def out(self) -> Path:
        """The run's output folder."""
        return self.folder / "out"

    @property
    def concept(self) -> Path:
        """The run's result."""
        return self.out / "teapot.atoms.safetensors"

    @property
    def repository(self) -> str:
        """Where the concept is pushed to."""
        return f"ada/{self.folder.name}"

    def write_photos(self) -> None:
        """Write three photos with masks, and a caption."""
        (self.photos / "mask").mkdir(parents=True)
        random = np.random.default_rng(0)
        for number in range(3):
            write_noise(self.photos / f"{number}.png", random)
            mask = Image.new("L", (32, 32), 255)
            mask.paste(0, (0, 0, 8, 8))
            mask.save(self.photos / "mask" / f"{number}.png")
        (self.photos / "0.txt").write_text("a photo of a {trigger} {class_name}")

    def copy_to(self, folder: Path) -> Case:
        """Return this case in another folder, as it is now."""
        shutil.copytree(self.folder, folder)
        return Case(folder, self.processes, dict(self.changes), self.as_nobody)

    def train(self, *moments: Moment, resume: bool = True) -> Outcome:
        """Train in a child process, to which things happen; from the latest checkpoint if there is any."""
        fields = {
            "pretrained_model_name_or_path": str(BASE),
            "instance_data_dir": str(self.photos),
            "class_name": "teapot",
            "output_dir": str(self.out),
            "resolution": 32,
            "masked_loss": True,
            "with_prior_preservation": True,
            "num_class_images": 3,
            "sample_batch_size": 2,
            "num_inference_steps": 2,
            "train_batch_size": 2,
            "max_train_steps": LAST_STEP,
            "lr_scheduler": "cosine",
            "use_ema": True,
            "logging_steps": 1,
            "checkpointing_steps": 2,
            "checkpoints_total_limit": 2,
            "validation_steps": 3,
            "validation_loss_steps": 3,
            "mixed_precision": "no",
            "report_to": None,
            "push_to_hub": True,
            "hub_model_id": self.repository,
            "resume_from_checkpoint": "latest" if resume else None,
        }
        plan = Plan(
            fields | self.changes, str(self.folder / "finished"), moments, str(self.folder / "log"), self.as_nobody
        )
        if self.as_nobody and os.geteuid() == 0:
            subprocess.run(["chown", "-R", "nobody", str(self.folder)], check=True)
        here, there = self.processes.Pipe(duplex=False)
        process = self.processes.Process(target=run, args=(plan, there))
        process.start()
        there.close()
        try:
            outcome = here.recv()
        except EOFError:
            outcome = Outcome("killed")
        process.join()
        return outcome

    def resumed_from(self) -> int:
        """Return the step from which the last process went on; 0: from the start."""
        found = _RESUMED.findall((self.folder / "log").read_text())
        return int(found[-1] or 0) if found else 0

    def finished(self) -> int:
        """Return the step of the last checkpoint that was finished; 0: none."""
        file = self.folder / "finished"
        return max(map(int, file.read_text().split()), default=0) if file.is_file() else 0

    def checkpoints(self) -> dict[str, str]:
        """Return a hash of each checkpoint that is there."""
        folders = sorted(self.out.glob("checkpoint-*")) if self.out.is_dir() else []
        return {
            folder.name: hashlib.sha256(b"".join(file.read_bytes() for file in sorted(folder.iterdir()))).hexdigest()
            for folder in folders
            if folder.is_dir()
        }


def write_noise(file: Path, random: np.random.Generator) -> None:
    """Write a photo of nothing."""
    Image.fromarray(random.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(file)


def told(outcome: Outcome) -> Sequence[str]:
    """Return what a run told the user."""
    return [message for message in (outcome.message, *outcome.warnings) if message]
