"""A trial: one training run with its evaluation, in a process of its own, and one JSON file that says how it ended.

    python -m benchmarks.trials FOLDER

does the trial that `trial.json` in the folder describes (`trial_runner.py` writes it), and leaves `result.json` there.
One that was stopped goes on where it was: from the last checkpoint of its training, and with the images that it has.
"""

from __future__ import annotations

import json
import resource
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from datetime import date
from functools import cache
from pathlib import Path
from typing import Any

from PIL import Image

from atomdiff.utils.assets import find_asset
from atomdiff.utils.atomic import write_json
from atomdiff.utils.hashing import hash_file, hash_listing, hash_values
from atomdiff.utils.machine import describe_processor
from atomdiff.utils.quiet import quiet_libraries
from atomdiff.utils.text_files import read_yaml
from atomdiff.utils.versions import versions

OF_EVALUATION = ("judge", "other photos", "protocols", "sampling")
"""Keys of a fingerprint that training does not depend on."""
OF_VALIDATION = ("validation_steps", "validation_prompts")
"""Options of a run that trials leave at their defaults: the images that it shows on the way change no result."""
TRIAL_FILE, RESULT_FILE = "trial.json", "result.json"
_TRAINED_FILE = "trained.json"
RUN_FOLDER = "run"


@dataclass(frozen=True)
class Trial:
    """What is trained on which photos, and how it is evaluated."""

    folder: str
    """Folder of all that the trial writes."""
    photos: str
    """Folder of the subject's photos, named like its class, beside those of the other subjects."""
    adapter: Mapping[str, Any]
    """Config of the method, as in an adapter.json."""
    options: Mapping[str, Any]
    """Options of the training run besides those of `run`, such as learning_rate and seed."""
    protocols: tuple[str, ...]
    """Protocols of the evaluation."""
    run: str = "configs/demo.yaml"
    """Training config, a YAML file; its sampling settings are those of the evaluation."""
    shared: str = "out/trials"
    """Folder of what trials share: images of the base, cached latents."""

    @property
    def subject(self) -> str:
        """Name of the subject, which is its class."""
        return Path(self.photos).name

    def config(self) -> Any:
        """Return the config of the training run."""
        folder, file = Path(self.folder), Path(find_asset(self.run))
        run = _run_config(file, hash_listing(file))
        options: dict[str, Any] = {
            "report_to": None,
            "validation_loss_steps": 0,
            **{entry.name: entry.default for entry in fields(run) if entry.name in OF_VALIDATION},
            **self.options,
            "instance_data_dir": self.photos,
            "class_name": self.subject,
            "adapter": str(folder / "adapter.json"),
            "output_dir": str(folder / RUN_FOLDER),
            "cache_dir": str(Path(self.shared) / "cache"),
        }
        return replace(run, **options)


@cache
def _run_config(file: Path, listing: str) -> Any:
    from atomdiff.training.config import load_config

    return load_config(["--config", str(file), "--instance_data_dir", "photos", "--class_name", "subject"])


def fingerprint(trial: Trial) -> dict[str, str]:
    """Return keys of what a trial's result depends on, by what it is.

    Other files that the run names, such as a VAE of its own or class images, do not count. Nor do options that have
    their default value, so that options that are added later change nothing.
    """
    from atomdiff.evaluate.protocol import PROTOCOLS
    from atomdiff.toybox.judge import JUDGE_FOLDER

    config = trial.config()
    defaults = {entry.name: entry.default for entry in fields(config)}
    run = {name: value for name, value in config.snapshot().items() if value != defaults.get(name)}
    sampling = [str(run.pop(name, None)) for name in ("num_inference_steps", "guidance_scale")]
    base = config.pretrained_model_name_or_path
    files = [PROTOCOLS / f"{name}.yaml" for name in trial.protocols]
    files = [file if file.is_file() else Path(name) for file, name in zip(files, trial.protocols, strict=True)]
    photos = Path(trial.photos)
    others = sorted(each for each in photos.parent.iterdir() if each.is_dir() and each != photos)
    return {
        "base": _content_key(Path(find_asset(base))),
        "judge": _content_key(Path(JUDGE_FOLDER)),
        "adapter": hash_values(json.dumps(trial.adapter, sort_keys=True)),
        "run settings": hash_values(json.dumps(run, sort_keys=True, default=str)),
        "photos": _content_key(photos),
        "other photos": hash_values(*(value for each in others for value in (each.name, _content_key(each)))),
        "protocols": hash_values(*(json.dumps(read_yaml(file)) for file in files)),
        "sampling": hash_values(*sampling),
    }


def _content_key(path: Path) -> str:
    """Return a key of a file, or of the files in a folder but for its documentation."""
    return _key_of_listed(path, hash_listing(path))


@cache
def _key_of_listed(path: Path, listing: str) -> str:
    files = sorted(file for file in path.rglob("*") if file.is_file() and file.suffix != ".md") or [path]
    return hash_values(*(value for file in files for value in (str(file.relative_to(path)), hash_file(file))))


def concept_path(trial: Trial) -> Path:
    """Return where the concept of a trial is that has been done."""
    trained = json.loads((Path(trial.folder) / _TRAINED_FILE).read_text())
    return Path(trial.folder) / RUN_FOLDER / trained["concept"]


def has_concept(trial: Trial) -> bool:
    """Tell whether what a trial has trained is there: results may be kept without it."""
    return (Path(trial.folder) / _TRAINED_FILE).is_file() and concept_path(trial).exists()


def read_trial(folder: Path) -> Trial:
    """Read the trial of a folder."""
    found = json.loads((folder / TRIAL_FILE).read_text())["trial"]
    return Trial(**{**found, "protocols": tuple(found["protocols"])})


def run_trial(folder: Path) -> dict[str, Any]:
    """Do the trial of a folder, and write what it gave, or the message of what failed, to its `result.json`.

    Raises:
        KeyboardInterrupt: it was stopped; nothing is written.
    """
    content = json.loads((folder / TRIAL_FILE).read_text())
    try:
        found = {"status": "done", **train_and_evaluate(read_trial(folder))}
    except (Exception, SystemExit) as error:  # kept: a method that fails stays in the comparison as failed
        message = " ".join(str(error).split()) or type(error).__name__
        found = {"status": "failed", "message": message[:500]}
    result = {**found, "versions": versions(), "date": date.today().isoformat(), **content}
    write_json(folder / RESULT_FILE, result)
    return result


def train_and_evaluate(trial: Trial) -> dict[str, Any]:
    """Train, then evaluate by all protocols; what an earlier process did is not done again.

    Returns:
        Parameters, bytes, seconds and memory of the training, and `metrics` by protocol.
    """
    config, trained_file = trial.config(), Path(trial.folder) / _TRAINED_FILE
    if not has_concept(trial):
        write_json(trained_file, _train(config))
    trained: dict[str, Any] = json.loads(trained_file.read_text())
    evaluated = evaluate_concept(trial, Path(config.output_dir) / trained.pop("concept"))
    for leftover in Path(config.output_dir).glob("checkpoint-*"):
        shutil.rmtree(leftover)
    return {**trained, **evaluated}


def evaluate_concept(trial: Trial, concept: Path) -> dict[str, Any]:
    """Evaluate a concept, named like its subject, by all protocols of a trial; images that are there are kept.

    Returns:
        The subject's `kind`, `metrics` by protocol, and `top_1`.
    """
    config = trial.config()
    found = {Path(protocol).stem: _evaluate(trial, config, concept, protocol) for protocol in trial.protocols}
    metrics = {protocol: each["metrics"]["toybox"] for protocol, each in found.items()}
    kind = next(iter(found.values()))["kind"]
    return {"kind": kind, "metrics": metrics, "top_1": _top_1(trial, config.trigger_phrase)}


def _train(config: Any) -> dict[str, Any]:
    from atomdiff.training.checkpoint import find_checkpoints
    from atomdiff.training.dreambooth import train
    from atomdiff.training.report.write import RECORD_FILE

    if find_checkpoints(Path(config.output_dir)):
        config = replace(config, resume_from_checkpoint="latest")
    concept = train(config)
    report = json.loads((Path(config.output_dir) / RECORD_FILE).read_text())
    return {
        "concept": concept.name,
        "parameters": report["num_trainable_parameters"],
        "bytes": report["file_bytes"],
        "train_seconds": report["train_seconds"],
        "peak_memory_bytes": peak_memory(),
        "final_loss": report["final_loss"],
        "device": _device(),
        "precision": report["precision"].replace("no on", "float32 on"),
    }


def _device() -> str:
    """Return the name of the GPU, if one was used, else the kind of processor with its threads."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else describe_processor()


def peak_memory() -> int:
    """Return the most bytes that this process has held: of the GPU, if one was used, else of the process."""
    import torch

    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _evaluate(trial: Trial, config: Any, concept: Path, protocol: str) -> dict[str, Any]:
    """Evaluate a concept by a protocol; return what results.json says of its subject."""
    from atomdiff.cli.evaluate import evaluate_concepts
    from atomdiff.evaluate.config import EvaluateConfig

    base = find_asset(config.pretrained_model_name_or_path)
    folder = Path(trial.folder) / Path(protocol).stem
    share_base_images(folder, base, Path(trial.shared))
    evaluate_concepts(
        EvaluateConfig(
            pretrained_model_name_or_path=base,
            concepts=(str(concept),),
            trigger_phrases=(config.trigger_phrase,),
            reference_data_dir=str(Path(trial.photos).parent),
            class_name=trial.subject,
            protocol=protocol,
            encoders=("toybox",),
            output_dir=str(folder),
            num_inference_steps=config.num_inference_steps,
            guidance_scale=config.guidance_scale,
            sample_batch_size=config.sample_batch_size,
        )
    )
    results = json.loads((folder / "results.json").read_text())
    found: dict[str, Any] = results["subjects"][trial.subject]
    return found


def share_base_images(folder: Path, base: str, shared: Path) -> None:
    """Let the base's images of an evaluation lie where others of the same base find them.

    Args:
        folder: of the evaluation.
        base: the base model, a folder.
        shared: where they lie.
    """
    link = folder / "images" / "base"
    if not link.exists():
        images = shared.resolve() / f"base-{_content_key(Path(base))[:12]}-images"
        images.mkdir(parents=True, exist_ok=True)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.unlink(missing_ok=True)  # one that leads nowhere, since the folders were moved
        link.symlink_to(images)


def _top_1(trial: Trial, trigger_phrase: str) -> float:
    """Return the share of the first protocol's images of the subject that are recognized among all subjects."""
    from atomdiff.data.images import read_image
    from atomdiff.toybox.judge import load_judge
    from benchmarks.recognition import Gallery

    folder = Path(trial.folder) / Path(trial.protocols[0]).stem / "images" / "concepts" / trial.subject
    images = []
    for file in sorted(folder.glob("*.png")):
        with Image.open(file) as image:
            named = trigger_phrase in image.info["prompt"]
        images += [read_image(file)] if named else []
    gallery = Gallery.read(load_judge(), Path(trial.photos).parent)
    return gallery.top_1(images, [trial.subject] * len(images))


if __name__ == "__main__":
    quiet_libraries()
    try:
        run_trial(Path(sys.argv[1]))
    except KeyboardInterrupt as stop:
        print(stop, file=sys.stderr)
        raise SystemExit(130) from None
