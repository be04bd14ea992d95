"""PEFT's image-generation benchmark with an experiment of atoms.

    python -m benchmarks.peft_image_gen.run --peft ../peft --experiment flux2-klein-block4

PEFT's own run.py does it all; this checks what it needs, and imports the method, which registers it with PEFT, before.
"""

from __future__ import annotations

import importlib
import json
import os
import runpy
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from atomdiff.utils.errors import UserError
from atomdiff.utils.options import parse_config
from atomdiff.utils.paths import PathText, expand_paths

HERE = Path(__file__).resolve().parent
EXPERIMENTS = HERE / "experiments" / "atoms"
PACKAGES = ("datasets", "torchvision")


@dataclass(frozen=True)
class RunConfig:
    """Train and measure an experiment in PEFT's image-generation benchmark."""

    peft: PathText
    """Clone of https://github.com/huggingface/peft, which receives the results."""
    experiment: str
    """Name of a folder in experiments/atoms."""
    clean: bool = False
    """Keep no trained adapter."""

    def __post_init__(self) -> None:
        expand_paths(self)


def benchmark_folder(peft: str) -> Path:
    """The benchmark in a clone of PEFT.

    Raises:
        UserError: it is no clone, or has no such benchmark.
    """
    folder = Path(peft).resolve() / "method_comparison" / "image-gen"
    if not (folder / "run.py").is_file():
        raise UserError(
            f"--peft {peft}: found no {folder / 'run.py'}; expected an up-to-date clone: "
            "git clone https://github.com/huggingface/peft"
        )
    if not (Path(peft) / ".git").exists():
        raise UserError(
            f"--peft {peft}: found no .git, and the benchmark notes branch and commit of PEFT in its results: "
            "use git clone, not an archive"
        )
    return folder


def experiment_folder(name: str) -> Path:
    """The folder of an experiment.

    Raises:
        UserError: there is none of that name.
    """
    names = sorted(path.parent.name for path in EXPERIMENTS.glob("*/adapter_config.json"))
    if name not in names:
        raise UserError(f"--experiment {name}: there is no such folder in {EXPERIMENTS}; expected {', '.join(names)}")
    return EXPERIMENTS / name


def import_from(folder: Path) -> None:
    """Let Python import the PEFT of a clone before an installed one, and the modules beside the benchmark's run.py."""
    sys.path[:0] = [str(folder), str(folder.parents[1] / "src")]


def check_python(folder: Path) -> None:
    """Check Python's version, and that the packages are installed which only the benchmark needs.

    Raises:
        UserError: Python is too old, or a package is missing.
    """
    if sys.version_info < (3, 12):
        raise UserError(
            f"found Python {'.'.join(map(str, sys.version_info[:2]))}, expected 3.12 or newer: with an older one the "
            "benchmark cannot save the adapter, and reports 99999999 bytes without an error"
        )
    if missing := [package for package in PACKAGES if find_spec(package) is None]:
        raise UserError(
            f"found no {' and no '.join(missing)}: python -m pip install -r {folder / 'requirements.txt'} "
            "(torchvision in the build that fits torch)"
        )


def check_device() -> None:
    """Check that there is a GPU.

    Raises:
        UserError: there is none.
    """
    from peft.utils import infer_device

    if (device := infer_device()) not in ("cuda", "xpu"):
        raise UserError(
            f"found the device {device!r}, expected 'cuda' or 'xpu': PEFT's benchmark needs a GPU, and a torch that is "
            "built for it"
        )


def check_models(folder: Path, experiment: Path) -> None:
    """Check that base model and image encoder can be had, before anything large is loaded.

    Raises:
        UserError: one is neither in the cache nor on the Hub.
    """
    from huggingface_hub import hf_hub_download

    from atomdiff.concepts.hub import explained

    files = folder / "default_training_params.json", experiment / "training_params.json"
    settings = {key: value for file in files if file.is_file() for key, value in json.loads(file.read_text()).items()}
    for key, file in (("model_id", "model_index.json"), ("dino_model_id", "config.json")):
        if not Path(settings[key]).is_dir():
            with explained(f"the benchmark's {key} {settings[key]} cannot be loaded", settings[key]):
                hf_hub_download(settings[key], file)


def start(folder: Path, experiment: Path, clean: bool) -> None:
    """Run the benchmark's own program in this process, in the folder that it takes the experiment's path from."""
    importlib.import_module("atomdiff.tuner")  # registers the method with PEFT
    os.chdir(HERE)
    sys.argv[1:] = ["--verbose", *["--clean"] * clean, str(experiment.relative_to(HERE))]
    runpy.run_path(str(folder / "run.py"), run_name="__main__")


def main(config: RunConfig) -> None:
    """Check what is needed, and start.

    Raises:
        SystemExit: something is missing; the message says what to do.
    """
    try:
        folder, experiment = benchmark_folder(config.peft), experiment_folder(config.experiment)
        import_from(folder)
        check_python(folder)
        check_device()
        check_models(folder, experiment)
    except UserError as error:
        raise SystemExit(f"error: {error}") from error
    start(folder, experiment, config.clean)


if __name__ == "__main__":
    main(parse_config(RunConfig))
