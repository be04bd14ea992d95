"""Coeff-Tuning against loops in NumPy over attention maps that are kept."""

import numpy as np
import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0, SlicedAttnProcessor
from peft import get_peft_model
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

from atomdiff.activation_adapters import CoeffTuningConfig
from atomdiff.activation_adapters.coeff_tuning import HeadMixing, mixed_heads
from atomdiff.concepts.parameter_count import count_parameters
from tests.activation_adapters.methods import PATCHES, SMALL, shake, trained
from tests.tiny_models import make_unet


def maps_in_loops(query, key, mask):
    batch, heads, queries, size = query.shape
    maps = np.zeros((batch, heads, queries, key.shape[2]))
    for b, h, n in np.ndindex(batch, heads, queries):
        scores = key[b, h] @ query[b, h, n] / np.sqrt(size) + mask[b, 0, n]
        maps[b, h, n] = np.exp(scores - scores.max()) / np.exp(scores - scores.max()).sum()
    return maps


def tensors(seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"query": (2, 3, 5, 4), "key": (2, 3, 7, 4), "value": (2, 3, 7, 6), "mask": (2, 1, 5, 7)}
    return {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}


@pytest.mark.parametrize("batch", [1, 2])
def test_heads_are_mixed_as_by_the_equation(batch):
    given = tensors()
    alpha = torch.randn(batch, 3, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    mask = given.pop("mask")
    arrays = {name: tensor.numpy() for name, tensor in given.items()}
    maps = maps_in_loops(arrays["query"], arrays["key"], mask.numpy())
    expected = np.zeros((2, 3, 5, 6))
    for b, h in np.ndindex(2, 3):
        mixed = sum(alpha.numpy()[b % batch, h, i] * maps[b, i] for i in range(3))
        expected[b, h] = mixed @ arrays["value"][b, h]
    torch.testing.assert_close(mixed_heads(alpha, **given, attn_mask=mask), torch.from_numpy(expected))


@torch.no_grad()
def test_an_attention_uses_combinations_of_its_maps():
    attention = Attention(query_dim=12, heads=3, dim_head=4).eval()
    x = torch.randn(2, 5, 12)
    plain = attention(x)
    model = trained("coeff_tuning", nn.ModuleDict({"attn": attention})).base_model.model["attn"]
    alpha = model.attention_maps.alpha(2)[0] + torch.eye(3)
    query, key, value = (
        layer(x).unflatten(-1, (3, 4)).transpose(1, 2) for layer in (model.to_q, model.to_k, model.to_v)
    )
    maps = torch.softmax(query @ key.mT / 2, -1)  # (batch, heads, queries, keys)
    mixed = torch.stack([sum(alpha[h, i] * maps[:, i] for i in range(3)) for h in range(3)], 1)
    expected = model.to_out[0]((mixed @ value).transpose(1, 2).flatten(2))
    torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=0)
    assert (expected - plain).abs().max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("weight", [0.5, torch.tensor([0.5, 2.0])])
def test_alpha_is_what_is_trained_times_the_scale(weight):
    plain, scaled = HeadMixing(3), HeadMixing(3, scale=20)
    assert not scaled.alpha.any()
    plain.alpha.copy_(torch.randn(3, 3))
    scaled.alpha.copy_(plain.alpha / 20)
    torch.testing.assert_close(scaled(weight), plain(weight))


def test_it_has_as_many_parameters_on_stable_diffusion_as_in_the_paper():
    assert count_parameters("sd-1.5", CoeffTuningConfig()).num_trainable_parameters == 2048


@torch.no_grad()
@pytest.mark.parametrize("changes", [{}, {"upcast_attention": True}])
def test_diffusers_own_attention_mixes_the_same(changes):
    model = get_peft_model(make_unet(**changes).eval(), CoeffTuningConfig())
    inputs = torch.randn(2, 4, 8, 8), 5, torch.randn(2, 7, 32)
    outputs = []
    for scale in (0, 1):
        shake(model, scale=scale)
        for processor in (AttnProcessor2_0(), AttnProcessor()):
            model.base_model.model.set_attn_processor(processor)
            outputs.append(model(*inputs).sample)
    for one, other in ((0, 1), (2, 3)):
        torch.testing.assert_close(outputs[one], outputs[other], atol=1e-5, rtol=0)
    assert (outputs[2] - outputs[0]).abs().max() > 1e-3
    with model.disable_adapter():
        assert torch.equal(model(*inputs).sample, outputs[1])


def test_attentions_that_do_not_compute_their_maps_at_once_are_refused():
    inputs = torch.randn(1, 4, 8, 8), 5, torch.randn(1, 7, 32)
    model = get_peft_model(make_unet(), CoeffTuningConfig())
    model.base_model.model.set_attn_processor(SlicedAttnProcessor(2))
    with pytest.raises(ValueError, match=r"the SlicedAttnProcessor of this attention .* in 4 known call.*use"):
        model(*inputs)
    with model.disable_adapter():
        model(*inputs)
    config = ViTConfig(**SMALL, **PATCHES, attn_implementation="eager")
    vit = get_peft_model(ViTForImageClassification(config), CoeffTuningConfig())
    with pytest.raises(ValueError, match="this attention computes them in no known .*attn_implementation='sdpa'"):
        vit(torch.randn(1, 3, 24, 32))


def test_fused_projections_go_with_it():
    unet = make_unet()
    model = get_peft_model(unet, CoeffTuningConfig())
    shake(model)
    inputs = torch.randn(1, 4, 8, 8), 5, torch.randn(1, 7, 32)
    with torch.no_grad():
        expected = model(*inputs).sample
        unet.fuse_qkv_projections()
        torch.testing.assert_close(model(*inputs).sample, expected, atol=1e-5, rtol=0)


def test_other_modules_and_other_numbers_of_heads_are_refused():
    with pytest.raises(TypeError, match="it is a Linear, expected an attention"):
        get_peft_model(make_unet(), CoeffTuningConfig(target_modules=["to_q"]))
    given = tensors()
    given.pop("mask")
    with pytest.raises(ValueError, match="found 3, 3 and 3 heads .* expected 2 of each"):
        mixed_heads(torch.zeros(1, 2, 2), **given)
