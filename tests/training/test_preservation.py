"""Output preservation: which prompts stay, what the base predicts for them, and that concepts change less."""

import copy
import dataclasses
import json

import pytest
import torch

from atomdiff import load_atoms, unload_atoms
from atomdiff.training.config import Subject
from atomdiff.training.dataset import DreamBoothDataset
from atomdiff.training.dreambooth import batch_loss, train
from atomdiff.training.launch import start_accelerator
from atomdiff.training.model import TrainingModel, build_training_model
from atomdiff.training.noise import ForwardDiffusion
from atomdiff.training.objective import preservation_loss
from atomdiff.training.preservation import other_prompts, preservation_prompt
from atomdiff.training.run import build_run
from atomdiff.tuner import AtomConfig
from atomdiff.tuner.adapters_off import adapters_off
from atomdiff.tuner.read_config import read_adapter
from atomdiff.utils.errors import UserError
from atomdiff.utils.tensor_cache import DiskCache
from tests.helpers import concept_bytes, predict

MUG = Subject(instance_data_dir="photos/mug", class_name="mug", trigger_word="sks")
OWL = Subject(instance_data_dir="photos/owl", class_name="owl", trigger_word="ohwx")


@pytest.mark.parametrize(
    ("prompt", "preserved"),
    [
        ("a photo of sks mug", "a photo of a mug"),
        ("a photo of ohwx owl", "a photo of an owl"),
        ("a photo of SKS mug on a table", "a photo of a mug on a table"),
        ("a sks mug", "a mug"),
        ("sks on a table", "mug on a table"),
        ("sks mug, table", "mug , table"),
        ("a mug beside sks", "a mug beside a mug"),
        ("a sks mug and a ohwx owl", "a mug and an owl"),
        ("a sks mug, a sksy mug", "a mug , a sksy mug"),
    ],
)
def test_the_class_takes_the_place_of_the_trigger_word(prompt, preserved):
    assert preservation_prompt("class", [MUG, OWL], prompt) == preserved
    assert preservation_prompt("blank", [MUG, OWL], prompt) == ""


def test_a_prompt_without_a_trigger_word_cannot_change_and_stay(config, teapot_images):
    with pytest.raises(UserError, match="found the prompt 'a mug': expected 'sks' or 'ohwx' in it"):
        preservation_prompt("class", [MUG, OWL], "a mug")
    assert preservation_prompt("blank", [MUG, OWL], "a mug") == ""
    next(teapot_images.glob("*.png")).with_suffix(".txt").write_text("a blue teapot")
    with pytest.raises(UserError, match="found the prompt 'a blue teapot'"):
        train(dataclasses.replace(config, preservation="class"))


@pytest.mark.parametrize(
    ("subjects", "prompt", "word"),
    [
        ([("mug", "mug")], "a photo of mug", "mug"),
        ([("mug", "coffee mug")], "a photo of mug coffee mug", "mug"),
        ([("mug", "cup"), ("sks", "coffee Mug")], "a sks coffee Mug", "mug"),
    ],
)
def test_no_trigger_word_is_left_in_what_stays(subjects, prompt, word):
    listed = [Subject(instance_data_dir=name, class_name=name, trigger_word=word) for word, name in subjects]
    with pytest.raises(UserError, match=f"which has '{word}' in it; choose a trigger word that is in no class_name"):
        preservation_prompt("class", listed, prompt)
    assert preservation_prompt("blank", listed, prompt) == ""


def test_the_empty_prompt_cannot_stay_and_show_the_subject():
    with pytest.raises(
        UserError, match="preservation='blank': found the prompt '': expected 'sks' in it.*as they are$"
    ):
        preservation_prompt("blank", [MUG], "")


def test_the_loss_is_a_weighted_mean_over_samples():
    prediction, base = torch.randn(2, 2, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    errors = (prediction - base).square()
    expected = (2 * errors[0].mean() + 3 * errors[1].mean()) / 2
    torch.testing.assert_close(preservation_loss(prediction, base, torch.tensor([2.0, 3.0])), expected)


def test_other_prompts_have_no_trigger_word():
    classes = ("a photo of a mug", "a photo of an owl")
    found = other_prompts([MUG, OWL])
    assert found[:3] == (*classes, "") and len(found) == 5
    assert other_prompts([OWL, OWL, dataclasses.replace(MUG, class_name=None)]) == (classes[1], *found[2:])
    assert other_prompts([dataclasses.replace(MUG, trigger_word="dog")]) == (classes[0], "", found[4])
    assert other_prompts([dataclasses.replace(MUG, trigger_word="mug")]) == found[2:]
    many = [dataclasses.replace(MUG, class_name=f"thing{number}") for number in range(9)]
    assert len(other_prompts(many)) == 4 + 3


@pytest.mark.parametrize("method", ["atoms", "lora", "oft", "full"])
@pytest.mark.parametrize("kind", ["tiny_pipe", "tiny_xl_pipe"])
@pytest.mark.parametrize("text", [False, True])
def test_the_base_predicts_what_it_did_whatever_is_trained(train_config, method, kind, text, adapter_file, request):
    pipe = request.getfixturevalue(kind)
    config = train_config(train_text_encoder=text, preservation="class")
    adapter, prompts = read_adapter(adapter_file(method)), ("a photo of sks teapot", "a photo of teapot")
    on_text = None if method == "full" else AtomConfig(target_modules="attention")
    model = build_training_model(config, pipe, adapter, prompts, on_text, preserved=[1])
    random = torch.Generator().manual_seed(0)
    inputs = torch.randn(2, 4, 8, 8, generator=random), torch.tensor([3, 500]), [1, 1], torch.full((2, 6), 32.0)
    model.eval()
    with torch.no_grad():
        expected = model(*inputs)
        for parameter in model.trained_parameters().values():
            parameter += 0.1 * torch.randn(parameter.shape, generator=random)
        assert (model(*inputs) - expected).abs().max() > 1e-3
        torch.testing.assert_close(model.predict_base(*inputs), expected, rtol=0, atol=1e-6)
        assert (model(*inputs) - expected).abs().max() > 1e-3


def test_adapters_are_off_for_a_while_and_nothing_else_changes(tiny_pipe, adapter_file):
    tiny_pipe.unet.requires_grad_(False)
    tiny_pipe.unet.add_adapter(read_adapter(adapter_file("lora")), "one")
    layers = [module for module in tiny_pipe.unet.modules() if hasattr(module, "_disable_adapters")]
    layers[0]._disable_adapters = True  # as somebody else left it
    before = [(name, each.requires_grad) for name, each in tiny_pipe.unet.named_parameters()]
    with pytest.raises(KeyError), adapters_off(tiny_pipe.unet):
        assert all(layer.disable_adapters for layer in layers)
        raise KeyError
    assert [layer.disable_adapters for layer in layers] == [True] + [False] * (len(layers) - 1)
    assert [(name, each.requires_grad) for name, each in tiny_pipe.unet.named_parameters()] == before


@pytest.mark.slow
@pytest.mark.parametrize("method", ["atoms", "lora", "oft"])
@pytest.mark.parametrize(("preservation", "prompt"), [("class", "a photo of teapot"), ("blank", "")])
def test_what_is_preserved_changes_less(config, method, preservation, prompt, adapter_file, tiny_pipe, tmp_path):
    config = dataclasses.replace(config, adapter=adapter_file(method), max_train_steps=30, learning_rate=0.02)
    changes = {}
    for kind in ("none", preservation):
        path = train(dataclasses.replace(config, preservation=kind, output_dir=str(tmp_path / kind)))
        base = predict(tiny_pipe, prompt)
        load_atoms(tiny_pipe, path, adapter_name=kind)
        changes[kind] = (predict(tiny_pipe, prompt) - base).square().mean().item()
        unload_atoms(tiny_pipe)
    assert changes[preservation] < 0.7 * changes["none"]


@pytest.mark.slow
def test_full_tuning_keeps_its_class_too(config, adapter_file, tiny_pipe, tmp_path):
    config = dataclasses.replace(config, adapter="full", max_train_steps=30, learning_rate=1e-3)
    base, changes = predict(tiny_pipe, "a photo of teapot"), {}
    for kind in ("none", "class"):
        path = train(dataclasses.replace(config, preservation=kind, output_dir=str(tmp_path / kind)))
        tuned = type(tiny_pipe).from_pretrained(path)
        changes[kind] = (predict(tuned, "a photo of teapot") - base).square().mean().item()
    assert changes["class"] < 0.7 * changes["none"]


@pytest.mark.slow
def test_it_goes_with_everything_and_gives_the_same_bytes(config, tmp_path, half_precision):
    config = dataclasses.replace(
        config,
        preservation="class",
        preservation_weight=2.0,
        with_prior_preservation=True,
        num_class_images=2,
        caption_dropout=0.3,
        train_text_encoder=True,
        snr_gamma=5.0,
        gradient_checkpointing=True,
        gradient_accumulation_steps=2,
        mixed_precision=half_precision,
    )
    files = [train(dataclasses.replace(config, output_dir=str(tmp_path / name))) for name in ("one", "two")]
    assert concept_bytes(files[0]) == concept_bytes(files[1])
    weaker = train(dataclasses.replace(config, preservation_weight=1.0, output_dir=str(tmp_path / "weaker")))
    assert concept_bytes(weaker) != concept_bytes(files[0])
    cached = dataclasses.replace(config, cache_dir=str(tmp_path / "cache"))
    for name in ("three", "four"):
        again = train(dataclasses.replace(cached, output_dir=str(tmp_path / name)))
        assert concept_bytes(again) == concept_bytes(files[0])
    assert json.loads(json.dumps(config.snapshot()))["preservation"] == "class"


def test_without_it_the_base_is_not_asked(config, monkeypatch):
    def refuse(*_):
        raise AssertionError("asked")

    monkeypatch.setattr(TrainingModel, "predict_base", refuse)
    train(dataclasses.replace(config, max_train_steps=1))
    with pytest.raises(AssertionError, match="asked"):
        train(dataclasses.replace(config, max_train_steps=1, preservation="blank"))


@pytest.mark.parametrize(("kind", "preservation"), [("tiny_pipe", "class"), ("tiny_xl_pipe", "blank")])
def test_the_loss_of_a_batch_has_three_parts(config, kind, preservation, recorded, tmp_path, request):
    request.getfixturevalue(kind).save_pretrained(tmp_path / "base")
    fields = {"snr_gamma": 0.01, "with_prior_preservation": True, "num_class_images": 2, "prior_loss_weight": 0.7}
    fields |= {"preservation": preservation, "preservation_weight": 0.3, "guidance_scale": 1.0}
    config = dataclasses.replace(config, pretrained_model_name_or_path=str(tmp_path / "base"), **fields)
    run = build_run(config, start_accelerator(config), AtomConfig(), None)
    for parameter in run.trainable.values():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    batches, noised = recorded(DreamBoothDataset), recorded(ForwardDiffusion)
    loss = batch_loss(run, 0)
    ((_, batch),), ((_, inputs),) = batches, noised
    stays = {"class": "a photo of a teapot", "blank": ""}[preservation]
    kept = (inputs.latents[:2], inputs.timesteps[:2], [run.dataset.prompts.index(stays)] * 2, batch.time_ids[:2])
    with torch.no_grad():
        prediction = run.model(inputs.latents, inputs.timesteps, batch.prompts, batch.time_ids)
        change = run.model(*kept) - run.model.predict_base(*kept)
    losses = (prediction - inputs.target).square().mean(dim=(1, 2, 3)) * inputs.weights
    changes = change.square().mean(dim=(1, 2, 3)) * inputs.weights[:2]
    assert changes.min() > 1e-6 and len(inputs.weights.unique()) == 4
    expected = losses[:2].mean() + 0.7 * losses[2:].mean() + 0.3 * changes.mean()
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=0)


def test_what_the_text_encoders_say_is_cached_by_their_weights(train_config, tiny_pipe, tmp_path):
    config, cache = train_config(train_text_encoder=True), DiskCache(tmp_path / "cache")
    other = type(tiny_pipe)(**copy.deepcopy(tiny_pipe.components), requires_safety_checker=False)
    other.text_encoder.get_input_embeddings().weight.data *= 2
    embeds = []
    for pipe in (tiny_pipe, other):
        prompts, on_text = ("a photo of sks teapot", "a photo of a teapot"), AtomConfig(target_modules="attention")
        model = build_training_model(config, pipe, AtomConfig(), prompts, on_text, cache, preserved=[1])
        embeds.append(model.base_prompt_embeds[1].prompt_embeds)
    assert (embeds[0] - embeds[1]).abs().max() > 1e-3
