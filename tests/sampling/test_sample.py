"""Pictures from prompts and seeds, and jobs that go on where they stopped."""

import copy
import io
import json
import os
import shutil
import threading
from dataclasses import replace
from pathlib import Path

import accelerate
import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin
from safetensors.torch import load_file, save_file

import atomdiff
from atomdiff.concepts.concept_file import CONCEPT_SUFFIX
from atomdiff.pipelines import open as opening
from atomdiff.pipelines.loaded_concepts import list_atoms
from atomdiff.pipelines.placeholder_tokens import add_placeholder_token, set_token_embedding, tokens_in
from atomdiff.pipelines.scheduler import schedule_settings
from atomdiff.sampling import adapter_cache, sample
from atomdiff.sampling.config import SampleConfig
from atomdiff.sampling.generate import generate, image_size
from atomdiff.sampling.sample import save_samples
from atomdiff.training.config import TrainConfig
from atomdiff.training.dreambooth import train
from atomdiff.training.noise import set_training_scheduler
from atomdiff.utils.atomic import WriteError
from atomdiff.utils.errors import UserError
from atomdiff.utils.hashing import hash_file
from atomdiff.utils.options import parse_config

ROOT = Path(__file__).parents[2]

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
    add_placeholder_token(pipe, "sks")
    set_token_embedding(pipe, "sks", {"text_encoder": torch.randn(32, generator=generator)})
    path.parent.mkdir(exist_ok=True, parents=True)
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
    counted, load = [], opening.open_pipeline
    monkeypatch.setattr(opening, "open_pipeline", lambda *a, **k: counted.append(a) or load(*a, **k))
    return counted


def config_folder(config):
    return Path(config.output_dir)


def files(config):
    return {path.name: path.stat().st_mtime_ns for path in sorted(config_folder(config).glob("*-seed*.png"))}


# generate


def test_an_image_depends_on_its_prompt_and_seed_but_not_on_its_batch(tiny_pipe):
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


def test_the_progress_bar_counts_images_and_the_pipelines_own_is_put_back(tiny_pipe, capfd):
    tiny_pipe.set_progress_bar_config(desc="mine")
    generate(tiny_pipe, ["a mug"] * 3, seeds=[0, 1, 2], batch_size=2, **QUICK)
    assert capfd.readouterr().err == "images: 3 images\n"  # a line where the output is no terminal
    generate(tiny_pipe, ["a mug"], seeds=[0], progress=False, **QUICK)
    assert capfd.readouterr().err == ""
    assert tiny_pipe._progress_bar_config == {"desc": "mine"}


def test_prompts_and_seeds_come_in_pairs(tiny_pipe):
    with pytest.raises(ValueError, match="2 prompts and 1 seeds"):
        generate(tiny_pipe, ["a", "b"], seeds=[0], **QUICK)


# save_samples


def test_images_metadata_grid_and_manifest(config, tiny_pipe):
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
    assert not [file for file in folder.iterdir() if "unfinished" in file.name]


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
def test_what_is_not_whole_is_generated_again(config, damage):
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


def test_an_image_half_written_never_has_its_final_name(config, monkeypatch):
    written = Image.Image.save

    def fail(self, path, *args, **kwargs):
        written(self, path, *args, **kwargs)
        os.truncate(path, 100)
        raise OSError("disk full")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(WriteError, match="disk full"):
        save_samples(config)
    assert not list(config_folder(config).iterdir())
    monkeypatch.undo()
    save_samples(config)
    assert len(files(config)) == 4


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
def test_other_settings_generate_anew_under_the_same_names(config, change):
    config = replace(config, seeds=(0,))
    save_samples(config)
    before = files(config)
    contents = {name: (config_folder(config) / name).read_bytes() for name in before}
    save_samples(replace(config, **change))
    assert files(config).keys() == before.keys()
    assert all((config_folder(config) / name).read_bytes() != content for name, content in contents.items())
    save_samples(config)
    assert {name: (config_folder(config) / name).read_bytes() for name in before} == contents


def test_names_of_images_are_safe_and_differ_with_the_prompt(config):
    prompts = ("../up/and\\away: 100%?", "A Mug!", "a mug", "кружка", "чашка", "x" * 70)
    folder = save_samples(replace(config, prompts=prompts, seeds=(0,), num_inference_steps=1))
    names = [entry["file"] for entry in json.loads((folder / "manifest.json").read_text())["images"]]
    assert len(set(names)) == len(prompts)
    assert all(set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789-.") and len(name) < 100 for name in names)
    with Image.open(folder / names[3]) as image:
        assert image.text["prompt"] == "кружка"


def test_prompts_come_from_arguments_and_file_once_each(config, tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeff# mugs\na red mug\n\n  a robot  \r\n#\nштора\n  # the end\n".encode())
    config = replace(config, prompts_file=str(path))
    assert config.read_prompts() == ["a red mug", "a blue cat", "a robot", "штора"]
    path.write_bytes(b"#1 mug\n")
    assert config.read_prompts()[2:] == ["#1 mug"]
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="prompts.txt: not text in UTF-16"):
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


def test_a_concept_trained_again_is_generated_again(config, tiny_pipe, tmp_path):
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
    with pytest.raises(UserError, match=r"oft-1.*OFT adapter.*no weight such as 0.5"):
        save_samples(replace(config, concepts=(path,), weights=(0.5,)))


# a library


@pytest.fixture
def library(tiny_pipe, tmp_path):
    """Five concepts that are all called "sks mug", in a folder and in one below it."""
    for number, name in enumerate(("ant", "bee", "cat", "dog", "pets/eel")):
        concept_file(tiny_pipe, tmp_path / "library" / f"{name}.atoms.safetensors", number)
    return tmp_path / "library"


def told(config):
    """Prompt -> concepts, as the images of a job tell them."""
    found = {}
    for name in files(config):
        with Image.open(config_folder(config) / name) as image:
            found[image.text["prompt"]] = json.loads(image.text["concepts"])
    return found


def picture(config, prompt, seed=0):
    """An image of a finished job."""
    images = json.loads((config_folder(config) / "manifest.json").read_text())["images"]
    (file,) = [image["file"] for image in images if (image["prompt"], image["seed"]) == (prompt, seed)]
    return pixels(Image.open(config_folder(config) / file))


def alone(pipe, library, text, strengths, seed=0, **changes):
    """An image generated with nothing else in the pipeline, by its own words, unmerged where weights are numbers."""
    for number, name in enumerate(strengths):
        word = "sks" if len(strengths) == 1 else f"w{number}"
        atomdiff.load_atoms(pipe, library / f"{name}.atoms.safetensors", f"c{number}", trigger_word=word)
    names = [f"c{number}" for number in range(len(strengths))]
    if all(isinstance(strength, float) for strength in strengths.values()):
        pipe.set_adapters(names, list(strengths.values())) if names else None
    else:
        atomdiff.set_active(pipe, dict(zip(names, strengths.values(), strict=True)))
    image = generate(pipe, [text], seeds=[seed], progress=False, **{**QUICK, **changes})[0]
    atomdiff.unload_atoms(pipe)
    return pixels(image)


BLOCKS = {"weight": 1.5, "blocks": {"down": 0.5, "up": 0}}
STEPS = {"steps": {0: 1.0, 1: 0.2}}


def json_text(strength):
    return json.dumps(strength)


@pytest.mark.filterwarnings("ignore:.*without its trigger phrase")
def test_every_line_uses_its_own_concepts_as_if_it_were_generated_alone(config, tiny_pipe, library):
    lines = {
        "a photo of sks mug": ("a photo of sks mug", {}),
        "a photo of sks mug <atoms:ant>": ("a photo of sks mug", {"ant": 1.0}),
        "a photo of sks mug <lora:bee:0.7>": ("a photo of sks mug", {"bee": 0.7}),
        f"a photo of SKS's mug <atoms:pets/eel:{json_text(BLOCKS)}>": ("a photo of sks 's mug", {"pets/eel": BLOCKS}),
        f"a red sks <atoms:cat:{json_text(STEPS)}>": ("a red sks", {"cat": STEPS}),
        "a robot <atoms:dog:0.5> <atoms:ant:0.6>": ("a robot", {"dog": 0.5, "ant": 0.6}),
    }
    config = replace(config, library=str(library), prompts=tuple(lines), seeds=(0, 5), sample_batch_size=3)
    save_samples(config)
    for prompt, (text, strengths) in lines.items():
        for seed in config.seeds:
            expected = alone(tiny_pipe, library, text, strengths, seed)
            assert abs(picture(config, prompt, seed) - expected).max() <= 1, prompt
            if strengths:
                assert abs(expected - alone(tiny_pipe, library, text, {}, seed)).max() > 2, prompt
                plain = dict.fromkeys(strengths, 1.0)
                assert strengths == plain or abs(expected - alone(tiny_pipe, library, text, plain, seed)).max() > 1


@pytest.mark.parametrize("size", [1, 2, 8])
def test_the_size_of_batches_changes_nothing(config, tiny_pipe, library, size):
    prompts = tuple(f"sks mug <atoms:{name}>" for name in ("ant", "bee", "cat", "dog", "pets/eel"))
    config = replace(config, library=str(library), prompts=prompts, seeds=(3, 4), sample_batch_size=size)
    save_samples(config)
    for name, prompt in zip(("ant", "bee", "cat", "dog", "pets/eel"), prompts, strict=True):
        assert abs(picture(config, prompt, 4) - alone(tiny_pipe, library, "sks mug", {name: 1.0}, 4)).max() <= 1


def test_negative_prompts_have_the_words_of_their_rows(config, tiny_pipe, library):
    prompts = ("a mug <atoms:ant:0>", "a mug <atoms:bee:0>", "a mug")
    save_samples(replace(config, library=str(library), prompts=prompts, seeds=(0,), negative_prompt="sks mug"))
    for prompt, strengths in zip(prompts, ({"ant": 0.0}, {"bee": 0.0}, {}), strict=True):
        expected = alone(tiny_pipe, library, "a mug", strengths, negative_prompt="sks mug")
        assert abs(picture(config, prompt) - expected).max() <= 1
    assert abs(picture(config, prompts[0]) - picture(config, prompts[1])).max() > 1


def test_images_tell_their_own_concepts_in_the_order_of_the_prompts(config, library):
    prompts = ("sks mug <atoms:bee:0.5>", "a cat", "sks mug <atoms:ant>", "sks cat <atoms:bee:0.5>")
    config = replace(config, library=str(library), prompts=prompts)
    manifest = json.loads((save_samples(config) / "manifest.json").read_text())
    wanted = [(prompt, seed) for prompt in prompts for seed in (0, 5)]
    assert [(image["prompt"], image["seed"]) for image in manifest["images"]] == wanted
    assert "concepts" not in manifest["settings"] and manifest["settings"]["num_inference_steps"] == "2"
    facts = {image["prompt"]: json.loads(image["concepts"]) for image in manifest["images"]}
    assert facts == told(config)
    assert facts["a cat"] == [] and facts[prompts[0]] == facts[prompts[3]]
    ((bee,), (ant,)) = facts[prompts[0]], facts[prompts[2]]
    assert (bee["file"], bee["weight"], ant["weight"]) == ("bee.atoms.safetensors", 0.5, 1.0)
    assert ant["sha256"] == hash_file(library / "ant.atoms.safetensors") != bee["sha256"]
    assert all("atoms-bee-0-5" in image["file"] for image in manifest["images"] if "bee" in image["prompt"])


@pytest.mark.filterwarnings("ignore:.*without its trigger phrase")
def test_only_images_of_a_changed_concept_are_generated_again(config, tiny_pipe, library, loads):
    prompts = ("sks mug <atoms:bee>", "sks mug", "sks mug <atoms:ant>", "a cat <atoms:bee> <atoms:ant>")
    config = replace(config, library=str(library), prompts=prompts, seeds=(0,))
    folder = save_samples(config)
    before = files(config)
    save_samples(config)
    assert files(config) == before and len(loads) == 1
    concept_file(tiny_pipe, library / "ant.atoms.safetensors", 9)
    lost = next(name for name in before if name.startswith("sks-mug-atoms-bee"))
    content = (folder / lost).read_bytes()
    (folder / lost).unlink()
    save_samples(config)
    again = {name for name, time in files(config).items() if before.get(name) != time}
    assert again == {name for name in before if "ant" in name} | {lost} and len(again) == 3
    assert abs(pixels(Image.open(folder / lost)) - pixels(Image.open(io.BytesIO(content)))).max() <= 1
    expected = alone(tiny_pipe, library, "sks mug", {"ant": 1.0})
    assert abs(picture(config, "sks mug <atoms:ant>") - expected).max() <= 1


def test_the_pipeline_holds_few_concepts_however_many_a_job_has(config, tiny_pipe, library, monkeypatch):
    held, draw = [], sample.generate_each
    monkeypatch.setattr(adapter_cache, "MAX_LOADED", 2)

    def counted(pipe, *args, **settings):
        held.append((len(list_atoms(pipe)), len(tokens_in(pipe))))
        return draw(pipe, *args, **settings)

    monkeypatch.setattr(sample, "generate_each", counted)
    prompts = tuple(
        f"sks mug <atoms:{name}>" for name in ("ant", "bee", "cat", "dog", "pets/eel", "ant:0.5", "cat:0.5")
    )
    config = replace(config, library=str(library), prompts=prompts, seeds=(0,), sample_batch_size=1)
    save_samples(config)
    assert held == [(1, 1)] * 2 + [(2, 2)] * 5
    for name in ("ant", "dog", "pets/eel"):
        expected = alone(tiny_pipe, library, "sks mug", {name: 1.0})
        assert abs(picture(config, f"sks mug <atoms:{name}>") - expected).max() <= 1
    held.clear()
    save_samples(replace(config, output_dir=f"{config.output_dir}2", sample_batch_size=5))
    assert held == [(3, 3), (2, 3)]  # a batch with ant, bee and cat needs more


@pytest.mark.parametrize("prompts", [("a cat", "a mug"), ("sks cat <atoms:ant>", "sks mug <atoms:ant>")])
def test_lines_that_use_the_same_are_generated_from_merged_weights(config, library, monkeypatch, prompts):
    monkeypatch.setattr(adapter_cache, "mixed_batch", None)
    save_samples(replace(config, library=str(library), prompts=prompts))
    assert len(files(config)) == 4


@pytest.mark.filterwarnings("ignore:.*without its trigger phrase")
def test_what_all_lines_use_goes_with_what_they_name_and_a_tag_changes_its_weight(config, tiny_pipe, library):
    own = str(library / "cat.atoms.safetensors")
    prompts = ("a cat", "a cat <atoms:ant:0.5>", "a cat <atoms:cat:0>")
    config = replace(config, concepts=(own,), weights=(0.7,), library=str(library), prompts=prompts, seeds=(0,))
    save_samples(config)
    for prompt, worn in zip(prompts, ({"cat": 0.7}, {"cat": 0.7, "ant": 0.5}, {}), strict=True):
        assert abs(picture(config, prompt) - alone(tiny_pipe, library, "a cat", worn)).max() <= 1
    assert [concept["weight"] for concept in told(config)["a cat <atoms:ant:0.5>"]] == [0.7, 0.5]


@pytest.mark.filterwarnings("ignore:.*without its trigger phrase")
def test_other_methods_are_worn_beside_a_library_without_mixing(config, tiny_pipe, library, tmp_path, monkeypatch):
    from peft import LoraConfig

    monkeypatch.setattr(adapter_cache, "mixed_batch", None)
    tiny_pipe.unet.add_adapter(LoraConfig(target_modules=["to_q"], init_lora_weights=False))
    path = atomdiff.save_atoms(tiny_pipe, tmp_path / "lora")
    atomdiff.unload_atoms(tiny_pipe)
    prompts = ("a mug <atoms:ant>", "a mug", "a mug <atoms:bee>")
    config = replace(config, concepts=(str(path),), weights=(0.5,), library=str(library), prompts=prompts, seeds=(0,))
    save_samples(config)
    for prompt, names in zip(prompts, (["ant"], [], ["bee"]), strict=True):
        atomdiff.load_atoms(tiny_pipe, path, "lora")
        for name in names:
            atomdiff.load_atoms(tiny_pipe, library / f"{name}.atoms.safetensors", name)
        tiny_pipe.set_adapters(["lora", *names], [0.5, *[1.0] * len(names)])
        expected = pixels(generate(tiny_pipe, ["a mug"], seeds=[0], progress=False, **QUICK)[0])
        atomdiff.unload_atoms(tiny_pipe)
        assert abs(picture(config, prompt) - expected).max() <= 1
    with pytest.raises(UserError, match="lora is not an atoms concept: only those can be weighted by block and step"):
        save_samples(replace(config, weights=(STEPS,)))


def test_a_concept_of_words_alone_is_worn(config, tiny_pipe, tmp_path):
    add_placeholder_token(tiny_pipe, "zwx")
    set_token_embedding(tiny_pipe, "zwx", {"text_encoder": torch.linspace(-1, 1, 32)})
    (tmp_path / "library").mkdir()
    path = atomdiff.save_atoms(tiny_pipe, tmp_path / "library" / "word.atoms.safetensors", dtype=torch.float32)
    expected = pixels(generate(tiny_pipe, ["a zwx mug"], seeds=[0], progress=False, **QUICK)[0])
    config = replace(config, library=str(path.parent), prompts=("a zwx mug <atoms:word>", "a zwx mug"), seeds=(0,))
    save_samples(config)
    assert abs(picture(config, "a zwx mug <atoms:word>") - expected).max() <= 1
    assert abs(picture(config, "a zwx mug") - expected).max() > 2


def test_mistakes_are_found_before_anything_is_generated_or_made(config, library, loads):
    for prompt, message in (
        ("a <atoms:bees>", "near: bee"),
        ("a <atoms:ant:x>", "<atoms:NAME:0.8>"),
        ('a <atoms:ant:{"blocks": {"text_encoder": 0}}>', "no layer in 'text_encoder'"),
        ("sks and sks <atoms:ant> <atoms:bee>", "'sks', the trigger word of 'ant' and 'bee'"),
    ):
        with pytest.raises(UserError, match=message):
            save_samples(replace(config, library=str(library), prompts=("a cat", prompt)))
    with pytest.raises(UserError, match="there is no file or directory 'none.safetensors'"):
        save_samples(replace(config, concepts=("none.safetensors",)))
    assert not config_folder(config).exists() and not loads


def test_a_concept_for_another_base_is_named(config, tiny_pipe, library):
    tiny_pipe.unet.add_adapter(atomdiff.AtomConfig(target_modules=["conv1"]))
    for parameter in tiny_pipe.unet.parameters():
        parameter.data = torch.randn_like(parameter)
    atomdiff.save_atoms(tiny_pipe, library / "pets" / "alien.atoms.safetensors")
    with pytest.raises(UserError, match=r"the concept 'pets/alien' \(.*alien.atoms.safetensors\): this base is at"):
        save_samples(replace(config, library=str(library), prompts=("a cat", "a cat <atoms:pets/alien>")))


def test_concepts_that_no_word_calls_are_warned_of(config, library):
    with pytest.warns(UserWarning, match="uses 'ant' without its trigger phrase 'sks mug'"):
        save_samples(replace(config, library=str(library), prompts=("a cat <atoms:ant>",), seeds=(0,)))


# strengths


def test_the_command_line_takes_weights_by_block_and_step(config, tiny_pipe, library, tmp_path):
    concept, other = (str(library / f"{name}.atoms.safetensors") for name in ("ant", "bee"))
    options = ["--pretrained_model_name_or_path", config.pretrained_model_name_or_path, "--prompts", "a mug"]
    options += ["--output_dir", config.output_dir, "--num_inference_steps", "2", "--guidance_scale", "3"]
    given = ["--concepts", concept, other, "--weights", "0.8", json_text({**BLOCKS, **STEPS})]
    parsed = parse_config(SampleConfig, [*options, *given])
    assert parsed.weights == (0.8, {**BLOCKS, "steps": {"0": 1.0, "1": 0.2}})
    (tmp_path / "job.yaml").write_text("weights: [1, {steps: {0: 1, 1: 0.2}}]\n")
    from_file = parse_config(SampleConfig, [*options, *given[:3], "--config", str(tmp_path / "job.yaml")])
    assert from_file.weights == (1.0, {"steps": {0: 1, 1: 0.2}})
    save_samples(parsed)
    expected = alone(tiny_pipe, library, "a mug", {"ant": 0.8, "bee": {**BLOCKS, **STEPS}})
    assert abs(picture(parsed, "a mug") - expected).max() <= 1
    assert abs(expected - alone(tiny_pipe, library, "a mug", {"ant": 0.8, "bee": BLOCKS})).max() > 1
    assert [concept["weight"] for concept in told(parsed)["a mug"]] == [
        0.8,
        {"weight": 1.5, "blocks": {"down_blocks": 0.5, "up_blocks": 0.0}, "steps": {"0.0": 1.0, "1.0": 0.2}},
    ]


def test_equal_weights_are_the_same_image_and_numbers_are_reported_as_ever(config, library, loads):
    path = library / "ant.atoms.safetensors"
    config = replace(config, concepts=(str(path),), weights=(1,), seeds=(0,))
    save_samples(config)
    with Image.open(config_folder(config) / next(iter(files(config)))) as image:
        digest = hash_file(path)
        assert image.text["concepts"] == (
            f'[{{"file": "ant.atoms.safetensors", "sha256": "{digest}", "weight": 1.0, "trigger_word": null}}]'
        )
    before = files(config)
    save_samples(replace(config, weights=({"weight": 1.0, "blocks": {}},)))
    assert files(config) == before and len(loads) == 1
    save_samples(replace(config, weights=({"blocks": {"down": 0}},)))
    assert len(loads) == 2
    save_samples(replace(config, weights=({"weight": 1, "blocks": {"down_blocks": 0.0}},)))
    assert len(loads) == 2


# sizes


@pytest.mark.parametrize(("asked", "size"), [({"height": 48}, (32, 48)), ({"width": 40}, (40, 32)), ({}, (32, 32))])
def test_a_lone_side_is_kept_the_other_is_the_bases_and_files_tell_both(config, asked, size):
    folder = save_samples(replace(config, prompts=("a mug",), seeds=(0,), **asked))
    (entry,) = json.loads((folder / "manifest.json").read_text())["images"]
    with Image.open(folder / entry["file"]) as image:
        assert image.size == size
        assert entry["size"] == image.text["size"] == f"{size[0]}x{size[1]}"


def test_a_base_that_needs_larger_multiples_says_so(tiny_pipe, monkeypatch):
    monkeypatch.setattr(tiny_pipe, "vae_scale_factor", 16)
    with pytest.raises(UserError, match="height=40: this base needs a multiple of 16"):
        generate(tiny_pipe, ["a mug"], seeds=[0], height=40, progress=False, **QUICK)


def test_a_lone_side_of_a_base_that_is_not_square(tiny_pipe):
    tiny_pipe.unet.register_to_config(sample_size=[8, 12])
    assert image_size(tiny_pipe, 64, None) == (64, 48)
    assert image_size(tiny_pipe, None, 64) == (32, 64)


# images that are no results


def spoiled(template, tmp_path, part):
    """A base whose VAE or UNet gives numbers that are not finite."""
    pipe = copy.deepcopy(template)
    model = pipe.vae.decoder.conv_out if part == "vae" else pipe.unet.conv_out
    model.bias.data.fill_(float("nan"))
    pipe.save_pretrained(tmp_path / "spoiled")
    return str(tmp_path / "spoiled")


@pytest.mark.parametrize(
    ("part", "cause"),
    [("vae", "the VAE cannot decode"), ("unet", "the UNet's values overflow; lower the weights")],
)
def test_images_that_are_not_finite_are_never_saved(config, pipe_template, tmp_path, part, cause):
    wrong = replace(config, pretrained_model_name_or_path=spoiled(pipe_template, tmp_path, part))
    for _ in range(2):  # they count as done the second time as little as the first
        with pytest.raises(UserError, match=f"'a red mug' with seed 0 has values that are not finite: {cause}"):
            save_samples(wrong)
        assert not files(config) and not (config_folder(config) / "manifest.json").exists()


def test_weights_that_overflow_are_named(config, tiny_pipe, tmp_path):
    path = concept_file(tiny_pipe, tmp_path / "mug.atoms.safetensors")
    config = replace(config, prompts=("a sks mug",))
    with pytest.raises(UserError, match="the image of 'a sks mug' with seed 0 .* lower the weights of the concepts"):
        save_samples(replace(config, concepts=(path,), weights=(1e30,)))
    assert not files(config)


def test_black_images_are_generated_again_and_refused(config, tiny_pipe, monkeypatch):
    save_samples(config)
    for name in files(config):
        path = config_folder(config) / name
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
    assert len(files(config)) == 3
    with pytest.raises(UserError, match="'a red mug' with seed 0; load it with safety_checker=None"):
        generate(tiny_pipe, ["a red mug"], seeds=[0], progress=False, **QUICK)


# errors and warnings


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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"library": "none"}, "library=.none.: found nothing there"),
        ({"weights": ({"block": {"down": "x"}},), "concepts": ("a",)}, "found the adapter weight"),
        ({"weights": (float("nan"),), "concepts": ("a",)}, "found the adapter weight"),
        ({"negative_prompt": "blurry <lora:x:1>"}, "remove the tag"),
        ({"prompts_file": "none.txt"}, "none.txt"),
        ({"weights": (1.0,)}, "1 weights for 0 concepts"),
        ({"trigger_words": ("a", "b")}, "2 trigger_words for 0 concepts"),
        ({"seeds": ()}, "seeds"),
        ({"seeds": (-1,)}, "seeds"),
        ({"num_inference_steps": 0}, "num_inference_steps=0"),
        ({"sample_batch_size": 0}, "sample_batch_size=0"),
        ({"height": 0}, "height=0: expected a number of at least 8 and at most 8192"),
        ({"height": 500, "width": 64}, "height=500: expected a multiple of 8"),
        ({"width": 10**6}, "width=1000000: expected a number"),
        ({"seeds": (2**64,)}, "seeds"),
        ({"num_inference_steps": 1001}, "num_inference_steps=1001: expected a number"),
        ({"guidance_scale": float("inf")}, "guidance_scale=inf"),
        ({"guidance_scale": float("nan")}, "guidance_scale=nan"),
    ],
)
def test_wrong_fields_are_named(config, change, message):
    with pytest.raises(UserError, match=message):
        replace(config, **change)


def test_a_missing_base_and_missing_prompts_are_one_line(config, tmp_path):
    with pytest.raises(UserError, match="is no folder or file here") as error:
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


# processes


def test_processes_share_the_missing_images_and_one_writes_the_overview(config, tiny_pipe, monkeypatch):
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
    assert len(files(config)) == 4 and files(config).items() > before.items()


# schedulers

OBJECTIVES = {  # the tiny base predicts v, without zero terminal SNR
    "noise": {"prediction_type": "epsilon"},
    "clean": {"prediction_type": "sample"},
    "zero": {"rescale_betas_zero_snr": True},
    "flow": {"prediction_type": "flow", "flow_shift": 3.0},
    "same": {"prediction_type": "v_prediction", "rescale_betas_zero_snr": False},
    "plain": {},
}


@pytest.fixture(scope="module")
def trained(tiny_pipe_folder, tmp_path_factory):
    """Concepts of one step each, by schedule, and one of another method; and their runs."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "photos").mkdir()
    Image.new("RGB", (32, 32), "red").save(folder / "photos" / "0.png")
    runs = {}
    for name, fields in [*OBJECTIVES.items(), ("lora", OBJECTIVES["noise"])]:
        runs[name] = TrainConfig(
            pretrained_model_name_or_path=str(tiny_pipe_folder),
            instance_data_dir=str(folder / "photos"),
            class_name="mug",
            output_dir=str(folder / "runs" / name),
            adapter=str(ROOT / "configs/experiments/lora/attention_r16/adapter.json") if name == "lora" else "atoms",
            max_train_steps=1,
            validation_steps=0,
            report_to=None,
            **fields,
        )
        place = train(runs[name])
        place.rename(folder / f"{name}{'' if place.is_dir() else CONCEPT_SUFFIX}")
    return folder, runs


@pytest.fixture
def used(monkeypatch):
    """Records the scheduler of each batch with its prompts."""
    found, draw = [], sample.generate_each
    monkeypatch.setattr(
        sample,
        "generate_each",
        lambda pipe, prompts, *a, **k: found.append(pipe.scheduler) or draw(pipe, prompts, *a, **k),
    )
    return found


@pytest.mark.parametrize("name", [*OBJECTIVES, "lora"])
def test_a_concept_is_generated_with_its_training_scheduler(config, trained, used, tiny_pipe, capsys, name):
    folder, runs = trained
    path = folder / name if name == "lora" else folder / f"{name}{CONCEPT_SUFFIX}"
    config = replace(config, prompts=("a photo of sks mug",), seeds=(0,), concepts=(str(path),))
    save_samples(config)
    (scheduler,) = used
    base = tiny_pipe.scheduler
    set_training_scheduler(runs[name], tiny_pipe)  # as validation does
    assert type(scheduler) is type(tiny_pipe.scheduler)
    assert schedule_settings(scheduler) == schedule_settings(tiny_pipe.scheduler)
    assert scheduler.config.get("timestep_spacing") == {"zero": "trailing", "flow": None}.get(name, "leading")
    atomdiff.load_atoms(tiny_pipe, path)  # warns of nothing
    expected = generate(tiny_pipe, ["a photo of sks mug"], seeds=[0], progress=False, **QUICK)[0]
    assert abs(picture(config, "a photo of sks mug") - pixels(expected)).max() <= 1
    told = capsys.readouterr().out
    if name in ("same", "plain"):
        assert told == "" and tiny_pipe.scheduler is base
    else:
        assert f"{name}: generated with a {type(scheduler).__name__} with prediction_type=" in told
        assert "the base has a DDIMScheduler with prediction_type=v_prediction, rescale_betas_zero_snr=False\n" in told
        assert abs(picture(config, "a photo of sks mug") - drawn_by(tiny_pipe, base)).max() > 2


def drawn_by(pipe, scheduler):
    pipe.scheduler = scheduler
    return pixels(generate(pipe, ["a photo of sks mug"], seeds=[0], progress=False, **QUICK)[0])


@pytest.mark.filterwarnings("ignore:.*without its trigger phrase")
def test_each_prompt_is_generated_as_its_own_concepts_were_trained(config, trained, used, tiny_pipe, capsys):
    names = {"a cat": None, "sks mug <atoms:noise>": "noise", "a mug <atoms:zero>": "zero", "a mug <atoms:plain>": None}
    names |= {"a robot <atoms:noise:0.5>": "noise", "a mug <atoms:noise:0>": None}
    config = replace(config, library=str(trained[0]), prompts=tuple(names), seeds=(0,), sample_batch_size=6)
    save_samples(config)
    said = [schedule_settings(scheduler) for scheduler in used]
    assert len(said) == 3 and sum(each == schedule_settings(tiny_pipe.scheduler) for each in said) == 1
    shown = capsys.readouterr().out.splitlines()
    assert sorted(line.partition(":")[0] for line in shown) == ["noise", "zero"]
    assert abs(picture(config, "a cat") - alone(tiny_pipe, trained[0], "a cat", {})).max() <= 1
    set_training_scheduler(trained[1]["noise"], tiny_pipe)
    expected = alone(tiny_pipe, trained[0], "a robot", {"noise": 0.5})
    assert abs(picture(config, "a robot <atoms:noise:0.5>") - expected).max() <= 1


@pytest.mark.filterwarnings("ignore:.*without its trigger phrase")
def test_a_prompt_with_concepts_of_two_schedulers_is_refused_unless_one_is_chosen(config, trained, used):
    prompts = ("a cat", "a sks mug <atoms:zero>")
    both = {"library": str(trained[0]), "concepts": (str(trained[0] / f"plain{CONCEPT_SUFFIX}"),), "seeds": (0,)}
    config = replace(config, prompts=prompts, **both, trigger_words=("zwx",))
    with pytest.raises(
        UserError, match=r"the prompt 'a sks mug <atoms:zero>': .*'plain' for a DDIM.*'zero' for a DDIM"
    ):
        save_samples(config)
    assert not used  # before anything is drawn
    save_samples(replace(config, rescale_betas_zero_snr=False))
    assert [scheduler.config.get("rescale_betas_zero_snr") for scheduler in used] == [False]


@pytest.mark.parametrize(
    ("name", "asked", "settings"),
    [
        ("noise", {"rescale_betas_zero_snr": False}, {"prediction_type": "epsilon", "rescale_betas_zero_snr": False}),
        ("flow", {"prediction_type": "flow"}, {"prediction_type": "flow", "flow_shift": 3.0}),
    ],
)
def test_what_is_not_chosen_stays_as_trained(config, trained, used, name, asked, settings):
    path = str(trained[0] / f"{name}{CONCEPT_SUFFIX}")
    save_samples(replace(config, prompts=("a sks mug",), seeds=(0,), concepts=(path,), **asked))
    assert [schedule_settings(scheduler) for scheduler in used] == [settings]


def test_a_choice_against_the_training_is_reported_in_a_line(config, trained, used, capsys):
    config = replace(config, prompts=("a sks mug",), seeds=(0,), concepts=(str(trained[0] / "lora"),))
    save_samples(replace(config, prediction_type="v_prediction"))  # warns of nothing
    told = capsys.readouterr().out
    chosen = "lora: generated with a DDIMScheduler with prediction_type=v_prediction, rescale_betas_zero_snr=False"
    assert told == f"{chosen}; trained for a DDIMScheduler with prediction_type=epsilon, rescale_betas_zero_snr=False\n"


def test_a_lora_that_does_not_tell_its_training_is_generated_with_any_concept(config, trained, used, tmp_path):
    foreign = tmp_path / "foreign"
    shutil.copytree(trained[0] / "lora", foreign, ignore=shutil.ignore_patterns("learned_embeds*"))
    weights = foreign / "adapter_model.safetensors"
    save_file(load_file(weights), weights)
    concepts = (str(foreign), str(trained[0] / f"flow{CONCEPT_SUFFIX}"))
    save_samples(replace(config, prompts=("a sks mug",), seeds=(0,), concepts=concepts))
    assert [schedule_settings(scheduler)["prediction_type"] for scheduler in used] == ["flow"]


def test_what_is_predicted_can_be_chosen(config, used, tiny_pipe, capsys):
    config = replace(config, prompts=("a mug",), seeds=(0,))
    plain = (save_samples(config), picture(config, "a mug"))[1]
    chosen = replace(config, prediction_type="epsilon")
    save_samples(chosen)
    assert [scheduler.config.prediction_type for scheduler in used] == ["v_prediction", "epsilon"]
    assert abs(picture(chosen, "a mug") - plain).max() > 2
    assert "the base: generated with a DDIMScheduler with prediction_type=epsilon" in capsys.readouterr().out
    save_samples(config)  # drawn again
    assert len(used) == 3 and np.array_equal(picture(config, "a mug"), plain)
    with pytest.raises(UserError, match="prediction_type='noise': expected one of"):
        replace(config, prediction_type="noise")
    with pytest.raises(UserError, match="epsilon does not determine the image"):
        save_samples(replace(chosen, rescale_betas_zero_snr=True))
