"""`atomdiff evaluate` from end to end, with a tiny base and a tiny encoder."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import atomdiff
from atomdiff.cli.main import main
from atomdiff.evaluate import encoders as encoders_module
from atomdiff.evaluate.config import EvaluateConfig
from atomdiff.evaluate.protocol import load_protocol
from atomdiff.evaluate.subjects import open_subjects
from atomdiff.pipelines.scheduler import ScheduleConfig, matching_scheduler
from atomdiff.sampling.output_files import SampleFile
from tests.helpers import add_adapter, write_images
from tests.sampling.helpers import write_concept

PROTOCOL = """
prompts: ["a {subject} on the beach", "a photo of {subject}"]
unrelated_prompts: [a blue cat, a robot]
prior_prompts: ["a photo of {subject}"]
images_per_prompt: 2
"""


@pytest.fixture
def encoder(tiny_encoder_folder):
    return tiny_encoder_folder


@pytest.fixture
def evaluate(tmp_path, tiny_pipe_folder, encoder):
    (tmp_path / "protocol.yaml").write_text(PROTOCOL)

    def run(concepts, references, *options, encoders=(encoder,)):
        base = ["--pretrained_model_name_or_path", str(tiny_pipe_folder), "--num_inference_steps", "2"]
        base += ["--protocol", str(tmp_path / "protocol.yaml"), "--output_dir", str(tmp_path / "out")]
        base += ["--encoders", *encoders, "--reference_data_dir", str(references), "--concepts", *map(str, concepts)]
        status = main(["evaluate", *base, *options])
        results = tmp_path / "out" / "results.json"
        return status, json.loads(results.read_text()) if results.is_file() else {}

    return run


def written(folder):
    return {str(file.relative_to(folder)): file.stat().st_mtime_ns for file in folder.rglob("*-seed*.png")}


def test_concepts_are_measured_in_one_table_and_images_are_kept(evaluate, tiny_pipe, tmp_path, encoder, capsys):
    concepts = [write_concept(tiny_pipe, tmp_path / f"{name}.atoms.safetensors", i) for i, name in enumerate("ab")]
    for name in "ab":
        write_images(tmp_path / "photos" / name, seed=ord(name))
    status, results = evaluate(concepts, tmp_path / "photos")
    shown = capsys.readouterr().out
    assert status == 0 and "means ± standard errors over 2 subjects" in shown
    assert re.search(r"similarity +-?\d\.\d{3} ± \d\.\d{3} +-?\d\.\d{3} ± \d\.\d{3}", shown)
    images = written(tmp_path / "out" / "images")
    assert {name.rpartition("/")[0] for name in images} == {"base", "concepts/a", "concepts/b"}
    assert len(images) == 3 * (2 * 2 + 2 + 2)  # the prompts, the unrelated ones, the class
    with Image.open(next((tmp_path / "out/images/concepts/a").glob("a-sks-mug-on-the-beach*.png"))) as image:
        assert json.loads(image.text["concepts"])[0]["file"] == "a.atoms.safetensors"
    assert [*(tmp_path / "out/images/base").glob("a-photo-of-a-mug*.png")]  # the class has its article

    assert (
        results["subjects"]["a"].items()
        >= {
            "class_name": "mug",
            "trigger_phrase": "sks mug",
            "num_references": 3,
            "num_prompts": 2,
            "images_per_prompt": 2,
        }.items()
    )
    found = [results["subjects"][name]["metrics"][encoder]["similarity"]["concept"]["mean"] for name in "ab"]
    mean = results["mean"]["all"][encoder]["similarity"]["concept"]
    assert mean["mean"] == pytest.approx(np.mean(found), abs=1e-4) and mean["count"] == 2
    assert mean["standard_error"] == pytest.approx(np.std(found, ddof=1) / np.sqrt(2), abs=1e-4)
    assert results["subjects"]["a"]["metrics"][encoder]["prompt_match"] is None  # no encoder of texts
    assert all(results["subjects"][name]["metrics"][encoder]["drift"]["mean"] > 0 for name in "ab")
    table = (tmp_path / "out" / "results.md").read_text()
    assert f"## {encoder}" in table and "| similarity: base | similarity: concept |" in table
    assert "| a |" in table and "| **mean of all** |" in table and "prompt match" not in table
    assert (tmp_path / "out" / "contact_sheet.png").is_file()

    lost = tmp_path / "out" / "images" / sorted(images)[0]
    lost.unlink()
    assert evaluate(concepts, tmp_path / "photos")[1] == results
    after = written(tmp_path / "out" / "images")
    changed = [name for name, time in after.items() if images[name] != time]
    assert after.keys() == images.keys() and changed == [sorted(images)[0]]


def test_a_concept_that_changes_nothing_is_like_the_base(evaluate, tiny_pipe, tmp_path, encoder):
    tiny_pipe.unet.add_adapter(atomdiff.AtomConfig(target_modules=["conv1"]))
    path = atomdiff.save_atoms(tiny_pipe, tmp_path / "mug.atoms.safetensors", trigger_phrase="mug")
    photos = write_images(tmp_path / "photos")
    status, results = evaluate([path], photos, "--class_name", "mug", "--images_per_prompt", "1", "--num_prompts", "1")
    metrics = results["subjects"]["mug"]["metrics"][encoder]
    assert status == 0 and metrics["drift"] == {"mean": 0.0, "standard_error": 0.0, "count": 2}
    assert metrics["similarity"]["base"] == metrics["similarity"]["concept"]
    assert metrics["similarity"]["concept"]["standard_error"] is None
    assert metrics["prior_similarity"]["base"] == metrics["prior_similarity"]["concept"]
    assert metrics["diversity"] is None
    assert results["mean"] == {"all": {encoder: metrics}}


def test_a_large_photo_is_as_large_on_the_contact_sheet_as_the_images(evaluate, tiny_pipe, tmp_path):
    concept = write_concept(tiny_pipe, tmp_path / "mug.atoms.safetensors")
    sizes = []
    for name, width in (("small", 32), ("large", 1024)):
        assert evaluate([concept], write_images(tmp_path / name, widths=(width, 32)))[0] == 0
        sizes.append(Image.open(tmp_path / "out" / "contact_sheet.png").size)
    assert sizes[0] == sizes[1]


def test_a_photo_that_cannot_be_read_is_named_before_images_are_generated(evaluate, tiny_pipe, tmp_path, capsys):
    concept, photos = write_concept(tiny_pipe, tmp_path / "mug.atoms.safetensors"), write_images(tmp_path / "photos")
    (photos / "photo.jpg").write_bytes(b"\xff\xd8 torn")
    assert evaluate([concept], photos)[0] == 2
    assert "photo.jpg: " in capsys.readouterr().err and not written(tmp_path / "out")


def test_a_weight_moves_a_concept_towards_the_base(evaluate, tiny_pipe, tmp_path, encoder, capsys):
    concept, photos = write_concept(tiny_pipe, tmp_path / "mug.atoms.safetensors"), write_images(tmp_path / "photos")
    drifts = []
    for weight in ("1", "0.3", '{"weight": 0.3, "steps": {"0": 0, "1": 0}}'):
        status, results = evaluate([concept], photos, "--num_prompts", "1", "--weights", weight)
        assert status == 0
        drifts.append(results["subjects"]["mug"]["metrics"][encoder]["drift"]["mean"])
    assert drifts[0] > drifts[1] > drifts[2] == 0
    assert results["subjects"]["mug"]["weight"] == {"weight": 0.3, "steps": {"0.0": 0.0, "1.0": 0.0}}
    assert evaluate([concept], photos, "--weights", "1", "1")[0] == 2
    assert "found 2 weights for 1 concepts" in capsys.readouterr().err


def test_a_tuned_pipeline_and_an_adapter_of_another_method_are_measured_too(
    evaluate, tiny_pipe, tmp_path, encoder, capsys
):
    from peft import LoraConfig

    add_adapter(tiny_pipe, "default", LoraConfig(target_modules=["to_q"]))
    tiny_pipe.unet.save_lora_adapter(tmp_path / "lora")
    lora = tmp_path / "cup.safetensors"
    (tmp_path / "lora" / "pytorch_lora_weights.safetensors").rename(lora)
    tiny_pipe.unet.unload_lora()
    with torch.no_grad():
        tiny_pipe.unet.conv_in.weight.mul_(1.5)
    tiny_pipe.save_pretrained(tmp_path / "mug")
    for name in ("mug", "cup"):
        write_images(tmp_path / "photos" / name)
    given = [tmp_path / "mug", lora]
    assert evaluate(given, tmp_path / "photos", "--class_name", "mug")[0] == 2
    assert "'mug': found no trigger phrase: give --trigger_phrases, such as 'sks dog'\n" in capsys.readouterr().err
    assert evaluate(given, tmp_path / "photos", "--trigger_phrases", "sks mug", "sks cup")[0] == 2
    assert "'mug': found no class: give --class_name, such as dog\n" in capsys.readouterr().err
    assert evaluate(given[1:], tmp_path / "photos")[0] == 2
    assert (
        "'cup': found no trigger phrase: give --trigger_phrases, such as 'sks dog', and no class: give --class_n"
        in (capsys.readouterr().err)
    )
    options = ("--class_name", "mug", "--trigger_phrases", "sks mug", "sks cup")
    assert evaluate(given, tmp_path / "photos", *options, "--weights", "0.5", "0.5")[0] == 2  # a pipeline has none
    status, results = evaluate(given, tmp_path / "photos", *options)
    assert status == 0
    drifts = [results["subjects"][name]["metrics"][encoder]["drift"]["mean"] for name in ("mug", "cup")]
    assert min(drifts) > 0 and drifts[0] != drifts[1]
    assert results["subjects"]["cup"]["trigger_phrase"] == "sks cup"


def test_the_class_of_a_file_without_trigger_words_is_that_of_its_run(tmp_path, tiny_pipe):
    tiny_pipe.unet.add_adapter(atomdiff.AtomConfig(target_modules=["conv1"]))
    run = {"trigger_phrase": "sks toy robot", "training": {"config": {"class_name": "toy robot"}}}
    path = atomdiff.save_atoms(tiny_pipe, tmp_path / "robot.atoms.safetensors", **run)
    photos = write_images(tmp_path / "photos")

    def class_of(**options):
        config = EvaluateConfig(
            pretrained_model_name_or_path="base", concepts=(str(path),), reference_data_dir=str(photos), **options
        )
        (subject,) = open_subjects(config, load_protocol("quick"))
        return subject.suite.class_name

    assert class_of() == "toy robot" and class_of(class_name="robot") == "robot"
    assert class_of(trigger_phrases=("sks thing",)) == "toy robot"


def test_a_folder_of_concepts_is_as_good_as_its_concepts(evaluate, tiny_pipe, tmp_path, capsys):
    from peft import LoraConfig

    folder = tmp_path / "concepts"
    concepts = [write_concept(tiny_pipe, folder / f"{name}.atoms.safetensors", i) for i, name in enumerate("ca")]
    add_adapter(tiny_pipe, "default", LoraConfig(target_modules=["to_q"]))
    atomdiff.save_atoms(tiny_pipe, folder / "b", adapter_name="default")
    (folder / "cache").mkdir()
    for name in "abc":
        write_images(tmp_path / "photos" / name)
    options = ("--class_name", "mug", "--trigger_phrases", "sks mug", "ohwx mug", "sks mug", "--num_prompts", "1")
    status, results = evaluate([folder], tmp_path / "photos", *options, "--weights", "1", "0.5", "1")
    assert status == 0 and [*results["subjects"]] == [*"abc"]
    found = {name: (each["trigger_phrase"], each["weight"]) for name, each in results["subjects"].items()}
    assert found == {"a": ("sks mug", 1.0), "b": ("ohwx mug", 0.5), "c": ("sks mug", 1.0)}
    capsys.readouterr()
    assert evaluate([folder], tmp_path / "photos", "--weights", "1", "1")[0] == 2
    assert "found 2 weights for 3 concepts" in capsys.readouterr().err
    Path(concepts[0]).unlink()
    assert [*evaluate([folder / "b"], tmp_path / "photos", *options[:3], "a mug")[1]["subjects"]] == ["b"]


def test_a_folder_that_is_finished_is_scored_without_its_base(evaluate, tiny_pipe, tmp_path, encoder, capsys):
    concept, photos = write_concept(tiny_pipe, tmp_path / "mug.atoms.safetensors"), write_images(tmp_path / "photos")
    elsewhere = (
        "--pretrained_model_name_or_path",
        str(tmp_path / "moved"),
        "--dtype",
        "bfloat16",
        "--score_only",
        "true",
    )
    assert evaluate([concept], photos, *elsewhere)[0] == 2
    assert "score_only=True: 16 of 16 images are missing" in capsys.readouterr().err
    finished = evaluate([concept], photos)[1]
    images = written(tmp_path / "out" / "images")
    assert finished["settings"]["dtype"] == "float32"
    status, results = evaluate([concept], photos, *elsewhere)
    assert status == 0 and results == finished and written(tmp_path / "out" / "images") == images

    (lost,) = (tmp_path / "out" / "images" / "base").glob("a-blue-cat-*.png")
    SampleFile(lost.parent, "a blue cat", 50_000, {"dtype": "float16", "concepts": "[]"}).save(
        Image.new("RGB", (32, 32), "red")
    )
    assert evaluate([concept], photos, *elsewhere)[0] == 2
    assert "were generated with different base_files, base_model, dtype" in capsys.readouterr().err
    lost.unlink()
    assert evaluate([concept], photos, *elsewhere)[0] == 2
    assert f"1 of 16 images are missing, or of another concept or weight; the first is {lost}; generate them" in (
        capsys.readouterr().err
    )
    assert evaluate([concept], photos, *elsewhere, "--weights", "0.5")[0] == 2
    assert "9 of 16 images are missing, or of another concept or weight" in capsys.readouterr().err


def test_labels_that_an_encoder_does_not_know_are_named_before_images_are_generated(
    evaluate, tiny_pipe, tmp_path, capsys
):
    concept, photos = write_concept(tiny_pipe, tmp_path / "mug.atoms.safetensors"), write_images(tmp_path / "photos")
    scenes = {"snow": "in the snow", "mountain": "on a mountain"}
    prompts = [{"prompt": f"a {{subject}} {phrase}", "scene": scene} for scene, phrase in scenes.items()]
    (tmp_path / "scenes.yaml").write_text(json.dumps({"prompts": prompts, "images_per_prompt": 1}))
    options = ("--protocol", str(tmp_path / "scenes.yaml"))
    assert evaluate([concept], photos, *options, encoders=("toybox",))[0] == 2
    assert "found the labels snow, mountain; expected of one of class: " in capsys.readouterr().err
    assert not written(tmp_path / "out")
    assert evaluate([concept], photos, *options, "--num_prompts", "1", encoders=("toybox",))[0] == 0


@pytest.mark.parametrize("kind", ["atoms", "pipeline"])
def test_the_base_is_compared_with_by_the_schedule_of_the_concept(evaluate, tiny_pipe, tmp_path, encoder, kind):
    photos, options = write_images(tmp_path / "photos"), ("--class_name", "mug", "--trigger_phrases", "mug")

    def concept(**schedule):  # that changes nothing else
        if kind == "atoms":
            tiny_pipe.unet.add_adapter(atomdiff.AtomConfig(target_modules=["conv1"]))
            path = atomdiff.save_atoms(tiny_pipe, tmp_path / "mug.atoms.safetensors", training={"config": schedule})
            atomdiff.unload_atoms(tiny_pipe)
            return path
        tiny_pipe.scheduler = matching_scheduler(ScheduleConfig(**schedule), tiny_pipe.scheduler)
        tiny_pipe.save_pretrained(tmp_path / "mug")
        return tmp_path / "mug"

    def drift(path, *more):
        return evaluate([path], photos, *options, *more)[1]["subjects"]["mug"]["metrics"][encoder]["drift"]["mean"]

    same = concept(prediction_type="v_prediction", rescale_betas_zero_snr=False)
    assert drift(same) == 0
    images = written(tmp_path / "out" / "images" / "base")
    rescaled = concept(rescale_betas_zero_snr=True)
    assert drift(rescaled) == 0 and written(tmp_path / "out" / "images" / "base") == images
    (other,) = (tmp_path / "out" / "images").glob("base-*")
    assert other.name == "base-rescale_betas_zero_snr=True" and written(other).keys() == images.keys()
    assert drift(rescaled, "--rescale_betas_zero_snr", "true") == 0


def test_a_tuned_pipeline_has_files_of_its_own(evaluate, tiny_pipe, tmp_path):
    tiny_pipe.save_pretrained(tmp_path / "base", variant="fp16")
    tiny_pipe.save_pretrained(tmp_path / "mug")
    options = ("--class_name", "mug", "--trigger_phrases", "sks mug", "--num_prompts", "1")
    base = ("--pretrained_model_name_or_path", str(tmp_path / "base"), "--variant", "fp16")
    assert evaluate([tmp_path / "mug"], write_images(tmp_path / "photos"), *options, *base)[0] == 0


def test_no_image_is_blacked_out(evaluate, tiny_pipe, tmp_path, monkeypatch):
    from diffusers import StableDiffusionPipeline

    from atomdiff.sampling import sample

    def refuse(self, image, device, dtype):
        return image, None if self.safety_checker is None else [True] * len(image)

    open_base = sample.open_base

    def with_checker(*args):
        pipe = open_base(*args)
        pipe.safety_checker = torch.nn.Identity()
        pipe.safety_checker.dtype = torch.float32
        return pipe

    monkeypatch.setattr(StableDiffusionPipeline, "run_safety_checker", refuse)
    monkeypatch.setattr(sample, "open_base", with_checker)
    concept = write_concept(tiny_pipe, tmp_path / "mug.atoms.safetensors")
    assert evaluate([concept], write_images(tmp_path / "photos"), "--num_prompts", "1")[0] == 0


def test_wrong_input_is_one_clear_line(evaluate, tiny_pipe, tmp_path, capsys, monkeypatch):
    concept = write_concept(tiny_pipe, tmp_path / "mug.atoms.safetensors")
    photos = write_images(tmp_path / "photos")

    def message(*args, **kwargs):
        assert evaluate(*args, **kwargs)[0] == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        return error

    assert "nowhere' cannot be loaded" in message([concept], photos, encoders=(str(tmp_path / "nowhere"),))
    assert not (tmp_path / "out").exists()  # before any image was generated
    assert "expected one for each concept" in message([concept], photos, "--trigger_phrases", "sks a", "sks b")
    other = write_concept(tiny_pipe, tmp_path / "other" / "mug.atoms.safetensors")
    assert "found no folder" in message([concept, other], photos)
    write_images(photos / "mug")
    assert "two are named 'mug'" in message([concept, other], photos)
    assert "found nothing there" in message([concept], tmp_path / "none")
    assert "such as dog" in message([concept], photos, "--trigger_phrases", "sks")
    monkeypatch.setattr(encoders_module, "VisionEncoder", None)  # not reached: the concept is missing
    assert "there is no file" in message([tmp_path / "none.atoms.safetensors"], photos, encoders=("toybox",))
