import json
import re
from functools import partial
from pathlib import Path

import pytest
import yaml
from PIL import Image

from atomdiff.cli.demo import DemoConfig, make_sheet, run_demo, training_config
from atomdiff.cli.main import main
from atomdiff.evaluate.suite import SCENES, Evaluation, GeneratedImages, make_suite
from atomdiff.utils import image_grid
from atomdiff.utils.errors import UserError
from benchmarks.pretrain.architecture import GUIDANCE_SCALE, NUM_INFERENCE_STEPS

ROOT = Path(__file__).parents[2]


PHASES = [
    "loading torch and diffusers",
    "precision",
    "loading the base samples/toybox-sd",
    "encoding images",
    "encoding images",  # those that are held out
    "preparing the model",
    "training",
    "images by the base",
    "images with the concept",
    "judging the images",
]


@pytest.fixture
def quick(tmp_path, monkeypatch):
    """The demo's run with as few steps as there can be, started from an empty folder."""
    monkeypatch.chdir(tmp_path)
    run = yaml.safe_load((ROOT / "configs" / "demo.yaml").read_text())
    run |= {"max_train_steps": 2, "num_class_images": 2, "num_inference_steps": 2, "lr_warmup_steps": 1}
    run |= {"logging_steps": 1, "class_data_dir": str(tmp_path / "class")}
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(run))
    monkeypatch.setattr("atomdiff.evaluate.suite.make_suite", partial(make_suite, images_per_prompt=2))
    return path


@pytest.mark.slow
def test_the_demo_leaves_everything_it_promises(quick, tmp_path, capsys):
    output = tmp_path / "demo"
    assert main(["demo", "--run", str(quick), "--output_dir", str(output)]) == 0
    printed, phases = capsys.readouterr()
    named = [line.split(":")[0] for line in phases.splitlines()]
    assert [name for name in named if name in PHASES] == PHASES and "\r" not in phases
    concept = output / "mug.atoms.safetensors"
    for path in (concept, output / "before_after.png", output / "training_curve.png", output / "report.json"):
        assert str(path) in printed and path.is_file()
    assert re.search(r"similarity +-?0\.\d{3} +-?0\.\d{3} +0\.\d{3}\nscenes right .*\ndrift +0\.\d{3}\n", printed)
    assert re.search(r"size +[\d,]+ bytes, [\d,]+ parameters\n", printed)
    assert re.search(r"time +\d+ s, \d+ s of them training\nin +float32 ", printed)
    first, second = (line.strip() for line in printed.splitlines()[-2:])
    assert f"atomdiff.load_atoms(pipe, {str(concept)!r})" in second
    shorter = re.sub(r"guidance_scale=[\d.]+", "num_inference_steps=2", second)
    assert shorter != second
    exec(f"{first}\n{shorter}", {})
    assert Image.open(output / "image.png").size == (128, 128)
    page = (output / "report.html").read_text()
    assert "Before and after" in page and "similarity, concept" in page
    assert json.loads((output / "training_report.json").read_text())["held_out_images"][:2] == ["01.png", "02.png"]
    report = json.loads((output / "report.json").read_text())
    assert report["subject"] == "mug" and report["references"] == "unseen photos"
    assert report["file_bytes"] == concept.stat().st_size < 64_000
    assert {"base", "concept", "real"} <= report["similarity"].keys()
    assert report["similarity"]["base"] < 0.6 < report["similarity"]["real"]
    assert report["scene_accuracy"].keys() == {"base", "concept"}
    assert 0 < report["num_trainable_parameters"] < 40_000 and report["total_seconds"] > report["train_seconds"] > 0
    assert Image.open(output / "before_after.png").width > 3 * 192  # three scenes that no photo shows


@pytest.mark.slow
def test_any_method_objective_and_folder_go_the_same_way(quick, tmp_path):
    quick.write_text(
        f"{quick.read_text()}rescale_betas_zero_snr: false\n"
    )  # loading would warn of the base's scheduler
    images = tmp_path / "my-images"
    images.mkdir()
    for path in sorted((ROOT / "samples" / "subjects" / "robot").glob("*.png"))[:3]:
        (images / path.name).write_bytes(path.read_bytes())
    adapter = ROOT / "configs" / "experiments" / "lora" / "attention_r16" / "adapter.json"
    config = DemoConfig(
        str(images), class_name="robot", run=str(quick), adapter=str(adapter), output_dir=str(tmp_path / "lora")
    )
    report = run_demo(config)
    assert report["subject"] == "my-images" and report["references"] == "training photos"
    assert report["num_trainable_parameters"] > 250_000


@pytest.mark.slow
def test_one_large_image_of_a_class_without_a_word(quick, tmp_path, capsys):
    images = tmp_path / "images"
    images.mkdir()
    image = Image.open(ROOT / "samples" / "subjects" / "robot" / "01.png").resize((1500, 1000))
    image.save(images / "01.jpg")
    options = ["--instance_data_dir", str(images), "--class_name", "ogre", "--output_dir", str(tmp_path / "out")]
    assert main(["demo", "--run", str(quick), *options]) == 0
    printed, errors = capsys.readouterr()
    assert re.search(r"similarity +-?0\.\d{3} +-?0\.\d{3} +-\n", printed)
    assert "warning: the base has no word 'ogre'; set --class_name to the closest of mug, " in errors
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["similarity"]["real"] is None and report["similarity"]["normalized_gain"] is None
    assert max(Image.open(tmp_path / "out" / "before_after.png").size) < 2500


def test_the_sheet_names_an_umbrella(monkeypatch):
    labels = []
    monkeypatch.setattr(image_grid, "make_image_grid", lambda rows, beside, above: labels.extend(beside))
    images = [Image.new("RGB", (128, 128))] * 2
    suite = make_suite("umbrella", {"snow": SCENES["snow"]}, images_per_prompt=2)
    generated = GeneratedImages(images, [])
    make_sheet(Evaluation(suite, None, images, generated, generated), "sks", images)
    assert labels[1] == 'the base: "an umbrella"'


def test_learning_rates_of_the_demo_are_those_of_its_run():
    assert training_config(DemoConfig()).token_learning_rate == 0.02
    run = training_config(DemoConfig(learning_rate=0.5, token_learning_rate=0.25))
    assert (run.learning_rate, run.token_learning_rate) == (0.5, 0.25)


def test_the_base_is_sampled_alike_everywhere():
    run = training_config(DemoConfig())
    assert (NUM_INFERENCE_STEPS, GUIDANCE_SCALE) == (run.num_inference_steps, run.guidance_scale)
    notebook = (ROOT / "examples" / "toybox.ipynb").read_text()
    settings = {"num_inference_steps": run.num_inference_steps, "guidance_scale": run.guidance_scale}
    assert json.dumps(settings)[1:-1].replace('"', '\\"') in notebook
    peft_run = yaml.safe_load((ROOT / "benchmarks" / "peft_image_gen" / "toybox.yaml").read_text())
    assert settings.items() <= peft_run.items()


def test_a_missing_folder_is_one_clear_line(capsys):
    with pytest.raises(UserError, match="instance_data_dir='nowhere'"):
        DemoConfig("nowhere")
    assert main(["demo", "--instance_data_dir", "nowhere"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
