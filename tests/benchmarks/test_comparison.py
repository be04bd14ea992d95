"""The comparison of methods and its report in miniature, on the tiny base."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from atomdiff.utils.errors import UserError
from atomdiff.utils.options import parse_config
from benchmarks import compare_methods, experiments, methods_report, screening, sheets, trial_runner
from benchmarks.compare_methods import CompareConfig, describe_runs, quick_config
from benchmarks.experiments import EXPERIMENTS, MOST_TELLING, all_methods, ordered_methods, read_adapter_fields
from benchmarks.methods_plots import Point, draw_frontier, draw_tradeoffs, frontier
from benchmarks.trial_figures import (
    check_protocols,
    choose_rate,
    search_rate,
    summarize,
    summarize_kinds,
    trial_figures,
)


def compare_config(world, **changes):
    path = world.path
    return CompareConfig(
        **{
            "methods": ("token/default",),
            "seeds": (0,),
            "trials": 1,
            "run": str(path / "run.yaml"),
            "subjects_dir": str(path / "subjects"),
            "tuning_dir": str(path / "tuning"),
            "protocols": (str(path / "places.yaml"), str(path / "edits.yaml")),
            "tuning_protocol": str(path / "tuning.yaml"),
            "work_dir": str(path / "work"),
            "output_dir": str(path / "results"),
        }
        | changes
    )


@pytest.mark.slow
def test_methods_are_compared_and_reported(world, capsys):
    config = compare_config(world, methods=("atoms/tiny", "full/default"), trials=2, max_drift=1.0)
    compare_methods.main(config)
    assert len(world.started) == 2 * (2 + 2)
    result = json.loads((world.path / "results" / "atoms-tiny.json").read_text())
    assert result["status"] == "done" and result["failed"] == [] and len(result["runs"]) == 2
    assert result["command"].startswith(
        "python -m benchmarks.compare_methods --methods atoms/tiny --seeds 0 --trials 2"
    )
    assert result["summary"].keys() == {"all", "in span", "hard"} and len(result["search"]) == 2
    figures = result["figures"]
    assert figures["learning_rate"] in (0.0014, 0.0042) and figures["within_allowance"]
    assert figures["parameters"] > 0 and figures["peak_memory_bytes"] > 1e7
    assert 2 * figures["parameters"] <= figures["tensor_bytes"] < figures["bytes"]
    best = max(result["search"].values(), key=lambda found: found["gain"])
    assert result["search"][f"{figures['learning_rate']:.3g}"] == best
    assert result["conditions"]["subjects"] == ["mug", "robot"] and result["machine"].endswith("runs at a time: 1")
    assert result["summary"]["all"]["prompt_match"]["count"] == 2

    compare_methods.main(config)
    options = {"run": config.run, "subjects_dir": config.subjects_dir, "protocols": config.protocols}
    shown = sheets.SheetsConfig(**options, results=config.output_dir, work_dir=config.work_dir)
    assert sheets.run_concepts(shown, "atoms/tiny", ("mug", "robot")).keys() == {"mug", "robot"}
    assert len(world.started) == 8

    page = world.path / "page.md"
    page.write_text(f"# Benchmarks\n\n{methods_report.START}\nold\n{methods_report.END}\n\nMore.\n")
    report = methods_report.ReportConfig(str(world.path / "results"), str(page), str(world.path / "images"))
    methods_report.main(report)
    text = page.read_text()
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    assert [row.split("`")[1] for row in rows] == 2 * ["atoms/tiny", "full/default"] and "old" not in text
    assert "](images/methods_bytes.png)" in text
    widths = [len(columns) + 1 for columns in (methods_report.QUALITY, methods_report.COSTS)]
    tables = [part.splitlines() for part in text.split("\n\n") if part.startswith("|")]
    assert [{row.count("|") for row in table} for table in tables] == [{width} for width in widths]
    assert "Not run: `atoms/default`" in text and text.endswith("\n\nMore.\n")
    for name in ("methods_bytes", "methods_tradeoffs"):
        assert Image.open(world.path / "images" / f"{name}.png").mode == "RGBA"

    compare_methods.main(dataclasses.replace(config, methods=("atoms/tiny",), max_drift=0.9))
    with pytest.raises(UserError, match="measured with other max_drift; expected files of one comparison"):
        methods_report.main(report)


def test_fewer_photos_are_trained_on_and_the_unseen_ones_stay(world):
    files = {path: path.read_bytes() for path in (world.path / "subjects").rglob("*.png")}
    (world.path / "subjects" / "mug" / "0.txt").write_text("a mug")
    (world.path / "subjects" / "mug" / "1.txt").write_text("a mug")
    (world.path / "work" / "subjects-1-photos" / "mug").mkdir(parents=True)
    (world.path / "work" / "subjects-1-photos" / "mug" / "old.png").write_bytes(b"")
    folder = compare_methods.photos_folder(compare_config(world, photos=1))
    kept = {file.relative_to(folder) for file in (folder / "mug").rglob("*") if file.is_file()}
    unseen = {file.relative_to(world.path / "subjects") for file in files if file.parts[-3:-1] == ("mug", "unseen")}
    assert kept == {Path("mug/0.png"), Path("mug/0.txt"), *unseen} and unseen
    assert {path: path.read_bytes() for path in (world.path / "subjects").rglob("*.png")} == files
    for count in (0, 3):
        with pytest.raises(UserError, match=f"photos: found {count}; expected 1 to 2, the photos of"):
            compare_methods.photos_folder(compare_config(world, photos=count))


@pytest.mark.slow
def test_other_steps_are_those_of_the_evaluation_subjects(world):
    config = compare_config(world, subjects=("mug",), trials=2, max_drift=1.0, photos=1)
    compare_methods.main(config)
    compare_methods.main(dataclasses.replace(config, max_train_steps=1, output_dir=str(world.path / "short")))
    usual, short = (json.loads((world.path / name / "token-default.json").read_text()) for name in ("results", "short"))
    assert len(world.started) == 2 + 1 + 1  # the search is the same
    logs = [(Path(folder) / "run" / "training_log.jsonl").read_text() for folder in world.started]
    assert [json.loads(log.splitlines()[-1])["step"] for log in logs] == [2, 2, 2, 1]
    assert short["conditions"] == {**usual["conditions"], "max_train_steps": 1} and usual["conditions"]["photos"] == 1
    assert "--photos 1 --max_train_steps 1 " in short["command"]


@pytest.mark.slow
def test_a_method_that_fails_stays_in_the_comparison(world, monkeypatch):
    broken = {"peft_type": "LORA", "target_modules": ["nowhere"]}
    monkeypatch.setattr(
        experiments, "read_adapter_fields", lambda m: broken if m.startswith("lora") else read_adapter_fields(m)
    )
    compare_methods.main(compare_config(world, methods=("token/default", "lora/attention_r16")))
    compare_methods.main(compare_config(world, methods=("lora/attention_r1",), trials=2))  # fails in the search
    page = world.path / "page.md"
    page.write_text(f"{methods_report.START}\n{methods_report.END}\n")
    methods_report.main(methods_report.ReportConfig(str(world.path / "results"), str(page), str(world.path)))
    methods, table = methods_report.read_methods(world.path / "results"), page.read_text()
    searched = methods["lora/attention_r1"]
    assert searched["figures"] == {} and "conditions" not in searched
    assert [each["failed"][0]["subject"] for each in searched["search"].values()] == ["cat", "cat"]
    for method in ("lora/attention_r16", "lora/attention_r1"):
        assert methods[method]["status"] == "failed" and f"| `{method}`" not in table
        (line,) = [line for line in table.splitlines() if line.startswith(f"- `{method}` failed: ")]
        assert "nowhere" in line


def test_what_a_comparison_cannot_measure_is_said_before_it_begins(world):
    path = world.path
    places, edits = (str(path / f"{name}.yaml") for name in ("places", "edits"))

    def check(*protocols):
        check_protocols(protocols, (), path / "subjects")

    check(places, edits)
    with pytest.raises(UserError, match="^quick: expected subjects, prompts with a scene, and unrelated prompts"):
        compare_methods.main(compare_config(world, tuning_protocol="quick", trials=2))
    with pytest.raises(UserError, match=r"edits.yaml: expected subjects"):
        check(edits)
    with pytest.raises(UserError, match=r"places.yaml: expected prompts with a color or a pattern"):
        check(places, places)
    for file in sorted((path / "subjects" / "mug" / "unseen").iterdir())[1:]:
        file.unlink()
    with pytest.raises(UserError, match="mug: found one photo to compare images with; expected two or more"):
        compare_methods.main(compare_config(world))
    assert not world.started


def test_every_method_of_diffusion_models_is_compared_the_most_telling_first():
    methods = ordered_methods()
    assert sorted(methods) == all_methods() and methods[: len(MOST_TELLING)] == [*MOST_TELLING]
    for method in methods:
        overrides = yaml.safe_load((EXPERIMENTS / method / "overrides.yaml").read_text())
        assert overrides.keys() <= {"learning_rate", "token_learning_rate"}  # all else is the same for all


def test_quick_is_few_methods_one_subject_of_each_kind_and_no_search():
    config = quick_config(CompareConfig(quick=True))
    assert config.methods == MOST_TELLING[:3] and config.subjects == ("mug", "mushroom")
    assert (config.seeds, config.trials) == ((0,), 1) and config.output_dir.startswith("out/")
    assert parse_config(CompareConfig, ["--quick", "true"]).quick


def figures(gain, drift, scenes=1.0):
    found = {"gain": gain, "drift": drift, "scenes": scenes, "scenes_base": 1.0}
    return {name: {"mean": value} for name, value in found.items()}


def test_the_best_rate_has_the_highest_gain_within_the_allowance():
    rates = {1.0: figures(0.3, 0.05), 2.0: figures(0.5, 0.09), 3.0: figures(0.9, 0.2), 4.0: figures(0.8, 0.05, 0.85)}
    assert choose_rate(rates, max_drift=0.1) == (2.0, True)
    assert choose_rate(rates, max_drift=0.3) == (3.0, True)
    assert choose_rate(rates, max_drift=0.01) == (1.0, False)
    assert choose_rate({1.0: None, 2.0: figures(0.1, 0.0)}, max_drift=0.1) == (2.0, True)
    assert choose_rate({1.0: None}, max_drift=0.1) == (None, False)


@pytest.mark.parametrize(
    ("drift", "tried"),
    [
        (lambda rate: rate / 10, [0.5, 1.5, 0.975]),  # a straight line, both axes logarithmic, is met at once
        (lambda rate: rate / 3, [0.5, 0.167, 0.293]),
        (lambda rate: rate / 1000, [0.5, 1.5, 4.5]),
        (lambda rate: rate, [0.5, 0.167, 0.0557]),
        (lambda rate: rate / 5.2, [0.5]),  # close enough
        (lambda rate: 0.02 if rate < 1 else None, [0.5, 1.5, 0.866]),  # it fails: halfway, by factors
    ],
)
def test_the_search_comes_close_to_the_allowance(drift, tried):
    def measure(rate):
        return None if drift(rate) is None else figures(rate, drift(rate))

    best, allowed, found = search_rate(0.5, 3, 0.1, measure)
    assert [*found] == tried
    within = [rate for rate in tried if drift(rate) is not None and drift(rate) <= 0.1]
    assert (best, allowed) == ((max(within), True) if within else (min(tried), False))


def test_the_search_ends_where_three_digits_tell_no_rates_apart():
    best, allowed, found = search_rate(0.5, 99, 0.1, lambda rate: figures(rate, 0.09 if rate < 0.7 else 0.11))
    assert (best, allowed) == (0.699, True) and max(rate for rate in found if rate < 0.7) == 0.699 and 0.7 in found


def test_the_search_stays_where_scenes_are_kept():
    best, allowed, found = search_rate(0.5, 3, 0.1, lambda rate: figures(rate, 0.05, 1.0 if rate < 1 else 0.5))
    assert [*found] == [0.5, 1.5, 0.866] and (best, allowed) == (0.866, True)


def test_standard_errors_are_over_subjects():
    found = summarize({"mug": [{"gain": 0.1}, {"gain": 0.3}], "cat": [{"gain": 0.5}, {"gain": 0.7}]})["gain"]
    means = np.array([0.2, 0.6])
    assert found["mean"] == 0.4 and found["median"] == 0.4 and found["count"] == 4
    assert found["standard_error"] == pytest.approx(means.std(ddof=1) / np.sqrt(2), abs=1e-4)


def result_of(subject, gain, kind="in span", seed=0, **more):
    """What a trial leaves, with these figures."""
    mean = {"mean": 0.5}
    metrics = {
        "similarity": {"base": mean, "concept": mean, "real": 0.9, "normalized_gain": {"mean": gain}},
        "drift": {"mean": gain / 10},
        "embedding_drift": mean,
        "scene_accuracy": {"base": mean, "concept": mean},
        "diversity": None,
        "prior_similarity": None,
    }
    trial = {"photos": f"samples/subjects/{subject}", "options": {"learning_rate": 0.1, "seed": seed}}
    done = {"status": "done", "trial": trial, "kind": kind, "top_1": 1.0, "metrics": {"toybox": metrics}}
    return done | {"parameters": 7, "bytes": 20} | more


def test_kinds_are_apart_and_subjects_with_a_failed_run_are_left_out():
    failed = {"status": "failed", "message": "no", "trial": {"photos": "samples/subjects/cat/", "options": {}}}
    results = [result_of("mug", 0.2), result_of("fish", 0.6, "hard"), result_of("cat", 0.9, seed=1), failed]
    found = summarize_kinds(results)
    assert {kind: each["gain"]["mean"] for kind, each in found.items()} == {"all": 0.4, "in span": 0.2, "hard": 0.6}
    assert "diversity" not in found["all"]


def test_methods_with_failed_runs_do_not_end_the_report():
    figures = {"train_seconds": 9.0, "peak_memory_bytes": 5, "device": "a GPU", "precision": "float32", "processes": 2}
    failed = {**result_of("cat", 0.5), "status": "failed", "message": "no memory"}
    results = [result_of("mug", 0.2, **figures), result_of("cat", 0.9, **figures), failed]
    done, none_done = describe_runs(results, {"tensor_bytes": 9}), describe_runs(results[1:], {})
    methods = {
        "atoms/tiny": done | {"conditions": {"trials": 1, "subjects": ["cat", "mug"], "seeds": [0]}},
        "full/default": none_done,
    }
    assert [found["status"] for found in methods.values()] == ["done", "failed"]
    table = methods_report.make_table(methods, {})
    assert "`atoms/tiny` failed in 1 runs (no memory); the subjects of these are left out." in table
    assert "`full/default` failed: no memory." in table
    assert [point.method for point in methods_report.points_of(methods)] == ["atoms/tiny"]
    assert "Subjects: cat, mug. Every method has its own learning rate, without a search." in table
    assert table.endswith("Memory: a GPU, float32, runs at a time: 2.")
    assert any(row.startswith("| `atoms/tiny`") and row.endswith("| 0 |") for row in table.splitlines())


def write_method(folder, method, trials, **conditions):
    """A result file of a comparison, as `compare_methods` writes it."""
    figures = {"train_seconds": 9.0, "peak_memory_bytes": 5, "device": "a GPU", "precision": "float32", "processes": 2}
    result = result_of("mug", 0.2, **figures)
    half = {"base": {"mean": 0.5}, "concept": {"mean": 0.5}}
    result["metrics"]["toybox"]["diversity"] = half
    result["metrics"]["edits"] = {"color_accuracy": half, "pattern_accuracy": None}
    found = {"method": method, "search": {}} | describe_runs([result], {"tensor_bytes": 9})
    found["conditions"] = {"trials": trials, "max_drift": 0.1, "subjects": ["mug"], "seeds": [0]} | conditions
    folder.mkdir(exist_ok=True)
    (folder / f"{method.replace('/', '-')}.json").write_text(json.dumps(found))


def test_each_method_has_its_number_of_trials_and_the_time_of_its_step(tmp_path, capsys):
    for method, trials in {"atoms/default": 4, "token/default": 3, "full/default": 3, "atoms/tiny": 1}.items():
        write_method(tmp_path / "results", method, trials)
    steps = {"machine": "a quiet CPU", "figures": {"atoms/default:over_lora": 1.149, "token/default:over_lora": 0.751}}
    (tmp_path / "steps.json").write_text(json.dumps(steps))
    report = methods_report.ReportConfig(str(tmp_path / "results"), None, str(tmp_path), str(tmp_path / "steps.json"))
    methods_report.main(report)
    table = capsys.readouterr().out.splitlines()
    allowed = "that keep within a drift of .100 on the tuning subjects"
    assert (
        f"- Subjects: mug. Every method has the best of at most 3 learning rates {allowed}; `atoms/default`: the best "
        f"of at most 4 learning rates {allowed}; `atoms/tiny`: its own learning rate, without a search."
    ) in table
    (start,) = [number for number, line in enumerate(table) if "a step, over LoRA r16" in line]
    cells = [[cell.strip() for cell in line.split("|")] for line in table[start + 2 : start + 6]]
    assert {row[1]: row[5] for row in cells} == {
        "`atoms/default`": "1.15",
        "`atoms/tiny`": "",
        "`token/default`": ".75",
        "`full/default`": "",
    }
    assert table[-1] == "- Steps: a quiet CPU."


def test_gains_are_compared_in_pairs_of_subject_and_seed():
    def runs(gains):
        return {"runs": [{"subject": subject, "seed": seed, "gain": gain} for (subject, seed), gain in gains.items()]}

    reference = runs({("mug", 0): 0.5, ("mug", 1): 0.7, ("cat", 0): 0.1})
    other = runs({("mug", 0): 0.4, ("mug", 1): 0.4, ("cat", 0): 0.4, ("fish", 0): 0.9})
    found = methods_report.gain_beside(other, reference)
    assert found["mean"] == pytest.approx((-0.2 + 0.3) / 2) and found["count"] == 2
    assert found["standard_error"] == pytest.approx(0.25, abs=1e-4)
    assert methods_report.gain_beside(runs({("mug", 3): 0.4}), reference) is None


def test_prompt_match_is_of_colors_and_patterns():
    result, shares = result_of("mug", 0.2), {"scene": 0.0, "color": 0.5, "pattern": 1.0}
    both = {f"{name}_accuracy": {"base": {"mean": 0.0}, "concept": {"mean": share}} for name, share in shares.items()}
    result["metrics"]["edits"] = both
    assert trial_figures(result)["prompt_match"] == 0.75


def test_photos_that_leave_nothing_to_gain_are_named():
    result = result_of("mug", 0.2)
    result["metrics"]["toybox"]["similarity"]["normalized_gain"] = None
    assert trial_runner.describe(result | {"train_seconds": 3}).startswith("no gain, as the base is as alike as")
    with pytest.raises(UserError, match="samples/subjects/mug: the base's images are as like the photos"):
        trial_figures(result)


def test_files_of_other_conditions_do_not_mix(tmp_path):
    for number, method in enumerate(("atoms/tiny", "token/default")):
        conditions = {"subjects": ["mug"], "seeds": [number], "base": str(number)}
        content = {"method": method, "status": "done", "conditions": conditions}
        (tmp_path / f"{number}.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="measured with other base; expected files of one comparison"):
        methods_report.read_methods(tmp_path)
    with pytest.raises(UserError, match="found no result file; run python -m benchmarks.compare_methods"):
        methods_report.read_methods(tmp_path / "none")
    page = tmp_path / "page.md"
    page.write_text("no marks")
    with pytest.raises(UserError, match="found no lines '<!-- methods"):
        methods_report.write_page(page, "table")


def point(method, size, similarity):
    values = {"similarity": (similarity, 0.01), "drift": (0.1, 0.01), "diversity": (0.2, 0.01)}
    return Point(method, size, values | {"prompt_match": (0.5, 0.0), "diversity_base": (0.4, 0.0)})


def test_the_frontier_has_what_no_smaller_method_reaches():
    points = [point("a", 100, 0.5), point("b", 50, 0.6), point("c", 200, 0.6), point("d", 200, 0.7), point("e", 9, 0.1)]
    assert [each.method for each in frontier(points)] == ["e", "b", "d"]


def test_the_plots_show_every_method_and_name_those_that_have_room():
    points = [point(f"lora/{n}", 1000.0 + n, 0.5 - n / 1000) for n in range(30)] + [point("atoms/x", 1e5, 0.9)]
    axes = draw_frontier(points).axes[0]
    assert axes.get_xscale() == "log" and len(axes.containers) == 31
    names = [text.get_text() for text in axes.texts]
    assert {"atoms/x", "lora/0"} <= {*names} and len(names) == len({*names}) < 8
    boxes = [text.get_window_extent() for text in axes.texts]
    assert not any(box.count_overlaps(boxes[:number]) for number, box in enumerate(boxes))
    assert [axes.get_xlabel() for axes in draw_tradeoffs(points).axes] == [
        "prompt match",
        "drift (less is better)",
        "diversity",
    ]


def test_differences_are_paired_by_subject():
    baseline = [result_of("mug", 0.1), result_of("cat", 0.7)]
    found = screening.differences([result_of("mug", 0.2), result_of("cat", 0.9)], baseline)
    assert found["gain"]["mean"] == found["gain"]["median"] == 0.15 and found["gain"]["standard_error"] == 0.05
