"""Averages of runs in miniature: each mean is evaluated as a run is, beside the single runs."""

import json
import statistics
from pathlib import Path

import pytest

from atomdiff.concepts.concept_file import read_concept_file
from atomdiff.utils.atomic import write_json
from atomdiff.utils.errors import UserError
from benchmarks import averages
from benchmarks.averages import AveragesConfig


@pytest.mark.slow
def test_means_of_runs_are_measured_beside_them(world):
    path = world.path
    write_json(path / "results" / "atoms-tiny.json", {"figures": {"learning_rate": 0.1}})
    config = AveragesConfig(
        method="atoms/tiny",
        subjects=("mug", "robot"),
        run=str(path / "run.yaml"),
        protocols=(str(path / "places.yaml"), str(path / "edits.yaml")),
        subjects_dir=str(path / "subjects"),
        results=str(path / "results"),
        work_dir=str(path / "work"),
        output=str(path / "averages.json"),
    )
    averages.main(config)
    result = json.loads(Path(config.output).read_text())
    runs = {(run["subject"], tuple(run["seeds"])): run for run in result["runs"]}
    combined = [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2), (0, 1, 2)]
    assert [*runs] == [(subject, seeds) for subject in ("mug", "robot") for seeds in combined]
    assert len(world.started) == len([*(path / "work" / "atoms" / "tiny" / "0.1").glob("*-seed?")]) == 6
    for (_, seeds), run in runs.items():
        assert ("average_seconds" in run) == (len(seeds) > 1) and run["bytes"] > 0
    trained = sum(runs["mug", (seed,)]["train_seconds"] for seed in (0, 2))
    assert runs["mug", (0, 2)]["train_seconds"] == pytest.approx(trained)
    shown = [min(folder.glob("*.png")).read_bytes() for folder in path.rglob("places/images/concepts/*")]
    assert len({*shown}) == len(shown) == len(runs)  # each file has images of its own

    figures = result["figures"]
    assert [*figures] == ["1", "2", "3"] and "spread" not in figures["3"] and "over one" not in figures["1"]
    means = [statistics.mean(runs[name, (seed,)]["gain"] for seed in (0, 1, 2)) for name in ("mug", "robot")]
    assert figures["1"]["figures"]["gain"]["mean"] == pytest.approx(sum(means) / 2, abs=1e-4)
    more = [runs[name, (0, 1, 2)]["gain"] - mean for name, mean in zip(("mug", "robot"), means, strict=True)]
    assert figures["3"]["over one"]["gain"]["mean"] == pytest.approx(sum(more) / 2, abs=1e-4)
    spreads = [statistics.stdev(runs[name, (seed,)]["drift"] for seed in (0, 1, 2)) for name in ("mug", "robot")]
    assert figures["1"]["spread"]["drift"] == pytest.approx(statistics.mean(spreads), abs=1e-4)

    [file] = path.rglob("*mean-of-0+1/concept/mug.atoms.safetensors")
    concept = read_concept_file(file)
    assert [source["weight"] for source in concept.training["average_of"]] == [0.5, 0.5]
    changed = file.stat().st_mtime_ns
    averages.main(config)  # finished runs are not repeated
    assert len(world.started) == 6 and file.stat().st_mtime_ns > changed
    again = json.loads(Path(config.output).read_text())
    assert again["figures"]["2"]["figures"]["similarity"] == figures["2"]["figures"]["similarity"]


def test_a_mean_of_more_runs_than_there_are_is_refused():
    with pytest.raises(UserError, match="counts: found 3; expected 2 to 2, the number of seeds"):
        averages.check(AveragesConfig(seeds=(0, 1), counts=(2, 3)))
    with pytest.raises(UserError, match="counts: found 1; expected 2 to 3"):
        averages.check(AveragesConfig(counts=(1, 2)))
