"""The joint denoiser: predictions and gradients of several models together and alone."""

import dataclasses

import pytest
import torch

from atomdiff.training.batch_loss import Samples
from atomdiff.training.joint_denoiser import JointDenoiser
from atomdiff.training.model import build_training_model
from atomdiff.tuner import AtomConfig
from atomdiff.tuner.read_config import read_adapter
from tests.tiny_models import fresh_copy

PROMPTS = ("a photo of sks mug", "a photo of a mug")
EXPERIMENTS = "configs/experiments"
METHODS = {
    "sparse": AtomConfig(target_modules=["conv_in"], basis="sparse"),
    "recursion": AtomConfig(target_modules=["conv1", "to_k"], recursion=2),
    "shared": AtomConfig(target_modules=["conv1"], basis="dct", share="kind", share_count=2),
    "adaptive": AtomConfig(target_modules=["conv1"], select="adaptive"),
    "LORA": f"{EXPERIMENTS}/lora/conv_r4/adapter.json",
    **{
        name: f"{EXPERIMENTS}/{name.lower()}/default/adapter.json"
        for name in ("LOHA", "LOKR", "OFT", "IA3", "LN_TUNING")
    },
}


def build(config, template, adapter, seed):
    """A training model on a pipeline of its own, whose parameters are random."""
    pipe = fresh_copy(template, **template_options(template))
    model = build_training_model(config, pipe, adapter, PROMPTS, preserved=[1])
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.trained_parameters().values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def template_options(template):
    return {"add_watermarker": False} if "XL" in type(template).__name__ else {"requires_safety_checker": False}


def draw(count, seed):
    generator = torch.Generator().manual_seed(seed)
    timesteps = torch.randint(0, 1000, (count,), generator=generator)
    time_ids = torch.tensor([[32.0, 32, 0, seed, 32, 32]] * count)
    return Samples(torch.randn(count, 4, 8, 8, generator=generator), timesteps, [0, 1, 0][:count], time_ids)


def gradients(model):
    found = {name: p.grad.clone() for name, p in model.trained_parameters().items() if p.grad is not None}
    model.zero_grad()
    return found


def compare(models, counts=(2, 3)):
    """Check that each model predicts, and learns, together with the others what it does alone."""
    parts = [draw(count, seed) for seed, count in enumerate(counts)]
    alone = []
    for model, part in zip(models, parts, strict=True):
        prediction = model(part.latents, part.timesteps, part.prompts, part.time_ids)
        prediction.square().mean().backward()
        alone.append((prediction.detach(), gradients(model)))
    predictions = JointDenoiser(models).predict(list(enumerate(parts)))
    torch.stack([each.square().mean() for each in predictions]).sum().backward()
    for model, prediction, (expected, of_model) in zip(models, predictions, alone, strict=True):
        torch.testing.assert_close(prediction, expected, atol=1e-5, rtol=1e-5)
        found = gradients(model)
        assert found.keys() == of_model.keys() and found
        for name, gradient in of_model.items():
            torch.testing.assert_close(found[name], gradient, atol=1e-4 * float(gradient.abs().max()), rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_every_method_computes_together_what_it_does_alone(method, train_config, pipe_template):
    adapter = METHODS[method]
    adapter = read_adapter(adapter) if isinstance(adapter, str) else adapter
    compare([build(train_config(), pipe_template, adapter, seed) for seed in (1, 2)])


@pytest.mark.slow
def test_with_gradient_checkpointing_layers_are_called_again_with_their_own_samples(train_config, pipe_template):
    config = train_config(gradient_checkpointing=True)
    compare([build(config, pipe_template, AtomConfig(channel_block=2), seed) for seed in (1, 2)])


@pytest.mark.slow
def test_bases_with_pooled_embeddings_and_time_ids(train_config, xl_pipe_template):
    compare([build(train_config(), xl_pipe_template, AtomConfig(channel_block=2), seed) for seed in (1, 2)])


def test_the_base_predicts_for_all_at_once(train_config, pipe_template):
    models = [build(train_config(), pipe_template, AtomConfig(target_modules=["conv1"]), seed) for seed in (1, 2)]
    parts = [dataclasses.replace(draw(count, seed), prompts=[1] * count) for seed, count in enumerate((2, 3))]
    found = JointDenoiser(models).predict_base(list(enumerate(parts)))
    for model, part, prediction in zip(models, parts, found, strict=True):
        expected = model.predict_base(part.latents, part.timesteps, part.prompts, part.time_ids)
        torch.testing.assert_close(prediction, expected, atol=1e-5, rtol=1e-5)


def test_frozen_weights_are_there_once_but_for_the_tables_that_words_are_written_into(train_config, pipe_template):
    adapter = AtomConfig(target_modules=["conv1"])
    first, second = (build(train_config(), pipe_template, adapter, seed) for seed in (1, 2))
    JointDenoiser([first, second])
    known = dict(first.named_parameters())
    own = {name for name, parameter in second.named_parameters() if parameter.data_ptr() != known[name].data_ptr()}
    tables = {name for name in known if name.endswith("token_embedding.weight")}
    assert len(tables) == 1 and own == tables | set(second.trained_parameters())
