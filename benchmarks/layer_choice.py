"""Learned layer choice beside a choice by hand, at the same bytes of the concept file.

    python -m benchmarks.layer_choice

Every subject is learned with `select="adaptive"` and a byte budget, from all kernels larger than 1x1, and with the same
atoms on layers that were chosen by hand to fill the same budget: those nearest the output first, as
`benchmarks/results/screening_layers.json` and `configs/experiments/atoms/tiny` have them. Each has its method's own
learning rate. A file without layers has about 3 KB, trigger word and metadata included, and a layer adds about 1 KB.

The subjects are of two kinds, by what the base has never seen (`atomdiff/toybox/world/held_out.py`), which is what a
concept has to change. Pattern-heavy ones have a pattern of a family that pretraining leaves out, in hues that it shows:
mushroom (crosses), umbrella (stars), fish (scales). Color-heavy ones have a hue that it leaves out, turquoise, in a
pattern of a known family: mug (zigzag), car (waves). The vase has both and the others neither. Fish is not among the
defaults because `atoms/default` hardly learns it (a gain of .1).

*overlap* of two sets of layers is the number of common ones over that of all in either; beside it stands what two sets
of these sizes would have in common by chance.

Expected before the first run: in the smallest file, two of three learned layers are in the last two up blocks or
`conv_out`, as by hand; overlaps are .5 between subjects of one kind and .4 between those of two (by chance .1), as the
blocks matter more than the kind; color-heavy subjects keep `conv_in` or a first block more often. At equal bytes the
gain of learned layers is .03 below that of layers by hand in 6 KB and 8 KB, because half of the steps are spent on
layers that leave, and the same in 13 KB; their drift is .02 more, with a learning rate more than three times as high.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from atomdiff.utils.errors import UserError
from atomdiff.utils.options import parse_config
from atomdiff.utils.quiet import quiet_libraries
from benchmarks.experiments import make_trial, own_rate, vary_trial
from benchmarks.result_file import command_line, write_result
from benchmarks.trial_figures import check_protocols, summarize, trial_figures
from benchmarks.trial_runner import run_concepts
from benchmarks.trials import Trial, concept_path

LEARNED, BY_HAND = "learned", "by hand"
METHODS = {LEARNED: "atoms/adaptive", BY_HAND: "atoms/tiny"}
TARGETS = {
    "6KB": r"up_blocks\.[23]\..*conv2|conv_out",
    "8KB": r"up_blocks\.[1-3]\..*conv2|conv_out",
    "13KB": r"up_blocks\.[1-3]\..*conv[12]?|conv_out",
}
"""Layers by hand for each budget, 3, 5 and 10 of the toybox's: 5,950, 7,950 and 12,930 bytes; 8KB is `atoms/tiny`."""
_DIGITS = 4


@dataclass(frozen=True)
class LayerChoiceConfig:
    """Compare learned layers with layers by hand."""

    pattern_heavy: tuple[str, ...] = ("mushroom", "umbrella")
    """Subjects whose pattern the base has never seen."""
    color_heavy: tuple[str, ...] = ("mug", "car")
    """Subjects one of whose colors the base has never seen."""
    budgets: tuple[str, ...] = ("6KB", "8KB", "13KB")
    """Bytes of the concept files."""
    seeds: tuple[int, ...] = (0,)
    """Seeds of the training runs; with two or more, the overlap between runs of one subject is in the result, too."""
    learning_rate: float | None = None
    """Learning rate of both. Default: each method's own."""
    run: str = "configs/demo.yaml"
    """Settings of the training runs and of sampling."""
    protocols: tuple[str, ...] = ("toybox", "toybox_edits")
    """Protocols of the evaluation."""
    subjects_dir: str = "samples/subjects"
    """A folder of photos for each subject."""
    work_dir: str = "out/compare_methods"
    """Folder of the comparison's runs; finished ones are not repeated."""
    processes: int = 1
    """Training runs at a time."""
    output: str = "benchmarks/results/layer_choice.json"
    """The result file."""

    @property
    def kinds(self) -> dict[str, tuple[str, ...]]:
        """Subjects by kind."""
        kinds = {"pattern-heavy": self.pattern_heavy, "color-heavy": self.color_heavy}
        return {kind: subjects for kind, subjects in kinds.items() if subjects}


@dataclass(frozen=True)
class Chosen:
    """A run, and the layers that its concept has."""

    kind: str
    subject: str
    seed: int
    way: str
    """LEARNED or BY_HAND."""
    budget: str
    layers: frozenset[str]
    candidates: int
    """Layers among which they were chosen; of a choice by hand as many as it has."""
    figures: Mapping[str, float]
    """Those of the trial, and the file's bytes."""


def trial_of(config: LayerChoiceConfig, subject: str, seed: int, way: str, budget: str) -> Trial:
    """Return a run of a subject with learned layers or with layers by hand."""
    method, photos = METHODS[way], Path(config.subjects_dir) / subject
    rate = own_rate(method) if config.learning_rate is None else config.learning_rate
    trial = make_trial(method, rate, photos, config.protocols, seed, config.run, config.work_dir)
    fields = {"select_budget": budget} if way == LEARNED else {"target_modules": TARGETS[budget]}
    unchanged = fields.items() <= trial.adapter.items()  # it is the run that the comparison has
    return trial if unchanged else vary_trial(trial, budget, fields)


def run_all(config: LayerChoiceConfig) -> list[Chosen]:
    """Run what is missing; return all runs with their layers."""
    from atomdiff.concepts.concept_file import read_concept_file

    keys = [
        (kind, subject, seed, way, budget)
        for budget in config.budgets
        for kind, subjects in config.kinds.items()
        for subject in subjects
        for seed in config.seeds
        for way in METHODS
    ]
    trials = [trial_of(config, subject, seed, way, budget) for _, subject, seed, way, budget in keys]
    found = []
    for key, trial, result in zip(keys, trials, run_concepts(trials, config.processes), strict=True):
        concept = read_concept_file(concept_path(trial))
        _, _, candidates = concept.training.get("selected_layers", f"all of {len(concept.layers)}").rpartition(" of ")
        figures = {**trial_figures(result), "bytes": result["bytes"], "layers": len(concept.layers)}
        found.append(Chosen(*key, frozenset(concept.layers), int(candidates), figures))
    return found


def means(runs: Iterable[Chosen]) -> dict[str, Any]:
    """Return `summarize` of the figures of runs."""
    by_subject: dict[str, list[Mapping[str, float]]] = {}
    for run in runs:
        by_subject.setdefault(run.subject, []).append(run.figures)
    return summarize(by_subject)


def differences(runs: Sequence[Chosen]) -> dict[str, Any]:
    """Return `summarize` of what the runs of a budget with learned layers have more than those with layers by hand."""
    by_hand = {(run.subject, run.seed): run.figures for run in runs if run.way == BY_HAND}
    by_subject: dict[str, list[Mapping[str, float]]] = {}
    for run in runs:
        if run.way == LEARNED:
            other = by_hand[run.subject, run.seed]
            more = {name: value - other[name] for name, value in run.figures.items()}
            by_subject.setdefault(run.subject, []).append(more)
    return summarize(by_subject)


def overlap(one: frozenset[str], other: frozenset[str]) -> float:
    """Return the number of common layers over that of the layers in either."""
    return len(one & other) / len(one | other)


def chance_overlap(one: int, other: int, candidates: int) -> float:
    """Return the overlap of two sets of these sizes that have as many layers in common as random ones on average."""
    common = one * other / candidates
    return common / (one + other - common)


def overlaps(runs: Sequence[Chosen]) -> dict[str, float]:
    """Return mean overlaps of learned layers of one budget: within subjects and kinds, between kinds, with by hand."""
    found: dict[str, list[float]] = {}
    learned = [run for run in runs if run.way == LEARNED]
    for one, other in combinations(learned, 2):
        same = "subject" if one.subject == other.subject else "kind" if one.kind == other.kind else None
        by_chance = chance_overlap(len(one.layers), len(other.layers), one.candidates)
        found.setdefault(f"same {same}" if same else "different kinds", []).append(overlap(one.layers, other.layers))
        found.setdefault("by chance", []).append(by_chance)
    for one in learned:
        by_hand = next(run for run in runs if run.way == BY_HAND and run.subject == one.subject)
        found.setdefault("with by hand", []).append(overlap(one.layers, by_hand.layers))
    return {name: round(statistics.mean(values), _DIGITS) for name, values in found.items()}


def describe(runs: Sequence[Chosen], config: LayerChoiceConfig) -> dict[str, Any]:
    """Return the figures of a budget."""
    groups = {"all": tuple(name for names in config.kinds.values() for name in names), **config.kinds}
    by_way = {
        way: {
            group: means(run for run in runs if run.way == way and run.subject in names)
            for group, names in groups.items()
        }
        for way in METHODS
    }
    return {**by_way, "difference": differences(runs), "overlap": overlaps(runs)}


def describe_run(run: Chosen) -> dict[str, Any]:
    """Return a run for the result file, its layers by block and by name."""
    from atomdiff.concepts.layer_choice import count_by_block

    named = {name: getattr(run, name) for name in ("kind", "subject", "seed", "way", "budget")}
    return {**named, "blocks": count_by_block(run.layers), "names": sorted(run.layers), **run.figures}


def check(config: LayerChoiceConfig) -> None:
    """Check that there is a choice by hand for every budget, and what else the runs need.

    Raises:
        UserError: there is not.
    """
    if unknown := [budget for budget in config.budgets if budget not in TARGETS]:
        expected = f"some of {', '.join(TARGETS)}, for which TARGETS in benchmarks/layer_choice.py has layers by hand"
        raise UserError(f"budgets: found {unknown[0]!r}; expected {expected}")
    subjects = [subject for of_kind in config.kinds.values() for subject in of_kind]
    check_protocols(config.protocols, subjects, Path(config.subjects_dir))


def main(config: LayerChoiceConfig) -> None:
    """Run what is not done yet, and write the result file."""
    quiet_libraries()
    check(config)
    runs = run_all(config)
    figures = {budget: describe([run for run in runs if run.budget == budget], config) for budget in config.budgets}
    command = command_line("layer_choice", config, ("work_dir", "processes", "output"))
    write_result(config.output, command, figures, kinds=config.kinds, runs=[describe_run(run) for run in runs])


if __name__ == "__main__":
    main(parse_config(LayerChoiceConfig, prog="python -m benchmarks.layer_choice"))
