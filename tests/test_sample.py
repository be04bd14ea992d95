"""Pictures from prompts and seeds, and jobs that go on where they stopped."""

import copy
import json
import os
import threading
from dataclasses import replace
from pathlib import Path

import accelerate
import numpy as np
import pytest
import torch
from PIL import Image

import atomdiff
from atomdiff import sample
from atomdiff.errors import UserError
from atomdiff.pipeline import add_trigger_word, set_trigger_embedding
from atomdiff.sample import SampleConfig, generate, save_samples

QUICK = {"num_inference_steps": 2, "guidance_scale": 3.0}


def pixels(image):
    return np.asarray(image).astype(int)


def concept_file(pipe, path, seed=0):
    """A random concept with the trigger word "sks"."""
    generator = torch.Generator().manual_seed(seed)
    pipe.unet.add_adapter(atomdiff.AtomConfig(target_modules=["conv1"]))
    for name, parameter in pipe.unet.named_parameters():
        if name.endswith("default") and "delta" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator)
    add_trigger_word(pipe, "sks")
    set_trigger_embedding(pipe, "sks", {"text_encoder": torch.randn(32, generator=generator)})
    atomdiff.save_atoms(pipe, path, trigger_phrase="sks mug")
    atomdiff.unload_atoms(pipe)
    return str(path)


@pytest.fixture
def config(tiny_pipe_folder, tmp_path):
    return SampleConfig(
        str(tiny_pipe_folder), str(tmp_path / "out"), prompts=("a red mug", "a blue cat"), seeds=(0, 5), **QUICK
    )


@pytest.fixture
def loads(monkeypatch):
    """Counts how often a pipeline was loaded."""
    counted, load = [], sample._load_pipeline
    monkeypatch.setattr(sample, "_load_pipeline", lambda config: counted.append(config) or load(config))
    return counted


def config_folder(config):
    return Path(config.output_dir)


def files(config):
    return {path.name: path.stat().st_mtime_ns for path in sorted(config_folder(config).glob("*-seed*.png"))}


# generate


def test_a_picture_depends_on_its_prompt_and_seed_but_not_on_its_batch(tiny_pipe):
    prompts, seeds = ["a red mug", "a blue cat", "a red mug", "a robot", "a red mug"], [1, 2, 3, 4, 1]
    together = generate(tiny_pipe, prompts, seeds=seeds, batch_size=5, progress=False, **QUICK)
    apart = generate(tiny_pipe, prompts, seeds=seeds, batch_size=2, progress=False, **QUICK)
    alone = [
        generate(tiny_pipe, [prompt], seeds=[seed], progress=False, **QUICK)[0]
        for prompt, seed in zip(prompts, seeds, strict=True)
    ]
    for images in zip(together, apart, alone, strict=True):
        assert max(abs(pixels(images[0]) - pixels(other)).max() for other in images) <= 1  # rounding
    assert abs(pixels(together[0]) - pixels(together[4])).max() <= 1
    assert abs(pixels(together[0]) - pixels(together[2])).max() > 5  # another seed
    assert abs(pixels(alone[0]) - pixels(generate(tiny_pipe, ["a robot"], seeds=[1], **QUICK)[0])).max() > 0


def test_global_randomness_is_neither_used_nor_changed(tiny_pipe):
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = generate(tiny_pipe, ["a mug"], seeds=[3], **QUICK)[0]
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    assert np.array_equal(pixels(generate(tiny_pipe, ["a mug"], seeds=[3], **QUICK)[0]), pixels(first))


def test_size_and_negative_prompt_reach_the_pipeline(tiny_pipe):
    plain = generate(tiny_pipe, ["a mug"], seeds=[0], height=48, width=40, **QUICK)[0]
    assert plain.size == (40, 48)
    other = generate(tiny_pipe, ["a mug"], seeds=[0], height=48, width=40, negative_prompt="a red cat", **QUICK)[0]
    assert not np.array_equal(pixels(plain), pixels(other))


def test_the_progress_bar_counts_pictures_and_the_pipelines_own_is_put_back(tiny_pipe, capfd):
    tiny_pipe.set_progress_bar_config(desc="mine")
    generate(tiny_pipe, ["a mug"] * 3, seeds=[0, 1, 2], batch_size=2, **QUICK)
    assert "3/3" in (shown := capfd.readouterr().err) and "mine" not in shown
    generate(tiny_pipe, ["a mug"], seeds=[0], progress=False, **QUICK)
    assert capfd.readouterr().err == ""
    assert tiny_pipe._progress_bar_config == {"desc": "mine"}


def test_prompts_and_seeds_come_in_pairs(tiny_pipe):
    with pytest.raises(ValueError, match="2 prompts and 1 seeds"):
        generate(tiny_pipe, ["a", "b"], seeds=[0], **QUICK)


# save_samples


def test_pictures_metadata_grid_and_manifest(config, tiny_pipe):
    folder = save_samples(config)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert [(entry["prompt"], entry["seed"]) for entry in manifest["images"]] == [
        ("a red mug", 0),
        ("a red mug", 5),
        ("a blue cat", 0),
        ("a blue cat", 5),
    ]
    assert {entry["file"] for entry in manifest["images"]} == files(config).keys()
    expected = generate(tiny_pipe, ["a blue cat"], seeds=[5], progress=False, **QUICK)[0]
    with Image.open(folder / manifest["images"][3]["file"]) as image:
        text = image.text
        assert abs(pixels(image) - pixels(expected)).max() <= 1
    assert text["prompt"] == "a blue cat" and text["seed"] == "5"
    assert text["num_inference_steps"] == "2" and text["guidance_scale"] == "3.0" and text["concepts"] == "[]"
    assert manifest["settings"].items() <= text.items()
    with Image.open(folder / "grid.png") as grid:
        assert grid.width > 2 * 192 and grid.height > 2 * 192
    assert not list(folder.glob("*.unfinished"))


def test_a_finished_job_loads_nothing_and_a_stopped_one_goes_on(config, loads):
    folder = save_samples(config)
    before = files(config)
    save_samples(config)
    assert files(config) == before and len(loads) == 1

    lost = folder / list(before)[1]
    content = lost.read_bytes()
    lost.unlink()
    save_samples(config)
    assert lost.read_bytes() == content and len(loads) == 2
    assert [name for name, time in files(config).items() if time != before[name]] == [lost.name]

    save_samples(replace(config, prompts=("a robot", *config.prompts), seeds=(0, 5, 0)))
    assert before.keys() < files(config).keys()
    assert len(json.loads((folder / "manifest.json").read_text())["images"]) == 6


@pytest.mark.parametrize("damage", ["cut", "empty", "no text", "other picture"])
def test_what_is_not_whole_is_drawn_again(config, damage):
    config = replace(config, prompts=("a mug",))
    folder = save_samples(config)
    first, second = (folder / name for name in files(config))
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


def test_a_picture_half_written_never_has_its_final_name(config, monkeypatch):
    written = Image.Image.save

    def fail(self, path, *args, **kwargs):
        written(self, path, *args, **kwargs)
        os.truncate(path, 100)
        raise OSError("disk full")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        save_samples(config)
    assert not files(config)
    monkeypatch.undo()
    save_samples(config)
    assert len(files(config)) == 4 and not list(config_folder(config).glob("*.unfinished"))


@pytest.mark.parametrize(
    "change",
    [
        {"num_inference_steps": 3},
        {"guidance_scale": 1.5},
        {"negative_prompt": "a cat"},
        {"height": 40},
        {"dtype": "bfloat16"},
    ],
)
def test_other_settings_draw_anew_under_the_same_names(config, change):
    config = replace(config, seeds=(0,))
    save_samples(config)
    before = files(config)
    contents = {name: (config_folder(config) / name).read_bytes() for name in before}
    save_samples(replace(config, **change))
    assert files(config).keys() == before.keys()
    assert all((config_folder(config) / name).read_bytes() != content for name, content in contents.items())
    save_samples(config)
    assert {name: (config_folder(config) / name).read_bytes() for name in before} == contents


def test_names_of_pictures_are_safe_and_differ_with_the_prompt(config):
    prompts = ("../up/and\\away: 100%?", "A Mug!", "a mug", "кружка", "чашка", "x" * 70)
    folder = save_samples(replace(config, prompts=prompts, seeds=(0,), num_inference_steps=1))
    names = [entry["file"] for entry in json.loads((folder / "manifest.json").read_text())["images"]]
    assert len(set(names)) == len(prompts)
    assert all(set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789-.") and len(name) < 100 for name in names)
    with Image.open(folder / names[3]) as image:
        assert image.text["prompt"] == "кружка"


def test_prompts_come_from_arguments_and_file_once_each(config, tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffa red mug\n\n  a robot  \r\nштора\n".encode())
    config = replace(config, prompts_file=str(path))
    assert config.read_prompts() == ["a red mug", "a blue cat", "a robot", "штора"]
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="prompts.txt.*cannot be read as text"):
        config.read_prompts()


# concepts


def test_concepts_act_with_their_weights_and_words(config, tiny_pipe, tmp_path):
    first = concept_file(tiny_pipe, tmp_path / "first.atoms.safetensors", 0)
    second = concept_file(tiny_pipe, tmp_path / "second.atoms.safetensors", 1)
    config = replace(config, prompts=("a red cat",), seeds=(0,))

    def draw(**changes):
        folder = save_samples(replace(config, **changes))
        return pixels(Image.open(folder / next(iter(files(config)))))

    base = draw()
    both = {"concepts": (first, second), "trigger_words": ("sks", "zwx")}
    assert np.array_equal(draw(**both, weights=(0.0, 0.0)), base)
    one = draw(concepts=(first,))
    assert abs(one - base).max() > 2
    assert abs(draw(**both, weights=(1.0, 0.0)) - one).max() <= 1
    assert abs(draw(**both, weights=(1.0, 0.7)) - one).max() > 2
    assert abs(draw(concepts=(first,), weights=(0.5,)) - one).max() > 2
    word = draw(concepts=(first,), prompts=("a sks cat",))
    with Image.open(next(config_folder(config).glob("a-sks*"))) as image:
        (told,) = json.loads(image.text["concepts"])
    assert told["file"] == "first.atoms.safetensors" and told["weight"] == 1 and len(told["sha256"]) == 64
    assert abs(word - one).max() > 0


def test_a_concept_trained_again_is_drawn_again(config, tiny_pipe, tmp_path):
    path = concept_file(tiny_pipe, tmp_path / "mug.atoms.safetensors", 0)
    config = replace(config, concepts=(path,), seeds=(0,))
    save_samples(config)
    before = files(config)
    concept_file(tiny_pipe, tmp_path / "mug.atoms.safetensors", 1)
    save_samples(config)
    assert all(time != before[name] for name, time in files(config).items())


def test_concepts_of_a_method_without_weights_are_refused_in_words(config, tiny_pipe, tmp_path):
    from peft import OFTConfig

    tiny_pipe.unet.add_adapter(OFTConfig(target_modules=["to_q"], oft_block_size=8))
    path = str(atomdiff.save_atoms(tiny_pipe, tmp_path / "oft"))
    save_samples(replace(config, concepts=(path,), seeds=(0,)))
    with pytest.raises(UserError, match=r"OFT.*weighted"):
        save_samples(replace(config, concepts=(path,), weights=(0.5,)))


# errors and warnings


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"concepts": ("none.safetensors",)}, "none.safetensors"),
        ({"prompts_file": "none.txt"}, "none.txt"),
        ({"weights": (1.0,)}, "1 weights for 0 concepts"),
        ({"trigger_words": ("a", "b")}, "2 trigger_words for 0 concepts"),
        ({"seeds": ()}, "seeds"),
        ({"seeds": (-1,)}, "seeds"),
        ({"num_inference_steps": 0}, "num_inference_steps=0"),
        ({"sample_batch_size": 0}, "sample_batch_size=0"),
        ({"height": 0}, "height=0"),
    ],
)
def test_wrong_fields_are_named(config, change, message):
    with pytest.raises(UserError, match=message):
        replace(config, **change)


def test_a_missing_base_and_missing_prompts_are_one_line(config, tmp_path):
    with pytest.raises(UserError, match="is no folder here") as error:
        save_samples(replace(config, pretrained_model_name_or_path=str(tmp_path / "nowhere")))
    assert "\n" not in str(error.value)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="is there, but cannot be loaded"):
        save_samples(replace(config, pretrained_model_name_or_path=str(tmp_path / "empty")))
    with pytest.raises(UserError, match="no prompt"):
        save_samples(replace(config, prompts=(" ",)))


def test_prompts_longer_than_the_base_reads_are_told(config):
    with pytest.warns(UserWarning, match=r"77 of the 102 tokens of 'mug mug"):
        save_samples(replace(config, prompts=("mug " * 100,), seeds=(0,)))


# processes


def test_processes_share_the_missing_pictures_and_one_writes_the_overview(config, tiny_pipe, monkeypatch):
    save_samples(replace(config, seeds=(5,)))
    before = files(config)
    barrier, drawn, overviews = threading.Barrier(2, timeout=60), [], []

    class Process:
        """What two processes see of accelerate, in two threads."""

        num_processes = 2
        device = torch.device("cpu")
        wait_for_everyone = staticmethod(barrier.wait)

        def __init__(self, cpu):
            self.process_index = int(threading.current_thread().name)
            self.is_main_process = self.process_index == 0

    save, overview = sample.PictureFile.save, sample.write_overview
    monkeypatch.setattr(accelerate, "Accelerator", Process)
    monkeypatch.setattr(sample, "_load_pipeline", lambda config: copy.deepcopy(tiny_pipe))  # loading in threads fails
    monkeypatch.setattr(
        sample.PictureFile, "save", lambda self, im: (drawn.append(threading.current_thread().name), save(self, im))
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
    assert len(files(config)) == 4 and files(config).items() > before.items()
