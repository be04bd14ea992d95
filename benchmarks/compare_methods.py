"""All methods of configs/experiments on the subjects of the toybox, each at a learning rate of its own.

    python -m benchmarks.compare_methods
    python -m benchmarks.compare_methods --quick true     # within half an hour of two CPU cores

Every method goes through the same training run with the same token and the same preservation. Its learning rate is
searched on the tuning subjects, beginning with its own from overrides.yaml (`trial_figures.search_rate`): the best has
the highest gain among those that keep within one allowance of drift and 90 % of the base's scenes. At that rate it
learns the evaluation subjects, with every seed. The most telling methods come first, and each has a result file as soon
as it is done, from which `methods_report.py` makes the table and the plots. A stopped comparison goes on where it was.
"""

from __future__ import annotations

import json
import shutil
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from atomdiff.data.image_files import list_images
from atomdiff.evaluate.protocol import load_protocol
from atomdiff.utils.assets import find_asset
from atomdiff.utils.errors import UserError
from atomdiff.utils.hashing import hash_values
from atomdiff.utils.options import parse_config
from atomdiff.utils.quiet import quiet_libraries
from atomdiff.utils.text_files import read_yaml
from benchmarks.experiments import make_trial, ordered_methods, own_rate, vary_trial
from benchmarks.result_file import command_line, write_result
from benchmarks.trial_figures import (
    Result,
    Summary,
    check_protocols,
    means_by_rate,
    search_rate,
    subject_of,
    summarize_kinds,
    trial_figures,
)
from benchmarks.trial_runner import Runner
from benchmarks.trials import OF_VALIDATION, Trial

COSTS = ("parameters", "bytes", "train_seconds", "peak_memory_bytes")
UNNAMED = ("work_dir", "output_dir", "processes", "retry_failed")  # options that say only where and how fast
OF_EVALUATION = ("photos", "max_train_steps")  # options of the runs on evaluation subjects alone
_QUICK_METHODS = 3


@dataclass(frozen=True)
class CompareConfig:
    """Compare methods: parameters, bytes, time, memory, similarity, scenes, drift, diversity and prompt match."""

    methods: tuple[str, ...] = ()
    """Folders under configs/experiments. Default: all that train a diffusion model, the most telling ones first."""
    subjects: tuple[str, ...] = ()
    """Subjects of the evaluation. Default: all of the first of `protocols`."""
    tuning_subjects: tuple[str, ...] = ()
    """Subjects on which the learning rate is chosen. Default: all of `tuning_protocol`."""
    seeds: tuple[int, ...] = (0, 1)
    """Seeds of the training runs on each evaluation subject."""
    trials: int = 3
    """Learning rates that are tried of each method, at most; 1 is its own one, without a search."""
    max_drift: float = 0.1
    """Highest mean drift on the tuning subjects at which a learning rate can be the best."""
    quick: bool = False
    """Three methods at their own learning rates, one subject of each kind and one seed; result files in `work_dir`."""
    processes: int = 1
    """Training runs at a time. Their seconds are comparable with those of the same number only."""
    retry_failed: bool = False
    """Run again what has failed."""
    run: str = "configs/demo.yaml"
    """Settings of the training runs and of sampling."""
    subjects_dir: str = "samples/subjects"
    """A folder of photos for each evaluation subject."""
    photos: int | None = None
    """Photos of each evaluation subject that are trained on, the first ones. Default: all."""
    max_train_steps: int | None = None
    """Training steps on the evaluation subjects. Default: those of `run`."""
    tuning_dir: str = "samples/tuning_subjects"
    """A folder of photos for each tuning subject."""
    protocols: tuple[str, ...] = ("toybox", "toybox_edits")
    """Protocols of the evaluation: of similarity and drift, and of prompt match."""
    tuning_protocol: str = "toybox_tuning"
    """Protocol of the search."""
    work_dir: str = "out/compare_methods"
    """Folder of the runs; finished ones are not repeated."""
    output_dir: str = "benchmarks/results/methods"
    """Folder of the result files, one a method."""


def quick_config(config: CompareConfig) -> CompareConfig:
    """Return what a comparison is with `quick`."""
    of_kind: dict[str, str] = {}
    for name, subject in load_protocol(config.protocols[0]).subjects.items():
        of_kind.setdefault(subject.get("prompts", ""), name)
    return replace(
        config,
        methods=config.methods or tuple(ordered_methods()[:_QUICK_METHODS]),
        subjects=config.subjects or tuple(of_kind.values()),
        seeds=config.seeds[:1],
        trials=1,
        output_dir=str(Path(config.work_dir) / "quick"),
    )


def compare(config: CompareConfig, method: str, runner: Runner) -> dict[str, Any]:
    """Return what there is to know of a method, as its result file has it.

    Returns:
        `status`: done, or failed if no subject is; `figures`: learning rate and costs; `summary`: the other
        figures, of all subjects and of each kind; `runs`; `search`; `failed`: what failed; `conditions`: what has to be
        equal in two files that are compared.
    """
    rate: float | None = own_rate(method)
    searched: dict[str, Any] = {}
    found: dict[str, Any] = {"search": {}}
    if config.trials > 1:
        rate, searched, found["search"] = search(config, method, runner)
    if rate is None:
        failures = [failure for each in found["search"].values() for failure in each["failed"]]
        return found | {"status": "failed", "figures": {}, "failed": failures}
    photos, subjects = photos_folder(config), config.subjects or tuple(load_protocol(config.protocols[0]).subjects)
    trials = [
        make_trial(method, rate, photos / subject, config.protocols, seed, config.run, config.work_dir)
        for seed in config.seeds
        for subject in subjects
    ]
    if config.max_train_steps is not None:
        steps = {"max_train_steps": config.max_train_steps}
        trials = [vary_trial(trial, f"{config.max_train_steps}-steps", options=steps) for trial in trials]
    results = runner.run(trials)
    found["conditions"] = {
        "subjects": sorted(subjects),
        "seeds": sorted(config.seeds),
        "trials": config.trials,
        "max_drift": config.max_drift,
        "tuning": hash_values(repr(load_protocol(config.tuning_protocol)), *sorted(config.tuning_subjects))[:16],
        "run": run_key(config.run),
        **{name: value for name in OF_EVALUATION if (value := getattr(config, name)) is not None},
        **{name: results[0]["fingerprint"][name][:16] for name in ("base", "judge", "protocols", "sampling")},
    }
    found |= describe_runs(results, {"learning_rate": rate, **searched})
    if found["status"] == "done":
        found["figures"]["tensor_bytes"] = tensor_bytes(trials[0])
    return found


def run_key(run: str) -> str:
    """Return a key of a training config without the options that trials leave at their defaults."""
    options = {name: value for name, value in read_yaml(find_asset(run)).items() if name not in OF_VALIDATION}
    return hash_values(json.dumps(options))[:16]


def photos_folder(config: CompareConfig) -> Path:
    """Return the folder of the evaluation subjects; with `photos`, a copy of it with so many of each to train on.

    Raises:
        UserError: a subject has fewer.
    """
    folder = Path(config.subjects_dir)
    if config.photos is None:
        return folder
    copy = Path(config.work_dir) / f"{folder.name}-{config.photos}-photos"
    shutil.rmtree(copy, ignore_errors=True)  # what the folder no longer has
    shutil.copytree(folder, copy)
    for subject in (each for each in copy.iterdir() if each.is_dir()):
        found = list_images(subject)
        if not 1 <= config.photos <= len(found):
            photos = f"the photos of {folder / subject.name}"
            raise UserError(f"photos: found {config.photos}; expected 1 to {len(found)}, {photos}")
        for photo in found[config.photos :]:
            for file in subject.glob(f"{photo.stem}.*"):  # its caption, too
                file.unlink()
    return copy


def tensor_bytes(trial: Trial) -> int:
    """Return the bytes of the tensors that a method stores, the token embedding included, with numbers in float16."""
    from atomdiff.concepts.parameter_count import count_parameters
    from atomdiff.tuner.read_config import read_adapter

    config = trial.config()
    base = find_asset(config.pretrained_model_name_or_path)
    counted = count_parameters(base, read_adapter(config.adapter))
    encoders = [json.loads(file.read_text()) for file in Path(base).glob("text_encoder*/config.json")]
    return counted.file_bytes + config.train_token * sum(2 * encoder["hidden_size"] for encoder in encoders)


def search(config: CompareConfig, method: str, runner: Runner) -> tuple[float | None, dict[str, Any], dict[str, Any]]:
    """Search the learning rate of a method on the tuning subjects.

    Returns:
        The rate, None if trials failed at all of them; what its figures say of the search; and the means at each rate.
    """
    subjects = config.tuning_subjects or tuple(load_protocol(config.tuning_protocol).subjects)
    failures: dict[float, list[dict[str, Any]]] = {}

    def measure(rate: float) -> Summary | None:
        trials = [
            make_trial(
                method,
                rate,
                Path(config.tuning_dir) / subject,
                (config.tuning_protocol,),
                config.seeds[0],
                config.run,
                config.work_dir,
            )
            for subject in subjects
        ]
        results = runner.run(trials)
        failures[rate] = failures_of(results)
        return None if failures[rate] else summarize_kinds(results)["all"]

    best, allowed, found = search_rate(own_rate(method), config.trials, config.max_drift, measure)
    at_end = len(found) > 2 and best in (min(found), max(found))
    means = zip(means_by_rate(found).items(), failures.values(), strict=True)
    searched = {rate: {**figures, "failed": failed} for (rate, figures), failed in means}
    return best, {"within_allowance": allowed, "at_end_of_search": at_end}, searched


def describe_runs(results: Sequence[Result], figures: dict[str, Any]) -> dict[str, Any]:
    """Return status, figures, summary, runs and failures of the runs of a method."""
    failures, done = failures_of(results), [result for result in results if result["status"] == "done"]
    if not (summary := summarize_kinds(results)):
        return {"status": "failed", "figures": figures, "failed": failures}
    return {
        "status": "done",
        "figures": figures | {name: statistics.median_low(result[name] for result in done) for name in COSTS},
        "summary": summary,
        "runs": [
            {"subject": subject_of(each), "kind": each["kind"], "seed": each["trial"]["options"]["seed"]}
            | {name: each[name] for name in COSTS}
            | trial_figures(each)
            for each in done
        ],
        "failed": failures,
        "machine": " / ".join(dict.fromkeys(_machine(each) for each in done)),
    }


def _machine(result: Result) -> str:
    return f"{result['device']}, {result['precision']}, runs at a time: {result['processes']}"


def failures_of(results: Sequence[Result]) -> list[dict[str, Any]]:
    """Return subject, learning options and message of the trials that failed."""
    return [
        {"subject": subject_of(each), **each["trial"]["options"], "message": each["message"]}
        for each in results
        if each["status"] == "failed"
    ]


def main(config: CompareConfig) -> None:
    """Run what is not done yet, method by method, and write the result file of each."""
    quiet_libraries()
    asked, config = config, quick_config(config) if config.quick else config
    check_protocols(config.protocols, config.subjects, Path(config.subjects_dir))
    if config.trials > 1:
        check_protocols((config.tuning_protocol,), config.tuning_subjects, Path(config.tuning_dir))
    runner = Runner(config.processes, config.retry_failed)
    for method in config.methods or ordered_methods():
        found = compare(config, method, runner)
        command = command_line("compare_methods", replace(asked, methods=(method,)), UNNAMED)
        file = Path(config.output_dir) / f"{method.replace('/', '-')}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        write_result(file, command, found.pop("figures"), found.pop("machine", None), method=method, **found)


if __name__ == "__main__":
    main(parse_config(CompareConfig, prog="python -m benchmarks.compare_methods"))
