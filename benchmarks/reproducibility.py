"""What a training run gives again: on the same processor, with other threads, and with other instruction sets.

    python -m benchmarks.reproducibility
    python -m benchmarks.reproducibility --work_dir out/elsewhere --compare out/reproducibility

The first steps of the demo's run are trained with each of several environments, and images are generated with each
result. Instruction sets that are older than those of this processor stand for other processors: ATen's own kernels
(`ATEN_CPU_CAPABILITY`), those of oneDNN (`ONEDNN_MAX_CPU_ISA`) and of MKL (`MKL_CBWR`). All pairs are compared: the
losses of the steps, the trained parameters in float32, the concept files, and the images. With `--compare` the same
environments are also compared with those in the work folder of another machine (about a megabyte, without caches:
`machine.json` and, of each environment, the logs, the last checkpoint, the concept and the images).
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
        "one_minus_cosine": 1 - float(flat @ other / (flat.norm() * other.norm())),
        "concept_file_equal": compare_tensors(*(concept_file(config, folder) for folder in (one, two))).equal,
        "images_equal": bool((images == generated).all()),
        "images_mean_apart": float(np.abs(images - generated).mean()),
        "images_largest_apart": float(np.abs(images - generated).max()),
    }


def rounded(found: dict[str, Any]) -> dict[str, Any]:
    """Return figures with three digits."""
    return {name: float(f"{value:.3g}") if isinstance(value, float) else value for name, value in found.items()}


def main(config: BenchmarkConfig) -> None:
    """Train in all environments, compare, and write the result file."""
    known, folder = known_environments(), Path(config.work_dir)
    chosen = config.environments or tuple(known)
    if unknown := [name for name in chosen if name not in known]:
        raise UserError(f"environments={unknown}: expected some of {', '.join(known)}")
    shutil.rmtree(folder, ignore_errors=True)
    folders = {name: folder / name.replace(", ", "-").replace(" ", "-") for name in chosen}
    for name, place in folders.items():
        print(name, flush=True)
        run(config, place, known[name])
    write_json(folder / MACHINE_FILE, {"processor": describe_processor(), **versions()})
    figures = {
        f"{one} / {two}": rounded(compare(config, folders[one], folders[two]))
        for one, two in itertools.combinations(chosen, 2)
    }
    more: dict[str, Any] = {"environments": {name: known[name] for name in chosen}, "note": config.note}
    if config.compare is not None:
        elsewhere = Path(config.compare)
        more["elsewhere"] = json.loads((elsewhere / MACHINE_FILE).read_text())
        places = {name: elsewhere / place.name for name, place in folders.items()}
        figures |= {
            f"{name} / {name}, elsewhere": rounded(compare(config, folders[name], places[name]))
            for name in chosen
            if places[name].is_dir()
        }
    command = command_line("reproducibility", config, ignore=("output", "work_dir", "note", "compare"))
    write_result(config.output, command, figures, machine=describe_processor(), **more)


if __name__ == "__main__":
    main(parse_config(BenchmarkConfig, prog="python -m benchmarks.reproducibility"))
