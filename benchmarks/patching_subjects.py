"""One base, many subjects: a small concept for each beside full copies of the weights, and interpolated copies.

    python -m benchmarks.patching_subjects

The counterpart of `patching.py` for diffusion. Concepts and copies are those of `compare_methods.py`, seed 0, at the
learning rates of its result files; what is missing is trained. Similarity and gain of both, and their bytes, are those
of these runs: files as they are stored, and the tensors with numbers in float16.

All concepts are loaded into one pipeline of the base, and each is made the active one. Compared to the bit: the images
of each with those of the concept alone in a pipeline of its own; and, once all are switched off, and again once they
are unloaded, every tensor and the images of unrelated prompts with those of the base before. (While concepts are
loaded, embedding tables have further rows for their words; those are left out.) A switch is timed in turns with a copy
of a UNet's weights into another in memory, and loading a concept's file with reading a copy's.

A copy is also interpolated with the base, W0 + a (W - W0) with W0 the base's UNet and W the copy's, as in PAINT
(Ilharco et al., "Patching open-vocabulary models by interpolating weights", arXiv 2208.05592): how alike the subject is
in the places that no training photo shows against how far the images of unrelated prompts drift from the base's. The
word of the subject stays the copy's own, as the heads of tasks do in `patching.py`. Beside it are the points of
concepts with an adapter weight, whose word stays whole, too. Switched off, they have no drift at all.

Expected before the first run: all is equal to the bit. All concepts together have less than .1 % of the copies' bytes,
as files and as tensors. A switch takes three times as long as copying the weights, but less than 100 ms. Along both
curves drift comes first: at a = .5 a copy has half of its drift or more, and a third of what it adds to the similarity
of its word alone. At the drift of a concept with weight .75, copies are .03 less similar; with weight 1 a concept
drifts further than any copy, whose learning rate was cut short.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from atomdiff.evaluate.drift import pixel_differences
from atomdiff.evaluate.encoders import ImageEncoder
from atomdiff.evaluate.similarity import similarities
from atomdiff.evaluate.suite import open_adapted
from atomdiff.utils.errors import UserError
from atomdiff.utils.options import parse_config
from atomdiff.utils.quiet import quiet_libraries
from benchmarks.compare_methods import tensor_bytes
from benchmarks.experiments import ComparedConcepts, read_adapter_fields
from benchmarks.interpolation import interpolate, similarity_at
from benchmarks.loaded_concepts import (
    Base,
    generate,
    load_concepts,
    open_base,
    phrase_of,
    places_suite,
    same_images,
    unrelated_suite,
    unseen_photos,
)
from benchmarks.result_file import command_line, write_result
from benchmarks.timing import take_turns
from benchmarks.trial_figures import Result, summarize, trial_figures
from benchmarks.trial_runner import run_concepts
from benchmarks.trials import Trial, concept_path

FROM_RUNS = ("similarity", "gain", "drift")
Trials = Mapping[str, Trial]
"""Finished trials by subject."""
Point = dict[str, float]
"""Similarity and drift."""


@dataclass(frozen=True)
class PatchingConfig(ComparedConcepts):
    """Patch one base for many subjects."""

    patches: str = "atoms/default"
    """Method of the concepts, a folder under configs/experiments."""
    copies: str = "full/default"
    """Method of the copies, which saves whole pipelines."""
    subjects: tuple[str, ...] = ("mug", "robot", "teapot", "cat", "house", "fish", "umbrella", "mushroom")
    """Subjects."""
    weights: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0)
    """Adapter weights of the concepts."""
    alphas: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    """Weights of the copies in the interpolation."""
    images_per_prompt: int = 2
    """Images of each place."""
    repeats: int = 20
    """Switches that are timed."""
    output: str = "benchmarks/results/patching_subjects.json"
    """The result file."""


def check_methods(config: PatchingConfig) -> None:
    """Check that copies have weights of their own, and patches have not.

    Raises:
        UserError: it is otherwise.
    """
    for option, method, is_full in (("patches", config.patches, False), ("copies", config.copies, True)):
        if (found := read_adapter_fields(method)["peft_type"] == "FULL") != is_full:
            saves = {True: "whole pipelines, as full/default", False: "concepts, as atoms/default"}
            raise UserError(f"{option}: {method} saves {saves[found]}; give a method that saves {saves[is_full]}")


def figures_of_runs(results: Mapping[str, Mapping[str, Result]]) -> dict[str, Any]:
    """Return means and figures by subject of the evaluations of patches and copies, and by how much patches are better.

    Args:
        results: results of the runs by name and subject.
    """
    found = {
        name: {
            subject: {figure: trial_figures(result)[figure] for figure in FROM_RUNS}
            for subject, result in by_subject.items()
        }
        for name, by_subject in results.items()
    }
    patches, copies = found["patches"], found["copies"]
    differences = {
        subject: [{figure: own[figure] - copies[subject][figure] for figure in FROM_RUNS}]
        for subject, own in patches.items()
    }
    means = {name: summarize({s: [each] for s, each in by_subject.items()}) for name, by_subject in found.items()}
    return {**means, "patches over copies": summarize(differences), "by subject": found}


def size_figures(trials: Mapping[str, Trials], results: Mapping[str, Mapping[str, Result]]) -> dict[str, Any]:
    """Return the bytes of all patches, of all copies and their share: of files, and of tensors in float16."""
    figures: dict[str, Any] = {}
    for name, by_subject in results.items():
        figures[f"{name}:bytes"] = sum(result["bytes"] for result in by_subject.values())
        figures[f"{name}:tensor_bytes"] = sum(map(tensor_bytes, trials[name].values()))
    for kind in ("bytes", "tensor_bytes"):
        figures[f"{kind}_share"] = float(f"{figures[f'patches:{kind}'] / figures[f'copies:{kind}']:.3g}")
    return figures


def measure_point(
    config: PatchingConfig, pipe: Any, trial: Trial, phrase: str, base: Base, judge: ImageEncoder, references: Tensor
) -> Point:
    """Return similarity to the references, embeddings of a subject's photos, and drift of a pipeline as it is."""
    suites = places_suite(trial, config.images_per_prompt), unrelated_suite(trial)
    places, unrelated = (generate(suite, pipe, phrase, trial.subject, trial) for suite in suites)
    return {
        "similarity": float(similarities(judge.embed(places.subject), references).mean()),
        "drift": float(pixel_differences(base.images, unrelated.unrelated).mean()),
    }


def equal_to_alone(config: PatchingConfig, pipe: Any, trials: Trials) -> bool:
    """Tell whether each concept gives, among all the others, the images that it gives alone, to the bit."""
    import atomdiff

    same = []
    for subject, trial in trials.items():
        suite = places_suite(trial, config.images_per_prompt)
        suite = replace(suite, prompts=suite.prompts[:1])
        atomdiff.set_active(pipe, subject)
        among = generate(suite, pipe, phrase_of(subject), f"{subject} among all", trial).subject
        own = open_base(trial)
        name = atomdiff.load_atoms(own, concept_path(trial))
        atomdiff.set_active(own, name)
        alone = generate(suite, own, trial.config().trigger_phrase, f"{subject} alone", trial).subject
        same.append(same_images(among, alone))
    return all(same)


def patch_points(
    config: PatchingConfig, base: Base, trials: Trials, judge: ImageEncoder
) -> dict[str, dict[float, Point]]:
    """Return similarity and drift of each concept by its adapter weight, in the pipeline that has them all."""
    import atomdiff

    found: dict[str, dict[float, Point]] = {}
    for subject, trial in trials.items():
        references = unseen_photos(trial, judge)
        for weight in config.weights:
            atomdiff.set_active(base.pipe, {subject: weight})
            point = measure_point(config, base.pipe, trial, phrase_of(subject), base, judge, references)
            found.setdefault(subject, {})[weight] = point
    return found


def copy_points(
    config: PatchingConfig, base: Base, trials: Trials, judge: ImageEncoder
) -> dict[str, dict[float, Point]]:
    """Return similarity and drift of each copy, interpolated with the base, by the weight of the copy."""
    found: dict[str, dict[float, Point]] = {}
    for subject, trial in trials.items():
        pipe = open_copy(base, trial)
        end = {path: tensor.clone() for path, tensor in pipe.unet.state_dict().items()}
        references = unseen_photos(trial, judge)
        for alpha in config.alphas:
            pipe.unet.load_state_dict(interpolate(base.unet, end, alpha))
            point = measure_point(config, pipe, trial, trial.config().trigger_phrase, base, judge, references)
            found.setdefault(subject, {})[alpha] = point
    return found


def open_copy(base: Base, trial: Trial) -> Any:
    """Return the pipeline that full tuning saved."""
    return open_adapted(None, concept_path(trial)).to(base.pipe.device)


def timings(config: PatchingConfig, base: Base, patches: Trials, copies: Trials) -> dict[str, float]:
    """Return seconds of a switch and of copying weights, of loading a concept's file and of reading a copy's."""
    import atomdiff

    device = base.pipe.device.type
    subject = next(iter(patches))
    pipe = open_copy(base, copies[subject])
    state = {path: tensor.clone() for path, tensor in pipe.unet.state_dict().items()}
    (file,) = (concept_path(copies[subject]) / "unet").glob("*.safetensors")
    switches = {name: partial(atomdiff.set_active, base.pipe, name) for name in patches}
    switches["base"] = partial(atomdiff.set_active, base.pipe, {})
    copy = {"copy": partial(pipe.unet.load_state_dict, state)}
    seconds = take_turns({**switches, **copy}, config.repeats, device, warm_up=2)
    path = concept_path(patches[subject])
    load = partial(atomdiff.load_atoms, base.pipe, path, "again", trigger_word="sks-again")
    once = take_turns({"load": load, "read": lambda: pipe.unet.load_state_dict(load_file(file))}, 1, device)
    atomdiff.unload_atoms(base.pipe, "again")
    return {
        "switch_seconds": statistics.median(seconds[name] for name in switches),
        "copy_weights_seconds": seconds["copy"],
        "load_concept_seconds": once["load"],
        "read_copy_seconds": once["read"],
    }


def curve_figures(points: Mapping[str, Mapping[str, Mapping[float, Point]]]) -> dict[str, Any]:
    """Return mean similarity and drift by weight, and how similar copies are at the drift of patches.

    Args:
        points: by name, subject and weight.
    """
    figures: dict[str, Any] = {}
    means: dict[str, dict[float, Point]] = {}
    for name, by_subject in points.items():
        for weight in next(iter(by_subject.values())):
            found = summarize({subject: [by_weight[weight]] for subject, by_weight in by_subject.items()})
            figures[f"{name}:{weight:g}"] = found
            means.setdefault(name, {})[weight] = {figure: each["mean"] for figure, each in found.items()}
    for weight, point in means["patches"].items():
        beside = similarity_at([*means["copies"].values()], point["drift"])
        figures[f"copies at the drift of patches:{weight:g}"] = None if beside is None else round(beside, 4)
    return figures


def main(config: PatchingConfig) -> None:
    """Train what is missing, compare, and write the result file."""
    quiet_libraries()
    check_methods(config)
    import atomdiff
    from atomdiff.toybox.judge import load_judge

    methods = {"patches": config.patches, "copies": config.copies}
    trials = {
        name: {subject: config.trial(method, subject) for subject in config.subjects}
        for name, method in methods.items()
    }
    results = {
        name: dict(zip(each, run_concepts([*each.values()], config.processes), strict=True))
        for name, each in trials.items()
    }
    judge, base = load_judge(), Base(trials["patches"][config.subjects[0]])
    load_concepts(base.pipe, trials["patches"])
    figures: dict[str, Any] = {"images_equal_to_those_alone": equal_to_alone(config, base.pipe, trials["patches"])}
    points = {
        "patches": patch_points(config, base, trials["patches"], judge),
        "copies": copy_points(config, base, trials["copies"], judge),
    }
    seconds = timings(config, base, trials["patches"], trials["copies"])
    atomdiff.set_active(base.pipe, {})
    figures["base_equal_switched_off"] = base.is_as_before("all switched off", further_rows=True)
    atomdiff.unload_atoms(base.pipe)
    figures["base_equal_unloaded"] = base.is_as_before("all unloaded")
    figures |= size_figures(trials, results) | seconds | figures_of_runs(results) | curve_figures(points)
    rows = [
        {"what": name, "subject": subject, "weight": weight, **point}
        for name, by_subject in points.items()
        for subject, by_weight in by_subject.items()
        for weight, point in by_weight.items()
    ]
    command = command_line("patching_subjects", config, ("work_dir", "processes", "output"))
    write_result(config.output, command, figures, points=rows)


if __name__ == "__main__":
    main(parse_config(PatchingConfig, prog="python -m benchmarks.patching_subjects"))
