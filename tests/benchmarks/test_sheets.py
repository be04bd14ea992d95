"""What concepts of a comparison are used for, in miniature: sheets, other samplings, concepts added to each other."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from atomdiff.evaluate.suite import generate_images
from benchmarks import added_concepts, sampling, sheets, trials
from benchmarks.recognition import Gallery


class Brightness:
    """A judge that sees how bright and how red an image is."""

    def embed(self, images):
        return torch.tensor([[*np.asarray(image.convert("RGB")).mean((0, 1))[:2], 10.0] for image in images])


def test_images_are_recognized_by_the_photos_that_they_are_most_like(tmp_path):
    for name, color in (("mug", "red"), ("cat", "lime")):
        (tmp_path / name / "unseen").mkdir(parents=True)
        for folder, shown in ((tmp_path / name, "white"), (tmp_path / name / "unseen", color)):
            Image.new("RGB", (32, 32), shown).save(folder / "0.png")
    gallery = Gallery.read(Brightness(), tmp_path)
    images = [Image.new("RGB", (32, 32), color) for color in ("maroon", "green", "red")]
    assert gallery.recognize(images) == ["mug", "cat", "mug"]
    assert gallery.top_1(images, ["mug", "mug", "mug"]) == pytest.approx(2 / 3)


@pytest.mark.slow
def test_the_sheets_show_what_the_judge_is_asked_about(world, monkeypatch):
    path = world.path
    config = sheets.SheetsConfig(
        method="atoms/tiny",
        subjects=("mug", "robot"),
        methods=("atoms/tiny", "token/default"),
        methods_subjects=("mug",),
        run=str(path / "run.yaml"),
        num_inference_steps=2,
        protocols=(str(path / "places.yaml"), str(path / "edits.yaml")),
        subjects_dir=str(path / "subjects"),
        results=str(path / "results"),
        work_dir=str(path / "work"),
        images=str(path / "images"),
        output=str(path / "sheets.json"),
    )
    (path / "results").mkdir()
    (path / "results" / "atoms-tiny.json").write_text('{"figures": {"learning_rate": 0.003}}')
    steps = set()

    def generate(suite, *args):
        steps.add(suite.num_inference_steps)
        return generate_images(suite, *args)

    monkeypatch.setattr(sheets, "generate_images", generate)
    sheets.main(config)
    assert steps == {2}
    assert [*(path / "work" / "atoms" / "tiny").iterdir()] == [path / "work" / "atoms" / "tiny" / "0.003"]
    result = json.loads((path / "sheets.json").read_text())
    assert {name: len(seen) for name, seen in result["seen_as"].items()} == {"mug": 3, "robot": 3}
    names = [name for subject in result["seen_as"].values() for name in subject[:2]]
    share = sum(name == shown for name, shown in zip(names, ("mug", "mug", "robot", "robot"), strict=True)) / 4
    assert result["figures"]["top_1"] == share and "token/default:top_1_recolored" in result["figures"]
    first, second = (Image.open(path / "images" / f"{name}.png") for name in ("subjects", "methods"))
    assert first.height > 5 * 32 and second.height > 4 * 32

    concepts = [*(path / "work" / "atoms").rglob("*-seed0/run/*.atoms.safetensors")]
    results = {file: file.read_text() for file in (concept.parents[1] / "result.json" for concept in concepts)}
    for concept in concepts:
        concept.unlink()  # as where results alone were kept

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as stopped:
        stopped.setattr(trials, "_train", stop)
        with pytest.raises(KeyboardInterrupt):
            sheets.run_concepts(config, "atoms/tiny", ("mug", "robot"))
    assert results == {file: file.read_text() for file in results}
    started = len(world.started)
    sheets.run_concepts(config, "atoms/tiny", ("mug", "robot"))
    sheets.run_concepts(config, "atoms/tiny", ("mug", "robot"))
    assert len(world.started) == started + 2 == started + len(concepts) and all(map(Path.is_file, concepts))


@pytest.mark.slow
def test_each_setting_is_sampled_with_the_same_concepts(world, monkeypatch, capsys):
    path = world.path
    seen = []

    def generate(suite, pipe, *others):
        seen.append((type(pipe.scheduler).__name__, suite.num_inference_steps, suite.guidance_scale))
        return generate_images(suite, pipe, *others)

    monkeypatch.setattr(sampling, "generate_images", generate)
    sampling.main(
        sampling.SamplingConfig(
            methods=("atoms/tiny",),
            schedulers=("euler",),
            steps=(2,),
            guidance_scales=(1.5,),
            images_per_prompt=1,
            run=str(path / "run.yaml"),
            tuning_dir=str(path / "tuning"),
            protocol=str(path / "tuning.yaml"),
            work_dir=str(path / "work"),
            output=str(path / "sampling.json"),
        )
    )
    assert seen == [
        ("DDIMScheduler", 1, 7.5),
        ("EulerDiscreteScheduler", 1, 7.5),
        ("DDIMScheduler", 2, 7.5),
        ("DDIMScheduler", 1, 1.5),
    ]
    figures = json.loads((path / "sampling.json").read_text())["figures"]["atoms/tiny"]
    assert [*figures] == ["as it is", "euler", "2 steps", "guidance 1.5"]
    assert len({found["mean"] for found in figures.values()}) == 4
    assert len(world.started) == 1 and "| guidance 1.5 | " in capsys.readouterr().out


@pytest.mark.slow
def test_concepts_are_asked_for_alone_and_with_others_beside_them(world, monkeypatch):
    path = world.path
    asked = []

    def generate(suite, pipe, subject, *others):
        asked.append((subject, suite.class_name))
        return generate_images(suite, pipe, subject, *others)

    monkeypatch.setattr(added_concepts, "generate_images", generate)
    added_concepts.main(
        added_concepts.AddedConceptsConfig(
            methods=("atoms/tiny",),
            subjects=("mug", "robot"),
            counts=(1, 2),
            images_per_prompt=1,
            run=str(path / "run.yaml"),
            protocols=(str(path / "places.yaml"), str(path / "edits.yaml")),
            subjects_dir=str(path / "subjects"),
            results=str(path / "results"),
            work_dir=str(path / "work"),
            output=str(path / "added.json"),
        )
    )
    assert asked == [("sks-mug mug", "mug")] * 2 + [("sks-robot robot", "robot")] * 2
    found = json.loads((path / "added.json").read_text())["figures"]["atoms/tiny"]
    assert [*found] == ["1", "2", "kept 1", "kept 2"] and found["kept 1"]["mean"] == 1
    assert found["1"]["mean"] != found["2"]["mean"] and found["kept 2"]["count"] == 2


def test_concepts_with_preservation_are_others():
    plain, kept = (
        added_concepts.trial_of(added_concepts.AddedConceptsConfig(preservation=name), "atoms/tiny", "mug")
        for name in ("none", "class")
    )
    assert kept.config().preservation == "class" and plain.config().preservation == "none"
    assert kept.folder != plain.folder and kept.photos == plain.photos


def test_the_concepts_beside_one_are_the_next_ones():
    subjects = ("mug", "robot", "cat")
    assert added_concepts.beside(subjects, "cat", 1) == ["cat"]
    assert added_concepts.beside(subjects, "robot", 3) == ["robot", "cat", "mug"]
