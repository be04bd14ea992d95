"""Runs in which more than the UNet learns, end to end: words of several vectors, text encoders, SDXL's both."""

import dataclasses
import json
import shutil
from contextlib import closing

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch.nn.parallel import DistributedDataParallel

from atomdiff.bases.sdxl import StableDiffusionXL
from atomdiff.cli.summary import describe
from atomdiff.concepts.concept_file import read_concept_file
from atomdiff.pipelines.load import load_atoms, unload_atoms
from atomdiff.pipelines.save import save_atoms
from atomdiff.sampling.config import SampleConfig
from atomdiff.sampling.sample import save_samples
from atomdiff.training import dreambooth, saving
from atomdiff.training.dreambooth import train
from atomdiff.training.model import build_training_model
from atomdiff.training.training_images import check_trigger_words
from atomdiff.tuner import AtomConfig
from atomdiff.utils.errors import UserError
from atomdiff.utils.untrusted import MAX_TRIGGER_WORDS
from tests.helpers import assert_unchanged, concept_bytes, generate_image, snapshot, write_images

pytestmark = pytest.mark.slow

PROMPT = "a photo of a sks mug, red sks"
FOLDERS = {"sd1": "tiny_pipe_folder", "sd2": "tiny_sd2_pipe_folder", "sdxl": "tiny_xl_pipe_folder"}
LORA = {"peft_type": "LORA", "r": 2, "target_modules": ["to_q", "to_v"]}
TEXT_LORA = {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj", "fc1"]}


@pytest.fixture
def images(tmp_path):
    return write_images(tmp_path / "mug", widths=(32, 32))


@pytest.fixture
def config_for(train_config, images, request):
    def make(base="sd1", **fields):
        usual = {"pretrained_model_name_or_path": str(request.getfixturevalue(FOLDERS[base]))}
        usual |= {"instance_data_dir": str(images), "class_name": "mug", "train_batch_size": 1}
        usual |= {"learning_rate": 0.05, "token_learning_rate": 0.05, "num_inference_steps": 1}
        return train_config(**usual | fields)

    return make


@pytest.fixture
def in_training(monkeypatch, tmp_path):
    """Generate an image, and save every bit of the concept, at the end of each run before it is saved as usual."""
    seen = {}
    usual = saving.save_trained

    def look(pipe, adapter, path, **metadata):
        pipe.unet.eval()
        seen["image"] = generate_image(pipe, PROMPT)
        if adapter is not None:
            seen["exact"] = save_atoms(pipe, tmp_path / "exact.atoms.safetensors", dtype=torch.float32)
        usual(pipe, adapter, path, **metadata)

    monkeypatch.setattr(saving, "save_trained", look)
    return seen


def open_base(config):
    pipe = DiffusionPipeline.from_pretrained(config.pretrained_model_name_or_path, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def file_of(tmp_path, name, fields):
    file = tmp_path / f"{name}.json"
    file.write_text(json.dumps(fields))
    return str(file)


@pytest.mark.parametrize("base", FOLDERS)
@pytest.mark.parametrize("text", [False, True])
@pytest.mark.parametrize("method", ["atoms", "lora"])
def test_images_in_training_are_those_of_the_file(config_for, in_training, tmp_path, base, text, method):
    fields = {} if method == "atoms" else {"adapter": file_of(tmp_path, "lora", LORA)}
    if text and method == "lora":
        fields["text_encoder_adapter"] = file_of(tmp_path, "text", TEXT_LORA)
    config = config_for(base, num_vectors=3, train_text_encoder=text, **fields)
    written = train(config)
    pipe = open_base(config)
    before, plain = snapshot(pipe), generate_image(pipe, PROMPT)
    name = load_atoms(pipe, in_training["exact"])
    np.testing.assert_allclose(generate_image(pipe, PROMPT), in_training["image"], atol=1e-5)
    assert np.abs(in_training["image"] - plain).max() > 1e-2
    encoders = {"text_encoder", "text_encoder_2"} & pipe.components.keys()
    assert len(encoders) == (2 if base == "sdxl" else 1)
    if text:
        assert any(".base_layer." in name for name, _ in pipe.text_encoder.named_parameters())
    unload_atoms(pipe, name)
    assert_unchanged(pipe, before)
    assert np.array_equal(generate_image(pipe, PROMPT), plain)

    load_atoms(pipe, written, trigger_word="ohwx")
    renamed = generate_image(pipe, PROMPT.replace("sks", "ohwx"))
    np.testing.assert_allclose(renamed, in_training["image"], atol=2e-2)  # float16
    if method == "atoms":
        concept = read_concept_file(written)
        assert {word: set(vectors) for word, vectors in concept.tokens.items()} == dict.fromkeys(
            ("sks", "sks_1", "sks_2"), encoders
        )
        parts = {module.partition(".")[0] for module in concept.layers}
        assert parts == ({"unet", *encoders} if text else {"unet"})
        if text:
            adapted = {kind for tensors in concept.layers.values() for kind in tensors if kind.endswith("_delta")}
            assert "channel_delta" in adapted


@pytest.mark.parametrize("text", [False, True])
def test_a_token_is_trained_without_an_adapter_of_the_unet(config_for, in_training, tmp_path, text):
    config = config_for("sdxl", adapter="none", num_vectors=2, train_text_encoder=text, validation_steps=3)
    written = train(config)
    pipe = open_base(config)
    before, plain = snapshot(pipe), generate_image(pipe, PROMPT)
    name = load_atoms(pipe, written)
    np.testing.assert_allclose(generate_image(pipe, PROMPT), in_training["image"], atol=2e-2)  # float16
    assert np.abs(in_training["image"] - plain).max() > 5e-2
    parts = {module.partition(".")[0] for module in read_concept_file(written).layers}
    assert parts == ({"text_encoder", "text_encoder_2"} if text else set())
    assert ("token embeddings" in describe(written)) != text
    unload_atoms(pipe, name)
    assert_unchanged(pipe, before)


VERA = {"peft_type": "VERA", "r": 4, "save_projection": False}
TINY = {"peft_type": "TINYLORA", "r": 2, "u": 8}


@pytest.mark.filterwarnings("ignore:Specified to not")
@pytest.mark.parametrize("fields", [VERA, TINY], ids=["vera", "tinylora"])
def test_methods_whose_layers_share_tensors_train_text_encoders(config_for, in_training, tmp_path, fields):
    targets = {"adapter": ["to_q", "to_v"], "text_encoder_adapter": ["q_proj", "v_proj"]}
    files = {name: file_of(tmp_path, name, {**fields, "target_modules": each}) for name, each in targets.items()}
    config = config_for("sdxl", train_text_encoder=True, **files)
    written = train(config)
    assert {folder.name for folder in written.iterdir() if folder.is_dir()} == {"text_encoder", "text_encoder_2"}
    pipe = open_base(config)
    before, plain = snapshot(pipe), generate_image(pipe, "a photo of a mug")
    name = load_atoms(pipe, written)
    np.testing.assert_allclose(generate_image(pipe, PROMPT), in_training["image"], atol=1e-5)
    assert np.abs(generate_image(pipe, "a photo of a mug") - plain).max() > 1e-3
    unload_atoms(pipe, name)
    assert_unchanged(pipe, before)


@pytest.mark.parametrize("base", ["sd1", "sdxl"])
@pytest.mark.parametrize("text", [False, True])
def test_full_tuning_saves_words_and_text_encoders(config_for, in_training, base, text):
    config = config_for(base, adapter="full", learning_rate=1e-3, num_vectors=2, train_text_encoder=text)
    tuned = DiffusionPipeline.from_pretrained(train(config), safety_checker=None)
    tuned.set_progress_bar_config(disable=True)
    np.testing.assert_allclose(generate_image(tuned, PROMPT), in_training["image"], atol=1e-5)
    base_pipe = open_base(config)
    for name in ("text_encoder", "text_encoder_2") if base == "sdxl" else ("text_encoder",):
        layer = "encoder.layers.0.self_attn.q_proj.weight"
        pair = [
            next(v for k, v in getattr(p, name).state_dict().items() if k.endswith(layer)) for p in (base_pipe, tuned)
        ]
        assert torch.equal(*pair) != text


def test_sampling_knows_words_of_several_vectors(config_for, in_training, tmp_path):
    config = config_for("sdxl", num_vectors=3)
    train(config)
    settings = {"num_inference_steps": 2, "guidance_scale": 5.0, "height": 32, "width": 32}
    for word in ("sks", "ohwx"):
        folder = save_samples(
            SampleConfig(
                config.pretrained_model_name_or_path,
                str(tmp_path / word),
                concepts=(str(in_training["exact"]),),
                trigger_words=() if word == "sks" else (word,),
                prompts=(PROMPT.replace("sks", word),),
                **settings,
            )
        )
        (file,) = [path for path in folder.rglob("*.png") if path.name != "grid.png"]
        with closing(Image.open(file)) as image:
            pixels = np.asarray(image) / 255
        np.testing.assert_allclose(pixels, in_training["image"], atol=1.01 / 255)


def test_all_words_of_a_shared_file_learn(config_for, images, tmp_path):
    shutil.copytree(images, tmp_path / "cat")
    entries = [
        {"instance_data_dir": str(images), "trigger_word": "sks"},
        {"instance_data_dir": str(tmp_path / "cat"), "trigger_word": "ohwx", "class_name": "cat"},
    ]
    file = tmp_path / "both.yaml"
    file.write_text(json.dumps(entries))
    fields = {"instance_data_dir": None, "concepts_list": str(file), "one_file": True, "train_batch_size": 4}
    moved = read_concept_file(train(config_for(**fields))).tokens
    still = read_concept_file(train(config_for(**fields, token_learning_rate=0.0))).tokens
    assert set(moved) == set(still) == {"sks", "ohwx"}
    assert all((moved[word]["text_encoder"] - still[word]["text_encoder"]).abs().max() > 0.02 for word in moved)


@pytest.fixture
def vectors_by_step(monkeypatch):
    """The words' vectors, and all else that is trained, after every step."""
    seen, usual = [], dreambooth.try_step

    def look(run, step):
        result = usual(run, step)
        trained = {name: parameter.detach().clone() for name, parameter in run.trainable.items()}
        seen.append((trained.pop("token_embeddings.text_encoder"), trained))
        return result

    monkeypatch.setattr(dreambooth, "try_step", look)
    return seen


@pytest.mark.parametrize("text", [False, True])
def test_words_stop_learning_and_all_else_goes_on(config_for, vectors_by_step, text):
    config = config_for(max_train_steps=6, train_text_encoder_ti_frac=0.5, train_text_encoder=text)
    train(config)
    vectors = [vectors for vectors, _ in vectors_by_step]
    assert not torch.equal(vectors[1], vectors[2]) and all(torch.equal(vectors[2], later) for later in vectors[3:])
    before, after = vectors_by_step[2][1], vectors_by_step[5][1]
    parts = {name.partition(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert parts == ({"denoiser", "text_encoders"} if text else {"denoiser"})


@pytest.mark.parametrize(
    ("base", "fields"),
    [
        ("sd1", {"train_text_encoder_ti_frac": 0.5}),
        ("sd1", {"train_text_encoder_ti_frac": 0.75, "with_prior_preservation": True, "num_class_images": 1}),
        ("sdxl", {"num_vectors": 2, "train_text_encoder": True, "text_encoder_lr": 0.01}),
    ],
)
def test_a_resumed_run_gives_the_same_bytes(config_for, base, fields, tmp_path):
    config = config_for(base, max_train_steps=4, checkpointing_steps=3, **fields)
    unbroken = concept_bytes(train(config))
    resumed = dataclasses.replace(config, resume_from_checkpoint="checkpoint-3")
    assert concept_bytes(train(resumed)) == unbroken


def test_text_encoders_have_a_learning_rate_of_their_own(config_for):
    def delta(**fields):
        layers = read_concept_file(train(config_for(train_text_encoder=True, **fields))).layers
        return max(tensors["channel_delta"].abs().max() for name, tensors in layers.items() if name.startswith("text"))

    assert delta(text_encoder_lr=0.0) == 0
    assert delta(text_encoder_lr=0.01) < 0.5 * delta()


def test_gradient_checkpointing_changes_nothing(config_for, tmp_path):
    concepts = []
    for on in (False, True):
        config = config_for(train_text_encoder=True, gradient_checkpointing=on, max_train_steps=1, num_vectors=2)
        concepts.append(read_concept_file(train(config)))
    for name, tensors in concepts[0].layers.items():
        for kind, tensor in tensors.items():
            torch.testing.assert_close(tensor, concepts[1].layers[name][kind], atol=1e-3, rtol=1e-2)


@pytest.mark.parametrize("text", [False, True])
def test_every_process_has_a_gradient_for_every_parameter(tiny_xl_pipe, tmp_path, config_for, text):
    prompts = ("a photo of sks mug", "a photo of a mug")
    config = config_for("sdxl", num_vectors=2, train_text_encoder=text)
    text_adapter = AtomConfig(target_modules="attention")
    concept = build_training_model(config, tiny_xl_pipe, AtomConfig(), prompts, text_adapter)
    torch.distributed.init_process_group("gloo", f"file://{tmp_path / 'store'}", world_size=1, rank=0)
    try:
        model = DistributedDataParallel(concept)
        sizes = torch.tensor([[32.0, 32, 0, 0, 32, 32]])
        for step, number in enumerate((0, 1, 1, 0)):  # it complains of the step before
            if step == 2:
                concept.freeze_token_embeddings()
            model(torch.randn(1, 4, 8, 8), torch.tensor([500]), [number], sizes).square().mean().backward()
        assert all(parameter.grad is not None for parameter in concept.trained_parameters().values())
    finally:
        torch.distributed.destroy_process_group()


def test_prompt_embeds_are_kept_for_a_second_run(config_for, monkeypatch, tmp_path):
    config = config_for("sdxl", train_token=False, cache_dir=str(tmp_path / "kept"))
    first = concept_bytes(train(config))

    def refuse(*_):
        raise AssertionError("encoded again")

    monkeypatch.setattr(StableDiffusionXL, "encode_prompts", refuse)
    assert concept_bytes(train(dataclasses.replace(config, output_dir=str(tmp_path / "again")))) == first


def test_validation_generates_with_what_is_trained(config_for, tmp_path):
    config = config_for("sdxl", train_text_encoder=True, num_vectors=2, validation_steps=3, text_encoder_lr=0.2)
    train(config)
    rows = sorted((tmp_path / "out" / "validation").glob("*.png"))
    first, last = (np.asarray(Image.open(row)).astype(int) for row in rows)
    assert np.abs(first - last).max() > 2


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_vectors": 0}, "num_vectors=0: expected a number of at least 1"),
        ({"num_vectors": MAX_TRIGGER_WORDS + 1}, f"expected at most {MAX_TRIGGER_WORDS} vectors in a concept"),
        ({"num_vectors": 2, "train_token": False}, "num_vectors=2: expected train_token=True"),
        (
            {"train_text_encoder_ti_frac": 1.5},
            "train_text_encoder_ti_frac=1.5: expected a number of at least 0 and",
        ),
        ({"train_text_encoder_ti_frac": 0.5, "train_token": False}, "ti_frac=0.5: expected train_token=True"),
        ({"text_encoder_lr": 0.1}, "text_encoder_lr=0.1: expected train_text_encoder=True"),
        ({"text_encoder_adapter": "full"}, "text_encoder_adapter='full': expected train_text_encoder=True"),
        (
            {"text_encoder_lr": -1.0, "train_text_encoder": True},
            "text_encoder_lr=-1.0: expected a number of at least 0",
        ),
        (
            {"train_text_encoder": True, "text_encoder_adapter": "full"},
            "expected adapters for both the UNet and the text encoders, or full tuning",
        ),
        ({"adapter": "none", "train_token": False}, "adapter='none': trains nothing; expected train_token=True"),
        (
            {"train_text_encoder": True, "text_encoder_adapter": "none"},
            "text_encoder_adapter='none': trains nothing; expected train_text_encoder=False",
        ),
        ({"train_text_encoder": True, "text_encoder_adapter": "no.json"}, "'no.json': no such file"),
    ],
)
def test_mistakes_are_user_errors(config_for, fields, message):
    with pytest.raises(UserError, match=message):
        train(config_for(**fields))


def test_a_word_within_another_cannot_have_several_vectors(config_for, tmp_path, images):
    file = tmp_path / "both.yaml"
    entries = [{"instance_data_dir": str(images / name), "trigger_word": name} for name in ("sks", "sks2")]
    file.write_text(json.dumps(entries))
    fields = {"instance_data_dir": None, "concepts_list": str(file), "one_file": True}
    config_for(**fields)
    with pytest.raises(UserError, match="trigger_word='sks' is part of trigger_word='sks2'"):
        config_for(**fields, num_vectors=2)


def test_a_word_is_named_where_pipelines_see_it(config_for):
    config = config_for()
    pipe = open_base(config)
    check_trigger_words(config, pipe, ["a mug", "a SKS_mug"])
    with pytest.raises(UserError, match="no prompt contains it"):
        check_trigger_words(config, pipe, ["a mug", "asks"])


def test_other_atoms_on_the_text_encoders_are_refused(config_for, tmp_path):
    other = file_of(tmp_path, "other", {"peft_type": "ATOMS", "channel_block": 2, "target_modules": "attention"})
    with pytest.raises(UserError, match="its atoms differ from the UNet's, but a concept file has one AtomConfig"):
        train(config_for(train_text_encoder=True, text_encoder_adapter=other))
