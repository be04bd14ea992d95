"""Sampling jobs write images, a grid and a manifest, and go on where they stopped."""

import copy
import json
import os
import threading
from dataclasses import replace
from pathlib import Path

import accelerate
import pytest
import torch
from PIL import Image, PngImagePlugin

from atomdiff.sampling import sample
from atomdiff.sampling.generate import generate
from atomdiff.sampling.sample import save_samples
from atomdiff.utils.atomic import WriteError
from atomdiff.utils.errors import UserError
from tests.sampling.helpers import QUICK, image_files, pixels, write_concept


def test_images_metadata_grid_and_manifest(config, tiny_pipe):
    folder = save_samples(config)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert [(entry["prompt"], entry["seed"]) for entry in manifest["images"]] == [
        ("a red mug", 0),
        ("a red mug", 5),
        ("a blue cat", 0),
        ("a blue cat", 5),
    ]
    assert {entry["file"] for entry in manifest["images"]} == image_files(config).keys()
    expected = generate(tiny_pipe, ["a blue cat"], seeds=[5], progress=False, **QUICK)[0]
    with Image.open(folder / manifest["images"][3]["file"]) as image:
        text = image.text
        assert abs(pixels(image) - pixels(expected)).max() <= 1
    assert text["prompt"] == "a blue cat" and text["seed"] == "5"
    assert text["num_inference_steps"] == "2" and text["guidance_scale"] == "3.0" and text["concepts"] == "[]"
    assert manifest["settings"].items() <= text.items()
    with Image.open(folder / "grid.png") as grid:
        assert grid.width > 2 * 192 and grid.height > 2 * 192
    assert not [file for file in folder.iterdir() if "unfinished" in file.name]


@pytest.mark.slow
def test_a_finished_job_loads_nothing_and_a_stopped_one_goes_on(config, loads):
    folder = save_samples(config)
    before = image_files(config)
    save_samples(config)
    assert image_files(config) == before and len(loads) == 1

    lost = folder / list(before)[1]
    content = lost.read_bytes()
    lost.unlink()
    save_samples(config)
    assert lost.read_bytes() == content and len(loads) == 2
    assert [name for name, time in image_files(config).items() if time != before[name]] == [lost.name]

    save_samples(replace(config, prompts=("a robot", *config.prompts), seeds=(0, 5, 0)))
    assert before.keys() < image_files(config).keys()
    assert len(json.loads((folder / "manifest.json").read_text())["images"]) == 6


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["cut", "empty", "no text", "other image"])
def test_what_is_not_whole_is_generated_again(config, damage):
    config = replace(config, prompts=("a mug",))
    folder = save_samples(config)
    first, second = (folder / name for name in image_files(config))
    content = first.read_bytes()
    if damage == "cut":
        first.write_bytes(content[: len(content) // 2])
    elif damage == "empty":
        first.write_bytes(b"")
    elif damage == "no text":
        Image.open(second).save(first)
    else:
        first.write_bytes(second.read_bytes())
    save_samples(config)
    assert first.read_bytes() == content


def test_an_image_half_written_never_has_its_final_name(config, monkeypatch):
    written = Image.Image.save

    def fail(self, path, *args, **kwargs):
        written(self, path, *args, **kwargs)
        os.truncate(path, 100)
        raise OSError("disk full")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(WriteError, match="disk full"):
        save_samples(config)
    assert not list(Path(config.output_dir).iterdir())
    monkeypatch.undo()
    save_samples(config)
    assert len(image_files(config)) == 4


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:dtype='bfloat16'")  # where the processor emulates it
@pytest.mark.parametrize(
    "change",
    [
        {"num_inference_steps": 3},
        {"guidance_scale": 1.5},
        {"negative_prompt": "a cat"},
        {"height": 40},
        {"dtype": "bfloat16"},
        {"single_file_config": "another"},
    ],
)
def test_other_settings_generate_anew_under_the_same_names(config, change):
    config = replace(config, seeds=(0,))
    save_samples(config)
    before = image_files(config)
    contents = {name: (Path(config.output_dir) / name).read_bytes() for name in before}
    save_samples(replace(config, **change))
    assert image_files(config).keys() == before.keys()
    assert all((Path(config.output_dir) / name).read_bytes() != content for name, content in contents.items())
    save_samples(config)
    assert {name: (Path(config.output_dir) / name).read_bytes() for name in before} == contents


def test_names_of_images_are_safe_and_differ_with_the_prompt(config):
    prompts = ("../up/and\\away: 100%?", "A Mug!", "a mug", "кружка", "чашка", "x" * 70)
    folder = save_samples(replace(config, prompts=prompts, seeds=(0,), num_inference_steps=1))
    names = [entry["file"] for entry in json.loads((folder / "manifest.json").read_text())["images"]]
    assert len(set(names)) == len(prompts)
    assert all(set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789-.") and len(name) < 100 for name in names)
    with Image.open(folder / names[3]) as image:
        assert image.text["prompt"] == "кружка"


@pytest.mark.parametrize(("asked", "size"), [({"height": 48}, (32, 48)), ({"width": 40}, (40, 32)), ({}, (32, 32))])
def test_a_lone_side_is_kept_the_other_is_the_bases_and_files_tell_both(config, asked, size):
    folder = save_samples(replace(config, prompts=("a mug",), seeds=(0,), **asked))
    (entry,) = json.loads((folder / "manifest.json").read_text())["images"]
    with Image.open(folder / entry["file"]) as image:
        assert image.size == size
        assert entry["size"] == image.text["size"] == f"{size[0]}x{size[1]}"


def spoiled(template, tmp_path, part):
    """A base whose VAE or UNet gives numbers that are not finite."""
    pipe = copy.deepcopy(template)
    model = pipe.vae.decoder.conv_out if part == "vae" else pipe.unet.conv_out
    model.bias.data.fill_(float("nan"))
    pipe.save_pretrained(tmp_path / "spoiled")
    return str(tmp_path / "spoiled")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("part", "cause"),
    [("vae", "the VAE cannot decode"), ("unet", "the UNet's values overflow; lower the weights")],
)
def test_images_that_are_not_finite_are_never_saved(config, pipe_template, tmp_path, part, cause):
    wrong = replace(config, pretrained_model_name_or_path=spoiled(pipe_template, tmp_path, part))
    for _ in range(2):  # they count as done the second time as little as the first
        with pytest.raises(UserError, match=f"'a red mug' with seed 0 has values that are not finite: {cause}"):
            save_samples(wrong)
        assert not image_files(config) and not (Path(config.output_dir) / "manifest.json").exists()


@pytest.mark.slow
def test_weights_that_overflow_are_named(config, tiny_pipe, tmp_path):
    path = write_concept(tiny_pipe, tmp_path / "mug.atoms.safetensors")
    config = replace(config, prompts=("a sks mug",))
    with pytest.raises(UserError, match="the image of 'a sks mug' with seed 0 .* lower the weights of the concepts"):
        save_samples(replace(config, concepts=(path,), weights=(1e30,)))
    assert not image_files(config)


def test_black_images_are_generated_again_and_refused(config, tiny_pipe, monkeypatch):
    save_samples(config)
    for name in image_files(config):
        path = Path(config.output_dir) / name
        with Image.open(path) as image:
            info = PngImagePlugin.PngInfo()
            for key, value in image.text.items():
                info.add_text(key, value)
        Image.new("RGB", (32, 32)).save(path, pnginfo=info)
    monkeypatch.setattr(
        type(tiny_pipe.vae), "decode", lambda self, latents, **_: (-torch.ones(len(latents), 3, 32, 32),)
    )
    with pytest.raises(UserError, match="is completely black: the VAE"):
        save_samples(config)


def test_what_the_safety_checker_blacks_out_is_reported_and_the_others_are_generated(config, tiny_pipe, monkeypatch):
    def check(self, image, device, dtype):
        image[0] = 0
        return image, [True] + [False] * (len(image) - 1)

    monkeypatch.setattr(type(tiny_pipe), "run_safety_checker", check)
    with pytest.raises(
        UserError, match="safety checker of the base blacked them out: 'a red mug' with seed 0; the oth"
    ):
        save_samples(config)
    assert len(image_files(config)) == 3
    with pytest.raises(UserError, match="'a red mug' with seed 0; load it with safety_checker=None"):
        generate(tiny_pipe, ["a red mug"], seeds=[0], progress=False, **QUICK)


@pytest.mark.parametrize(
    "kind",
    [
        "StableDiffusion3Pipeline",
        "TextToVideoSDPipeline",
        "FluxPipeline",
        "StableDiffusionInpaintPipeline",
        "StableDiffusionImg2ImgPipeline",
        "DDPMPipeline",
        "NoSuchPipeline",
    ],
)
def test_other_pipelines_are_named_before_they_are_loaded(config, tmp_path, loads, kind):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "model_index.json").write_text(json.dumps({"_class_name": kind}))
    with pytest.raises(UserError, match=f"found a {kind}; expected a pipeline of Stable Diffusion"):
        save_samples(replace(config, pretrained_model_name_or_path=str(tmp_path / "other")))
    assert not loads


def test_a_missing_base_and_missing_prompts_are_one_line(config, tmp_path):
    with pytest.raises(UserError, match="is not a folder or file here") as error:
        save_samples(replace(config, pretrained_model_name_or_path=str(tmp_path / "nowhere")))
    assert "\n" not in str(error.value)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="exists, but cannot be loaded"):
        save_samples(replace(config, pretrained_model_name_or_path=str(tmp_path / "empty")))
    with pytest.raises(UserError, match="no prompt"):
        save_samples(replace(config, prompts=(" ",)))


def test_prompts_longer_than_the_base_reads_are_reported(config):
    with pytest.warns(UserWarning, match=r"77 of the 102 tokens of 'mug mug"):
        save_samples(replace(config, prompts=("mug " * 100,), seeds=(0,)))


def test_processes_share_the_missing_images_and_one_writes_the_overview(config, tiny_pipe, monkeypatch):
    save_samples(replace(config, seeds=(5,)))
    before = image_files(config)
    barrier, drawn, overviews = threading.Barrier(2, timeout=60), [], []

    class Process:
        """What two processes see of accelerate, in two threads."""

        num_processes = 2
        device = torch.device("cpu")
        wait_for_everyone = staticmethod(barrier.wait)

        def __init__(self, cpu):
            self.process_index = int(threading.current_thread().name)
            self.is_main_process = self.process_index == 0

    save, overview = sample.SampleFile.save, sample.write_overview
    monkeypatch.setattr(accelerate, "Accelerator", Process)
    monkeypatch.setattr(sample, "open_base", lambda *_, **__: copy.deepcopy(tiny_pipe))  # loading in threads fails
    monkeypatch.setattr(
        sample.SampleFile, "save", lambda self, im: (drawn.append(threading.current_thread().name), save(self, im))
    )
    monkeypatch.setattr(
        sample, "write_overview", lambda *a: (overviews.append(threading.current_thread().name), overview(*a))
    )
    threads = [threading.Thread(target=save_samples, args=(config,), name=str(rank)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(drawn) == ["0", "1"] and overviews == ["0"]
    assert len(image_files(config)) == 4 and image_files(config).items() > before.items()


@pytest.mark.slow
def test_jobs_of_different_prompts_fill_one_folder_one_after_the_other_and_at_once(config, tiny_pipe, monkeypatch):
    """Whichever job ends last, grid and manifest have the images of both, and neither job generates them again."""
    mugs, cats = (replace(config, prompts=(prompt,)) for prompt in ("a red mug", "a blue cat"))
    generate_each = sample.generate_each
    running = []

    def start_the_other_job(pipe, prompts, *args, **settings):
        if not running:
            running.append(cats)
            save_samples(cats)  # from its first image to its overview
        return generate_each(pipe, prompts, *args, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(sample, "generate_each", start_the_other_job)
        folder = save_samples(mugs)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert [image["prompt"] for image in manifest["images"]] == ["a red mug"] * 2 + ["a blue cat"] * 2
    before = image_files(config)
    assert len(before) == 4
    robots = replace(config, prompts=("a robot",), seeds=(7,), num_inference_steps=1)
    save_samples(robots)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert [image["prompt"] for image in manifest["images"]][0] == "a robot" and len(manifest["images"]) == 5
    assert "num_inference_steps" not in manifest["settings"]
    save_samples(config)
    assert {name: time for name, time in image_files(config).items() if "robot" not in name} == before
