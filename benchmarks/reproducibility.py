"""What a training run gives again: on the same processor, with other threads, and with other instruction sets.

    python -m benchmarks.reproducibility
    python -m benchmarks.reproducibility --work_dir out/elsewhere --compare out/reproducibility
    python -m benchmarks.reproducibility --work_dir out/older --processor oldest --compare out/reproducibility

The first steps of the demo's run are trained with each of several environments, and images are generated with each
result. Instruction sets that are older than those of this processor stand for other processors: ATen's own kernels
(`ATEN_CPU_CAPABILITY`), those of oneDNN (`ONEDNN_MAX_CPU_ISA`) and of MKL (`MKL_CBWR`). All pairs are compared: the
losses of the steps, the trained parameters in float32, the concept files, and the images. With `--compare` the same
environments are also compared with those in the work folder of another machine (about a megabyte, without caches:
`machine.json` and, of each environment, the logs, the last checkpoint, the concept and the images). `--processor` gives
all environments the instruction sets of an older processor, to make such a folder without a second machine.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image

from atomdiff.training.run_comparison import compare_tensors
from atomdiff.training.run_log import LOG_FILE, read_log
from atomdiff.utils.atomic import write_json
from atomdiff.utils.errors import UserError
from atomdiff.utils.machine import describe_processor
from atomdiff.utils.options import parse_config
from atomdiff.utils.versions import versions
from benchmarks.result_file import command_line, write_result

ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
TWO_THREADS = {"OMP_NUM_THREADS": "2", "MKL_NUM_THREADS": "2"}
OLDEST = {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_CBWR": "COMPATIBLE"}
AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_CBWR": "AVX2"}
PROCESSORS = {"avx2": AVX2, "oldest": OLDEST}
SETTINGS = sorted({*OLDEST, *TWO_THREADS})
MACHINE_FILE = "machine.json"


@dataclass(frozen=True)
class BenchmarkConfig:
    """What to measure."""

    steps: int = 30
    """Training steps."""
    config: str = "configs/demo.yaml"
    """Settings of the run."""
    instance_data_dir: str = "samples/subjects/robot"
    """Images of the subject."""
    class_name: str = "robot"
    """What they show."""
    prompts: tuple[str, ...] = ("a photo of sks robot", "a photo of sks robot in the snow")
    """Prompts of the images."""
    seeds: tuple[int, ...] = (0, 1)
    """Seeds of the images; every prompt is generated with each."""
    environments: tuple[str, ...] = ()
    """Environments to train in. Default: all that this processor can be told to be."""
    work_dir: str = "out/reproducibility"
    """Folder of what was trained and generated; it is emptied."""
    compare: str | None = None
    """The work folder of another machine, to compare with."""
    processor: Literal["avx2", "oldest"] | None = None
    """Processor whose instruction sets all environments have. Default: this one."""
    note: str = ""
    """What else is to be known."""
    output: str = "benchmarks/results/reproducibility.json"
    """The result file."""


def known_environments() -> dict[str, dict[str, str]]:
    """Return the environments that this processor can be told to be, with the variables that each sets."""
    known = {
        "usual": ONE_THREAD,
        "usual, again": ONE_THREAD,
        "2 threads": TWO_THREADS,
        "2 threads, again": TWO_THREADS,
    }
    if "AVX512" in torch.backends.cpu.get_cpu_capability():
        known["avx2"] = {**ONE_THREAD, **AVX2}
    known |= {name: {**ONE_THREAD, name: value} for name, value in OLDEST.items()}
    return {**known, "oldest": {**ONE_THREAD, **OLDEST}}


def run(config: BenchmarkConfig, folder: Path, variables: dict[str, str]) -> None:
    """Train and generate images in an environment of its own, into a folder."""
    environment = {name: value for name, value in os.environ.items() if name not in SETTINGS} | variables
    train = ["train", "--config", config.config, "--mixed_precision", "no", "--output_dir", str(folder)]
    train += ["--instance_data_dir", config.instance_data_dir, "--class_name", config.class_name]
    train += ["--max_train_steps", str(config.steps), "--checkpointing_steps", str(config.steps)]
    train += ["--logging_steps", "1", "--validation_loss_steps", "0", "--report_to", "none", "--lr_warmup_steps", "0"]
    sample = ["sample", "--pretrained_model_name_or_path", "samples/toybox-sd", "--dtype", "float32"]
    sample += ["--concepts", str(concept_file(config, folder)), "--output_dir", str(folder / "images")]
    sample += ["--prompts", *config.prompts, "--seeds", *map(str, config.seeds)]
    for arguments in (train, sample):
        command = [sys.executable, "-m", "atomdiff", *arguments]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment)
    shutil.rmtree(folder / "cache")


def concept_file(config: BenchmarkConfig, folder: Path) -> Path:
    """Return the concept of an environment's folder."""
    return folder / f"{Path(config.instance_data_dir).name}.atoms.safetensors"


def read_parameters(config: BenchmarkConfig, folder: Path) -> dict[str, torch.Tensor]:
    """Return the trained parameters after the last step, in float32."""
    state = torch.load(folder / f"checkpoint-{config.steps}" / "state.pt", weights_only=True)
    return {name: tensor.double() for name, tensor in state["parameters"].items()}


def read_images(folder: Path) -> np.ndarray:
    """Return the images (images, height, width, 3), 0 to 255."""
    manifest = json.loads((folder / "images" / "manifest.json").read_text())
    files = [image["file"] for image in sorted(manifest["images"], key=lambda image: (image["prompt"], image["seed"]))]
    return np.stack([np.asarray(Image.open(folder / "images" / file).convert("RGB"), float) for file in files])


def compare(config: BenchmarkConfig, one: Path, two: Path) -> dict[str, Any]:
    """Return how far two environments are apart."""
    losses, others = ([line["loss"] for line in read_log(folder / LOG_FILE)] for folder in (one, two))
    if len(losses) != config.steps or len(others) != config.steps:
        raise UserError(f"{one}, {two}: found {len(losses)} and {len(others)} steps; expected {config.steps} in both")
    parameters, changed = (read_parameters(config, folder) for folder in (one, two))
    apart = [abs(b / a - 1) for a, b in zip(losses, others, strict=True)]
    relative = [(changed[name] - tensor).abs().max() / tensor.abs().max() for name, tensor in parameters.items()]
    flat, other = (torch.cat([each[name].flatten() for name in parameters]) for each in (parameters, changed))
    images, generated = read_images(one), read_images(two)
    return {
        "first_step_apart": next((step for step, far in enumerate(apart, 1) if far), None),
        "loss_first_step": apart[0],
        "loss_largest": max(apart),
        "loss_last_step": apart[-1],
        "parameters_equal": bool(torch.equal(flat, other)),
        "parameters_relative": float(max(relative)),
        "norm_apart": float((other - flat).norm() / flat.norm()),  # what `atomdiff rerun --tolerance` looks at
        "one_minus_cosine": 1 - float(flat @ other / (flat.norm() * other.norm())),
        "concept_file_equal": compare_tensors(*(concept_file(config, folder) for folder in (one, two))).equal,
        "images_equal": bool((images == generated).all()),
        "images_mean_apart": float(np.abs(images - generated).mean()),
        "images_largest_apart": float(np.abs(images - generated).max()),
    }


def rounded(found: dict[str, Any]) -> dict[str, Any]:
    """Return figures with three digits."""
    return {name: float(f"{value:.3g}") if isinstance(value, float) else value for name, value in found.items()}


def place_in(folder: str, environment: str) -> Path:
    """Return where an environment's files are in a work folder."""
    return Path(folder) / environment.replace(", ", "-").replace(" ", "-")


def find_elsewhere(config: BenchmarkConfig, environments: Sequence[str]) -> dict[str, Path]:
    """Return the folders of those environments that the work folder of another machine has.

    Raises:
        UserError: It has none, or is no such folder.
    """
    if config.compare is None:
        return {}
    places = {name: place_in(config.compare, name) for name in environments}
    found = {name: place for name, place in places.items() if place.is_dir()}
    if not found or not (Path(config.compare) / MACHINE_FILE).is_file():
        expected = f"expected {MACHINE_FILE} and a folder of one of {', '.join(environments)}"
        raise UserError(f"compare={config.compare!r}: {expected}; copy the work_dir of another machine")
    return found


def main(config: BenchmarkConfig) -> None:
    """Train in all environments, compare, and write the result file."""
    known = known_environments()
    chosen = config.environments or tuple(known)
    if unknown := [name for name in chosen if name not in known]:
        raise UserError(f"environments={unknown}: expected some of {', '.join(known)}")
    variables = {name: known[name] | PROCESSORS.get(config.processor or "", {}) for name in chosen}
    elsewhere = find_elsewhere(config, chosen)
    shutil.rmtree(config.work_dir, ignore_errors=True)
    folders = {name: place_in(config.work_dir, name) for name in chosen}
    for name, folder in folders.items():
        print(name, flush=True)
        run(config, folder, variables[name])
    write_json(
        Path(config.work_dir) / MACHINE_FILE, {"processor": config.processor or describe_processor(), **versions()}
    )
    pairs = {f"{one} / {two}": (folders[one], folders[two]) for one, two in itertools.combinations(chosen, 2)}
    pairs |= {f"{name} / {name}, elsewhere": (folders[name], place) for name, place in elsewhere.items()}
    figures = {name: rounded(compare(config, *pair)) for name, pair in pairs.items()}
    more: dict[str, Any] = {"environments": variables, "note": config.note}
    if config.compare is not None:
        more["elsewhere"] = json.loads((Path(config.compare) / MACHINE_FILE).read_text())
    command = command_line("reproducibility", config, ignore=("output", "work_dir", "note", "compare"))
    write_result(config.output, command, figures, **more)


if __name__ == "__main__":
    main(parse_config(BenchmarkConfig, prog="python -m benchmarks.reproducibility"))
