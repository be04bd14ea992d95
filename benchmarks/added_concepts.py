"""Several concepts at once: how alike its subject a concept remains when others are added to the weights beside it.

    python -m benchmarks.added_concepts
    python -m benchmarks.added_concepts --methods atoms/default --preservation class \
        --output benchmarks/results/added_concepts_preservation.json

The concepts are those of `compare_methods.py`, seed 0, at the learning rates of its result files; what is missing is
trained. Each was trained alone with the same trigger word, and gets one of its own when it is loaded. Every subject is
asked for in the places that no training photo shows, from the same seeds, with its own concept alone and with those of
one and of three other subjects beside it, all with weight 1. *kept* is the similarity over that of the concept alone.
`--preservation` trains other concepts, which keep what the base makes of the class (or of an empty prompt).

Expected before the first run: beside one other concept .9 of the similarity is kept by atoms and by LoRA alike, beside
three .7; other words do not protect the weights, so what is lost is lost to colors of the other subjects. Found: beside
one other .64 by atoms and .49 by LoRA. Expected before a run with preservation of the class: alone .05 less similar,
beside one other .8 kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from atomdiff.evaluate.encoders import ImageEncoder
from atomdiff.evaluate.similarity import similarities
from atomdiff.evaluate.suite import generate_images
from atomdiff.utils.options import parse_config
from atomdiff.utils.quiet import quiet_libraries
from benchmarks.experiments import ComparedConcepts, vary_trial
from benchmarks.loaded_concepts import load_concepts, open_base, phrase_of, places_suite, unseen_photos
from benchmarks.result_file import command_line, write_result
from benchmarks.trial_figures import summarize
from benchmarks.trial_runner import run_concepts
from benchmarks.trials import Trial


@dataclass(frozen=True)
class AddedConceptsConfig(ComparedConcepts):
    """Add concepts to each other, and measure what is left of each."""

    methods: tuple[str, ...] = ("atoms/default", "lora/attention_r16")
    """Folders under configs/experiments."""
    subjects: tuple[str, ...] = ("mug", "robot", "teapot", "cat", "house", "fish", "umbrella", "mushroom")
    """Subjects; those beside one are the next ones."""
    counts: tuple[int, ...] = (1, 2, 4)
    """Concepts at a time; the first number is what the others are compared with."""
    images_per_prompt: int = 4
    """Images of each prompt."""
    preservation: Literal["none", "class", "blank"] = "none"
    """Output preservation in the training runs, with weight 1."""
    output: str = "benchmarks/results/added_concepts.json"
    """The result file."""


def beside(subjects: Sequence[str], subject: str, count: int) -> list[str]:
    """Return a subject and the next ones in the list, as many as asked for, from the start again after the last."""
    first = subjects.index(subject)
    return [subjects[(first + offset) % len(subjects)] for offset in range(count)]


def trial_of(config: AddedConceptsConfig, method: str, subject: str) -> Trial:
    """Return the training run of a subject's concept."""
    trial = config.trial(method, subject)
    if config.preservation == "none":
        return trial
    name = f"preservation-{config.preservation}"
    return vary_trial(trial, name, options={"preservation": config.preservation})


def similarity_by_count(config: AddedConceptsConfig, pipe: Any, trial: Trial, judge: ImageEncoder) -> dict[str, float]:
    """Return the mean similarity of a subject's images to its unseen photos, by the number of concepts."""
    import atomdiff
    from atomdiff.utils.precision import autocast, compute_device

    run, suite = trial.config(), places_suite(trial, config.images_per_prompt)
    references = unseen_photos(trial, judge)
    found = {}
    for count in config.counts:
        atomdiff.set_active(pipe, beside(config.subjects, trial.subject, count))
        precision = autocast(compute_device(), run.mixed_precision)
        progress = f"{trial.subject}, {count} concepts"
        images = generate_images(suite, pipe, phrase_of(trial.subject), progress, precision).subject
        found[str(count)] = float(similarities(judge.embed(images), references).mean())
    return found


def with_kept(found: Mapping[str, float]) -> dict[str, float]:
    """Return similarities by count, and over the first of them."""
    first = next(iter(found.values()))
    return {**found, **{f"kept {count}": value / first for count, value in found.items()}}


def main(config: AddedConceptsConfig) -> None:
    """Train what is missing, generate, and write the result file."""
    quiet_libraries()
    from atomdiff.toybox.judge import load_judge

    judge, figures = load_judge(), {}
    for method in config.methods:
        trials = {subject: trial_of(config, method, subject) for subject in config.subjects}
        run_concepts([*trials.values()], config.processes)
        pipe = open_base(next(iter(trials.values())))
        load_concepts(pipe, trials)
        by_subject = {
            subject: [with_kept(similarity_by_count(config, pipe, trial, judge))] for subject, trial in trials.items()
        }
        figures[method] = summarize(by_subject)
    write_result(config.output, command_line("added_concepts", config, ("work_dir", "processes", "output")), figures)


if __name__ == "__main__":
    main(parse_config(AddedConceptsConfig, prog="python -m benchmarks.added_concepts"))
