"""PNGs that know how they were made; what becomes of them in whole jobs stands in test_sample.py."""

import json
import threading
from dataclasses import replace

import pytest
from PIL import Image

from atomdiff.sampling import output_files
from atomdiff.sampling.output_files import SampleFile, refuse_foreign_images, write_overview
from atomdiff.utils.errors import UserError

SETTINGS = {"concepts": "[]", "negative_prompt": "", "num_inference_steps": "3"}


def saved(folder, prompt, seed, side=16):
    sample = SampleFile(folder, prompt, seed, SETTINGS)
    sample.save(Image.new("RGB", (side, side), (9 * seed, 99, 199)))
    return sample


@pytest.mark.parametrize("prompt", ["a photo", "кружка “в лесу”", 'a "b" \\ c: é', "   "])
def test_texts_of_any_script_are_read_back(tmp_path, prompt):
    sample = saved(tmp_path, prompt, 3)
    assert sample.is_saved()
    with Image.open(sample.path) as image:
        assert image.text == {"prompt": prompt, "seed": "3", "size": "16x16", **SETTINGS}
    assert [path.name for path in tmp_path.iterdir()] == [sample.path.name]


@pytest.mark.parametrize("other", [{"num_inference_steps": "4"}, {"negative_prompt": "cat"}, {"more": "1"}])
def test_other_settings_are_another_image_of_the_same_name(tmp_path, other):
    sample = saved(tmp_path, "a photo", 3)
    changed = SampleFile(tmp_path, "a photo", 3, {**SETTINGS, **other})
    assert changed.path == sample.path and not changed.is_saved()


def test_what_is_no_image_is_not_saved(tmp_path):
    sample = SampleFile(tmp_path, "a photo", 0, SETTINGS)
    assert not sample.is_saved()
    sample.path.write_text("not a picture")
    assert not sample.is_saved()


def test_prompts_that_begin_alike_have_files_of_their_own(tmp_path):
    start = "a studio photograph of a mug on a wooden table, soft light, sharp focus"
    prompts = [*(f"{start}, variant {number}" for number in range(8000)), *map(chr, range(0x4E00, 0x6E00))]
    assert len({SampleFile(tmp_path, prompt, 0, SETTINGS).path.name for prompt in prompts}) == len(prompts)
    samples = [saved(tmp_path, prompt, 0) for prompt in (prompts[0], prompts[-1])]
    refuse_foreign_images(tmp_path)
    write_overview(tmp_path, samples[:1])
    assert len(json.loads((tmp_path / "manifest.json").read_text())["images"]) == 2


def test_large_jobs_get_a_small_grid(tmp_path, monkeypatch):
    samples = [saved(tmp_path, prompt, seed, side=256) for prompt in ("one", "two", "three") for seed in range(2)]
    write_overview(tmp_path, samples)
    large = Image.open(tmp_path / "grid.png").size
    for module in ("utils.image_grid", "sampling.output_files"):
        monkeypatch.setattr(f"atomdiff.{module}.SHEET_PIXELS", 6 * 64 * 64)
    write_overview(tmp_path, samples)
    small = Image.open(tmp_path / "grid.png").size
    assert large[0] > 2 * 256 and large[1] > 3 * 256
    assert small[0] < 2 * 64 + 250 and small[1] < 3 * 64 + 100
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["settings"] == SETTINGS
    assert [(image["prompt"], image["seed"]) for image in manifest["images"]][:3] == [
        ("one", 0),
        ("one", 1),
        ("two", 0),
    ]


@pytest.mark.slow
def test_two_jobs_in_one_folder_never_tear_each_others_files(tmp_path):
    samples = [SampleFile(tmp_path, "a mug", seed, SETTINGS) for seed in range(3)]
    failures = []

    def job():
        try:
            for _ in range(10):
                for sample in samples:
                    sample.save(Image.new("RGB", (16, 16), "red"))
                write_overview(tmp_path, samples)
                with Image.open(tmp_path / "grid.png") as image:
                    image.load()
                assert len(json.loads((tmp_path / "manifest.json").read_text())["images"]) == 3
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=job) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert {file.suffix for file in tmp_path.iterdir()} == {".png", ".json"}


def test_a_job_that_ends_during_the_overview_of_another_is_in_the_one_that_stays(tmp_path, monkeypatch):
    def end():
        write_overview(tmp_path, [saved(tmp_path, "a cat", 1)])

    def write_grid(*args):
        if not other.ident:
            other.start()
            other.join(0.3)  # it waits for this one
        write(*args)

    other, write = threading.Thread(target=end), output_files._write_grid
    monkeypatch.setattr(output_files, "_write_grid", write_grid)
    write_overview(tmp_path, [saved(tmp_path, "a mug", 0)])
    other.join()
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert [image["prompt"] for image in manifest["images"]] == ["a cat", "a mug"]


def test_an_image_that_another_job_replaced_is_reported(tmp_path):
    sample = saved(tmp_path, "a mug", 0)
    SampleFile(tmp_path, "a mug", 0, SETTINGS | {"concepts": "[1]"}).save(Image.new("RGB", (16, 16), "red"))
    with pytest.raises(UserError, match="another job replaced it"):
        write_overview(tmp_path, [sample])


def test_the_manifest_and_the_grid_have_the_images_of_earlier_jobs(tmp_path):
    saved(tmp_path, "a cat", 1)
    mug = SampleFile(tmp_path, "a mug", 0, SETTINGS | {"num_inference_steps": "9"})
    mug.save(Image.new("RGB", (32, 16), (1, 2, 3)))
    broken, foreign = (tmp_path / f"a-robot-abcdef-seed{seed}.png" for seed in (0, 1))
    broken.write_bytes(mug.path.read_bytes()[:90])
    Image.new("RGB", (16, 16), "red").save(foreign)
    write_overview(tmp_path, [mug])
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["settings"] == {key: SETTINGS[key] for key in ("concepts", "negative_prompt")}
    assert [(image["prompt"], image["seed"], image["size"]) for image in manifest["images"]] == [
        ("a mug", 0, "32x16"),
        ("a cat", 1, "16x16"),
    ]
    assert [image["num_inference_steps"] for image in manifest["images"]] == ["9", "3"]
    with Image.open(tmp_path / "grid.png") as grid:
        assert {(1, 2, 3), (9, 99, 199)} <= {color for _, color in grid.getcolors(1 << 20)}


def test_samples_do_not_go_among_other_images(tmp_path):
    (tmp_path / "photos").mkdir()
    for name in ("a", "b"):
        Image.new("RGB", (8, 8)).save(tmp_path / "photos" / f"{name}.png")
    with pytest.raises(UserError, match="output_dir=.*photos': has images that were not sampled .a.png, b.png."):
        refuse_foreign_images(tmp_path / "photos")
    (tmp_path / "samples").mkdir()
    for name in ("grid.png", "contact_sheet.png", "a-mug-0a1b2c-seed7.png"):
        (tmp_path / "samples" / name).touch()
    refuse_foreign_images(tmp_path / "samples")
    refuse_foreign_images(tmp_path / "none")


def test_what_a_png_does_not_say_had_no_value(tmp_path):
    file = SampleFile(tmp_path, "a mug", 3, {"dtype": "float32"})
    file.save(Image.new("RGB", (8, 8), "red"))
    assert replace(file, settings={"dtype": "float32", "added_later": ""}).is_saved()
    assert not replace(file, settings={"dtype": "float32", "added_later": "x"}).is_saved()
    assert file.read_settings() == {"dtype": "float32"}
