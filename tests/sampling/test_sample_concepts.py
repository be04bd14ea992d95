"""Sampling jobs with concepts: every image is as if it were generated alone."""

import io
import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import atomdiff
from atomdiff.pipelines.loaded_concepts import list_atoms
from atomdiff.pipelines.placeholder_tokens import add_placeholder_token, set_token_embedding, tokens_in
from atomdiff.sampling import adapter_cache, sample
from atomdiff.sampling.config import SampleConfig
from atomdiff.sampling.generate import generate
from atomdiff.sampling.sample import save_samples
from atomdiff.utils.errors import UserError
from atomdiff.utils.hashing import hash_file
from atomdiff.utils.options import parse_config
from tests.helpers import add_adapter
from tests.sampling.helpers import (
    QUICK,
    concepts_in_images,
    generate_alone,
    image_files,
    image_of,
    pixels,
    write_concept,
)

BLOCKS = {"weight": 1.5, "blocks": {"down": 0.5, "up": 0}}


STEPS = {"steps": {0: 1.0, 1: 0.2}}


@pytest.mark.slow
def test_concepts_act_with_their_weights_and_words(config, tiny_pipe, tmp_path):
    first = write_concept(tiny_pipe, tmp_path / "first.atoms.safetensors", 0)
    second = write_concept(tiny_pipe, tmp_path / "second.atoms.safetensors", 1)
    config = replace(config, prompts=("a red cat",), seeds=(0,))

    def generate_job(**changes):
        folder = save_samples(replace(config, **changes))
        return pixels(Image.open(folder / next(iter(image_files(config)))))

    base = generate_job()
    both = {"concepts": (first, second), "trigger_words": ("sks", "zwx")}
    assert np.array_equal(generate_job(**both, weights=(0.0, 0.0)), base)
    one = generate_job(concepts=(first,))
    assert abs(one - base).max() > 2
    assert abs(generate_job(**both, weights=(1.0, 0.0)) - one).max() <= 1
    assert abs(generate_job(**both, weights=(1.0, 0.7)) - one).max() > 2
    assert abs(generate_job(concepts=(first,), weights=(0.5,)) - one).max() > 2
    word = generate_job(concepts=(first,), prompts=("a sks cat",))
    with Image.open(next(Path(config.output_dir).glob("a-sks*"))) as image:
        (concept,) = json.loads(image.text["concepts"])
    assert concept["file"] == "first.atoms.safetensors" and concept["weight"] == 1 and len(concept["sha256"]) == 64
    assert abs(word - one).max() > 0


@pytest.mark.slow
def test_a_concept_trained_again_is_generated_again(config, tiny_pipe, tmp_path):
    path = write_concept(tiny_pipe, tmp_path / "mug.atoms.safetensors", 0)
    config = replace(config, concepts=(path,), seeds=(0,))
    save_samples(config)
    before = image_files(config)
    write_concept(tiny_pipe, tmp_path / "mug.atoms.safetensors", 1)
    save_samples(config)
    assert all(time != before[name] for name, time in image_files(config).items())


def test_concepts_of_a_method_without_weights_are_refused_in_words(config, tiny_pipe, tmp_path):
    from peft import OFTConfig

    tiny_pipe.unet.add_adapter(OFTConfig(target_modules=["to_q"], oft_block_size=8))
    path = str(atomdiff.save_atoms(tiny_pipe, tmp_path / "oft"))
    save_samples(replace(config, concepts=(path,), seeds=(0,)))
    with pytest.raises(UserError, match=r"oft-1.*OFT adapter.*no weight such as 0.5"):
        save_samples(replace(config, concepts=(path,), weights=(0.5,)))


def test_concepts_that_cannot_be_merged_are_generated_all_the_same(config, tiny_pipe, tmp_path):
    from atomdiff.activation_adapters import MonaConfig

    add_adapter(tiny_pipe, "mona", MonaConfig(hidden_size=4))
    path = str(atomdiff.save_atoms(tiny_pipe, tmp_path / "mona", "mona"))
    config = replace(config, concepts=(path,), prompts=("a red cat",), seeds=(0,))
    images = []
    for weight in (0.0, 0.5, 1.0):
        save_samples(replace(config, weights=(weight,)))
        images.append(image_of(config, "a red cat"))
    assert min(abs(one - other).max() for one, other in itertools.combinations(images, 2)) > 2


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*without its trigger phrase")
def test_every_line_uses_its_own_concepts_as_if_it_were_generated_alone(config, tiny_pipe, library):
    lines = {
        "a photo of sks mug": ("a photo of sks mug", {}),
        "a photo of sks mug <atoms:ant>": ("a photo of sks mug", {"ant": 1.0}),
        "a photo of sks mug <lora:bee:0.7>": ("a photo of sks mug", {"bee": 0.7}),
        f"a photo of SKS's mug <atoms:pets/eel:{json.dumps(BLOCKS)}>": ("a photo of sks 's mug", {"pets/eel": BLOCKS}),
        f"a red sks <atoms:cat:{json.dumps(STEPS)}>": ("a red sks", {"cat": STEPS}),
        "a robot <atoms:dog:0.5> <atoms:ant:0.6>": ("a robot", {"dog": 0.5, "ant": 0.6}),
    }
    config = replace(config, library=str(library), prompts=tuple(lines), seeds=(0, 5), sample_batch_size=3)
    save_samples(config)
    for prompt, (text, weights) in lines.items():
        for seed in config.seeds:
            expected = generate_alone(tiny_pipe, library, text, weights, seed)
            assert abs(image_of(config, prompt, seed) - expected).max() <= 1, prompt
            if weights:
                assert abs(expected - generate_alone(tiny_pipe, library, text, {}, seed)).max() > 2, prompt
                plain = dict.fromkeys(weights, 1.0)
                assert (
                    weights == plain or abs(expected - generate_alone(tiny_pipe, library, text, plain, seed)).max() > 1
                )


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2, 8])
def test_the_size_of_batches_changes_nothing(config, tiny_pipe, library, size):
    prompts = tuple(f"sks mug <atoms:{name}>" for name in ("ant", "bee", "cat", "dog", "pets/eel"))
    config = replace(config, library=str(library), prompts=prompts, seeds=(3, 4), sample_batch_size=size)
    save_samples(config)
    for name, prompt in zip(("ant", "bee", "cat", "dog", "pets/eel"), prompts, strict=True):
        assert (
            abs(image_of(config, prompt, 4) - generate_alone(tiny_pipe, library, "sks mug", {name: 1.0}, 4)).max() <= 1
        )


@pytest.mark.slow
def test_negative_prompts_have_the_words_of_their_rows(config, tiny_pipe, library):
    prompts = ("a mug <atoms:ant:0>", "a mug <atoms:bee:0>", "a mug")
    save_samples(replace(config, library=str(library), prompts=prompts, seeds=(0,), negative_prompt="sks mug"))
    for prompt, weights in zip(prompts, ({"ant": 0.0}, {"bee": 0.0}, {}), strict=True):
        expected = generate_alone(tiny_pipe, library, "a mug", weights, negative_prompt="sks mug")
        assert abs(image_of(config, prompt) - expected).max() <= 1
    assert abs(image_of(config, prompts[0]) - image_of(config, prompts[1])).max() > 1


@pytest.mark.slow
def test_images_tell_their_own_concepts_in_the_order_of_the_prompts(config, library):
    prompts = ("sks mug <atoms:bee:0.5>", "a cat", "sks mug <atoms:ant>", "sks cat <atoms:bee:0.5>")
    config = replace(config, library=str(library), prompts=prompts)
    manifest = json.loads((save_samples(config) / "manifest.json").read_text())
    wanted = [(prompt, seed) for prompt in prompts for seed in (0, 5)]
    assert [(image["prompt"], image["seed"]) for image in manifest["images"]] == wanted
    assert "concepts" not in manifest["settings"] and manifest["settings"]["num_inference_steps"] == "2"
    concepts = {image["prompt"]: json.loads(image["concepts"]) for image in manifest["images"]}
    assert concepts == concepts_in_images(config)
    assert concepts["a cat"] == [] and concepts[prompts[0]] == concepts[prompts[3]]
    ((bee,), (ant,)) = concepts[prompts[0]], concepts[prompts[2]]
    assert (bee["file"], bee["weight"], ant["weight"]) == ("bee.atoms.safetensors", 0.5, 1.0)
    assert ant["sha256"] == hash_file(library / "ant.atoms.safetensors") != bee["sha256"]
    assert all("atoms-bee-0-5" in image["file"] for image in manifest["images"] if "bee" in image["prompt"])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*without its trigger phrase")
def test_only_images_of_a_changed_concept_are_generated_again(config, tiny_pipe, library, loads):
    prompts = ("sks mug <atoms:bee>", "sks mug", "sks mug <atoms:ant>", "a cat <atoms:bee> <atoms:ant>")
    config = replace(config, library=str(library), prompts=prompts, seeds=(0,))
    folder = save_samples(config)
    before = image_files(config)
    save_samples(config)
    assert image_files(config) == before and len(loads) == 1
    write_concept(tiny_pipe, library / "ant.atoms.safetensors", 9)
    lost = next(name for name in before if name.startswith("sks-mug-atoms-bee"))
    content = (folder / lost).read_bytes()
    (folder / lost).unlink()
    save_samples(config)
    again = {name for name, time in image_files(config).items() if before.get(name) != time}
    assert again == {name for name in before if "ant" in name} | {lost} and len(again) == 3
    assert abs(pixels(Image.open(folder / lost)) - pixels(Image.open(io.BytesIO(content)))).max() <= 1
    expected = generate_alone(tiny_pipe, library, "sks mug", {"ant": 1.0})
    assert abs(image_of(config, "sks mug <atoms:ant>") - expected).max() <= 1


@pytest.mark.slow
def test_the_pipeline_holds_few_concepts_however_many_a_job_has(config, tiny_pipe, library, monkeypatch):
    loaded, generate_each = [], sample.generate_each
    monkeypatch.setattr(adapter_cache, "MAX_LOADED", 2)

    def counted(pipe, *args, **settings):
        loaded.append((len(list_atoms(pipe)), len(tokens_in(pipe))))
        return generate_each(pipe, *args, **settings)

    monkeypatch.setattr(sample, "generate_each", counted)
    prompts = tuple(
        f"sks mug <atoms:{name}>" for name in ("ant", "bee", "cat", "dog", "pets/eel", "ant:0.5", "cat:0.5")
    )
    config = replace(config, library=str(library), prompts=prompts, seeds=(0,), sample_batch_size=1)
    save_samples(config)
    assert loaded == [(1, 1)] * 2 + [(2, 2)] * 5
    for name in ("ant", "dog", "pets/eel"):
        expected = generate_alone(tiny_pipe, library, "sks mug", {name: 1.0})
        assert abs(image_of(config, f"sks mug <atoms:{name}>") - expected).max() <= 1
    loaded.clear()
    save_samples(replace(config, output_dir=f"{config.output_dir}2", sample_batch_size=5))
    assert loaded == [(3, 3), (2, 3)]  # a batch with ant, bee and cat needs more


@pytest.mark.parametrize("prompts", [("a cat", "a mug"), ("sks cat <atoms:ant>", "sks mug <atoms:ant>")])
def test_lines_that_use_the_same_are_generated_from_merged_weights(config, library, monkeypatch, prompts):
    monkeypatch.setattr(adapter_cache, "mixed_batch", None)
    save_samples(replace(config, library=str(library), prompts=prompts))
    assert len(image_files(config)) == 4


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*without its trigger phrase")
def test_what_all_lines_use_goes_with_what_they_name_and_a_tag_changes_its_weight(config, tiny_pipe, library):
    own = str(library / "cat.atoms.safetensors")
    prompts = ("a cat", "a cat <atoms:ant:0.5>", "a cat <atoms:cat:0>")
    config = replace(config, concepts=(own,), weights=(0.7,), library=str(library), prompts=prompts, seeds=(0,))
    save_samples(config)
    for prompt, weights in zip(prompts, ({"cat": 0.7}, {"cat": 0.7, "ant": 0.5}, {}), strict=True):
        assert abs(image_of(config, prompt) - generate_alone(tiny_pipe, library, "a cat", weights)).max() <= 1
    assert [concept["weight"] for concept in concepts_in_images(config)["a cat <atoms:ant:0.5>"]] == [0.7, 0.5]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*without its trigger phrase")
def test_other_methods_are_used_beside_a_library_without_mixing(config, tiny_pipe, library, tmp_path, monkeypatch):
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
        assert abs(image_of(config, prompt) - expected).max() <= 1
    with pytest.raises(UserError, match="lora is not an atom concept: only those can be weighted by block and step"):
        save_samples(replace(config, weights=(STEPS,)))


def test_a_concept_of_words_alone_is_used(config, tiny_pipe, tmp_path):
    add_placeholder_token(tiny_pipe, "zwx")
    set_token_embedding(tiny_pipe, "zwx", {"text_encoder": torch.linspace(-1, 1, 32)})
    (tmp_path / "library").mkdir()
    path = atomdiff.save_atoms(tiny_pipe, tmp_path / "library" / "word.atoms.safetensors", dtype=torch.float32)
    expected = pixels(generate(tiny_pipe, ["a zwx mug"], seeds=[0], progress=False, **QUICK)[0])
    config = replace(config, library=str(path.parent), prompts=("a zwx mug <atoms:word>", "a zwx mug"), seeds=(0,))
    save_samples(config)
    assert abs(image_of(config, "a zwx mug <atoms:word>") - expected).max() <= 1
    assert abs(image_of(config, "a zwx mug") - expected).max() > 2


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
    assert not Path(config.output_dir).exists() and not loads


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


@pytest.mark.slow
def test_the_command_line_takes_weights_by_block_and_step(config, tiny_pipe, library, tmp_path):
    concept, other = (str(library / f"{name}.atoms.safetensors") for name in ("ant", "bee"))
    options = ["--pretrained_model_name_or_path", config.pretrained_model_name_or_path, "--prompts", "a mug"]
    options += ["--output_dir", config.output_dir, "--num_inference_steps", "2", "--guidance_scale", "3"]
    given = ["--concepts", concept, other, "--weights", "0.8", json.dumps({**BLOCKS, **STEPS})]
    parsed = parse_config(SampleConfig, [*options, *given])
    assert parsed.weights == (0.8, {**BLOCKS, "steps": {"0": 1.0, "1": 0.2}})
    (tmp_path / "job.yaml").write_text("weights: [1, {steps: {0: 1, 1: 0.2}}]\n")
    from_file = parse_config(SampleConfig, [*options, *given[:3], "--config", str(tmp_path / "job.yaml")])
    assert from_file.weights == (1.0, {"steps": {0: 1, 1: 0.2}})
    save_samples(parsed)
    expected = generate_alone(tiny_pipe, library, "a mug", {"ant": 0.8, "bee": {**BLOCKS, **STEPS}})
    assert abs(image_of(parsed, "a mug") - expected).max() <= 1
    assert abs(expected - generate_alone(tiny_pipe, library, "a mug", {"ant": 0.8, "bee": BLOCKS})).max() > 1
    assert [concept["weight"] for concept in concepts_in_images(parsed)["a mug"]] == [
        0.8,
        {"weight": 1.5, "blocks": {"down_blocks": 0.5, "up_blocks": 0.0}, "steps": {"0.0": 1.0, "1.0": 0.2}},
    ]


@pytest.mark.slow
def test_equal_weights_are_the_same_image_and_numbers_are_reported_as_ever(config, library, loads):
    path = library / "ant.atoms.safetensors"
    config = replace(config, concepts=(str(path),), weights=(1,), seeds=(0,))
    save_samples(config)
    with Image.open(Path(config.output_dir) / next(iter(image_files(config)))) as image:
        digest = hash_file(path)
        assert image.text["concepts"] == (
            f'[{{"file": "ant.atoms.safetensors", "sha256": "{digest}", "weight": 1.0, "trigger_word": null}}]'
        )
    before = image_files(config)
    save_samples(replace(config, weights=({"weight": 1.0, "blocks": {}},)))
    assert image_files(config) == before and len(loads) == 1
    save_samples(replace(config, weights=({"blocks": {"down": 0}},)))
    assert len(loads) == 2
    save_samples(replace(config, weights=({"weight": 1, "blocks": {"down_blocks": 0.0}},)))
    assert len(loads) == 2
