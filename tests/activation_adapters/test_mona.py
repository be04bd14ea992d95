"""Mona against loops in NumPy, where its adapters stand in blocks, and what it refuses."""

import math

import numpy as np
import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

from atomdiff.activation_adapters import MonaConfig
from atomdiff.activation_adapters.mona.blocks import TokenLayout
from atomdiff.activation_adapters.mona.layer import MonaAdapter, MonaLayer
from atomdiff.concepts.parameter_count import count_parameters
from tests.activation_adapters.methods import SMALL, call, make_model, trained
from tests.tiny_models import make_unet

_erf = np.vectorize(math.erf)


def random_adapter(channels=5, **settings):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        adapter = MonaAdapter(channels, MonaConfig(hidden_size=4, **settings)).eval().double()
        for parameter in adapter.parameters():
            nn.init.normal_(parameter, std=0.5)
    return adapter


def mona_in_loops(adapter, x):
    """The equation, token by token: (batch, d, height, width) -> the same."""
    p = {key: value.detach().numpy() for key, value in adapter.state_dict().items()}
    batch, _, height, width = x.shape
    hidden = len(p["down.bias"])
    z = np.zeros((batch, hidden, height, width))
    for b, i, j in np.ndindex(batch, height, width):
        token = x[b, :, i, j]
        norm = (token - token.mean()) / np.sqrt(token.var() + 1e-5) * p["norm.weight"] + p["norm.bias"]
        z[b, :, i, j] = p["down.weight"] @ (norm * p["norm_scale"] + token * p["input_scale"]) + p["down.bias"]
    mixed = np.zeros_like(z)
    sizes = range(len(adapter.depthwise))
    for number in sizes:
        kernel, bias = p[f"depthwise.{number}.weight"], p[f"depthwise.{number}.bias"]
        reach = kernel.shape[-1] // 2
        for b, c, i, j in np.ndindex(*z.shape):
            total = bias[c]
            for k in range(-reach, reach + 1):
                for m in range(-reach, reach + 1):
                    if 0 <= i + k < height and 0 <= j + m < width:
                        total += kernel[c, 0, k + reach, m + reach] * z[b, c, i + k, j + m]
            mixed[b, c, i, j] += total / len(sizes)
    z = mixed + z
    out = np.zeros(x.shape)
    for b, i, j in np.ndindex(batch, height, width):
        token = z[b, :, i, j]
        token = token + p["pointwise.weight"][:, :, 0, 0] @ token + p["pointwise.bias"]
        token = token * 0.5 * (1 + _erf(token / np.sqrt(2)))
        out[b, :, i, j] = p["up.weight"] @ token + p["up.bias"]
    return out


@pytest.mark.parametrize("kernel_sizes", [[3, 5, 7], [3, 5], [1]])
def test_the_adapter_computes_the_equation(kernel_sizes):
    adapter = random_adapter(kernel_sizes=kernel_sizes)
    x = torch.randn(2, 5, 4, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    torch.testing.assert_close(adapter(x), torch.from_numpy(mona_in_loops(adapter, x.numpy())))


def test_it_has_as_many_parameters_as_in_the_paper():
    d, h = 320, 64
    adapter = MonaAdapter(d, MonaConfig())
    assert sum(p.numel() for p in adapter.parameters()) == d * (2 * h + 5) + h * h + 88 * h


def test_dropout_acts_in_training_only():
    adapter = random_adapter(dropout=0.5)
    x = torch.ones(1, 5, 3, 3, dtype=torch.float64)
    assert torch.equal(adapter(x), adapter(x))
    adapter.train()
    assert not torch.equal(adapter(x), adapter(x))


def mona_of(slot, layout):
    """Tokens -> tokens changed by the one adapter of a slot, laid out by loops."""

    def change(tokens):
        height, width, prefix = layout
        image = torch.zeros(len(tokens), tokens.shape[2], height, width)
        for i in range(height):
            for j in range(width):
                image[:, :, i, j] = tokens[:, prefix + i * width + j]
        added = slot.adapters["default"](image)
        changed = tokens.clone()
        for i in range(height):
            for j in range(width):
                changed[:, prefix + i * width + j] += added[:, :, i, j]
        return changed

    return change


@torch.no_grad()
def test_it_stands_after_both_residuals_of_the_blocks_of_a_unet():
    unet = trained("mona", make_unet().eval()).base_model.model
    transformer = unet.mid_block.attentions[0]
    block = transformer.transformer_blocks[0]
    x, text = torch.randn(2, 64, 4, 6), torch.randn(2, 7, 32)
    tokens, _ = transformer._operate_on_continuous_inputs(x)
    layout = (4, 6, 0)
    hidden = tokens + block.attn1(block.norm1(tokens))
    hidden = mona_of(transformer.after_attention_0, layout)(hidden)
    hidden = hidden + block.attn2(block.norm2(hidden), encoder_hidden_states=text)
    hidden = hidden + block.ff(block.norm3(hidden))
    hidden = mona_of(transformer.after_mlp_0, layout)(hidden)
    expected = transformer._get_output_for_continuous_inputs(hidden, x, 2, 4, 6, 64)
    torch.testing.assert_close(transformer(x, text).sample, expected, atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize(("name", "prefix"), [("vit", 1), ("deit", 2)])
def test_it_stands_after_both_residuals_of_a_vit_and_passes_by_the_first_tokens(name, prefix):
    model = trained("mona", make_model(name)).base_model.model
    block = next(module for module in model.modules() if hasattr(module, "after_mlp"))
    layout = (3, 4, prefix)
    x = torch.randn(2, prefix + 12, 16)
    hidden = x + block.attention(block.layernorm_before(x))[0]
    attended = mona_of(block.after_attention, layout)(hidden)
    assert torch.equal(attended[:, :prefix], hidden[:, :prefix])
    output = attended + block.mlp(block.layernorm_after(attended))
    expected = mona_of(block.after_mlp, layout)(output)
    torch.testing.assert_close(block(x), expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_it_stands_after_both_residuals_of_a_swin_block():
    model = trained("mona", make_model("swin")).base_model.model
    shifted = [module for module in model.modules() if hasattr(module, "after_mlp")][1]
    assert shifted.shift_size > 0
    x, layout = torch.randn(2, 64, 8), (8, 8, 0)
    slots = {name: shifted._modules[name] for name in ("after_attention", "after_mlp")}
    for slot in slots.values():
        slot._disable_adapters = True
    mlp = shifted.mlp.forward
    shifted.mlp.forward = lambda hidden: torch.zeros_like(hidden)
    hidden = mona_of(slots["after_attention"], layout)(shifted(x, (8, 8))[0])  # the block without its second branch
    shifted.mlp.forward = mlp
    output = hidden + shifted.mlp(shifted.layernorm_after(hidden))
    expected = mona_of(slots["after_mlp"], layout)(output)
    for slot in slots.values():
        slot._disable_adapters = False
    torch.testing.assert_close(shifted(x, (8, 8))[0], expected, atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("name", ["unet", "resnet", "resnet, bottlenecks", "convnext", "convnext v2"])
def test_it_stands_after_blocks_of_convolutions(name):
    model = trained("mona", make_model(name)).base_model.model
    blocks = [module for module in model.modules() if hasattr(module, "after_block")]
    seen = []
    for block in blocks:
        block.register_forward_hook(lambda block, inputs, output: seen.append((block, inputs, output)))
    call(model)
    assert len(seen) == len(blocks) > 1
    for block, inputs, output in seen:
        plain = type(block).without_slots.forward(block, *inputs)
        adapter = block.after_block.adapters["default"]
        torch.testing.assert_close(output, plain + adapter(plain), atol=1e-5, rtol=0)


def test_tokens_that_do_not_lie_in_the_image_are_refused():
    vit = ViTForImageClassification(ViTConfig(**SMALL, image_size=32, patch_size=8))
    model = trained("mona", vit)
    images = torch.randn(1, 3, 32, 40)
    with pytest.raises(ValueError, match=r"found 21 tokens and expected 1 \+ 4 x 4.*configured for"):
        model(images, interpolate_pos_encoding=True)
    with model.disable_adapter():
        model(images, interpolate_pos_encoding=True)
    layer = MonaLayer(nn.Identity())
    layer.add_adapter("default", MonaAdapter(8, MonaConfig()), torch.device("cpu"), False)
    with pytest.raises(ValueError, match="found 11 tokens and expected 3 x 4"):
        TokenLayout(3, 4).residual(layer, torch.randn(1, 11, 8))


def test_it_adapts_the_blocks_that_are_named():
    def slots(**settings):
        model = get_peft_model(make_unet(), MonaConfig(**settings))
        layers = [path for path, module in model.base_model.model.named_modules() if isinstance(module, MonaLayer)]
        return layers, model

    everything, _ = slots()
    assert len(everything) == 8 + 2 * 4 and "mid_block.attentions.0.after_mlp_0" in everything
    assert slots(target_modules=["attentions.0"])[0] == [p for p in everything if ".attentions.0." in p]
    assert slots(target_modules=r"mid_block\.resnets\.\d")[0] == [
        "mid_block.resnets.0.after_block",
        "mid_block.resnets.1.after_block",
    ]
    left, model = slots(exclude_modules=["after_attention_0", "resnets.0"])
    assert left == [p for p in everything if "after_attention" not in p and "resnets.0" not in p]
    model(torch.randn(1, 4, 8, 8), 5, torch.randn(1, 7, 32))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hidden_size": 0}, "hidden_size=0: expected a whole number"),
        ({"kernel_sizes": [3, 4]}, "odd numbers"),
        ({"kernel_sizes": []}, "odd numbers"),
        ({"kernel_sizes": [1] * 9}, "up to 8 odd numbers"),
        ({"dropout": 1}, "dropout=1: expected"),
        ({"target_modules": [1]}, "target_modules=.*expected a name"),
        ({"modules_to_save": 1}, "modules_to_save=1: expected a name"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        MonaConfig(**settings)


def test_modules_that_are_no_blocks_are_refused():
    unet = make_unet()
    with pytest.raises(TypeError, match="cannot adapt .*conv1: it is a Conv2d, expected a block .*ResnetBlock2D"):
        get_peft_model(unet, MonaConfig(target_modules=["conv1"]))
    with pytest.raises(ValueError, match=r"\['nothing'\] matches nothing .* could adapt: .*resnets.0"):
        get_peft_model(unet, MonaConfig(target_modules=["nothing"]))
    layers = nn.Sequential(next(m for m in make_model("vit").modules() if type(m).__name__ == "ViTLayer"))
    with pytest.raises(TypeError, match="its model has no config with image_size and patch_size"):
        get_peft_model(layers, MonaConfig(target_modules=["0"]))
    unet.mid_block.resnets[0].forward = unet.mid_block.resnets[0].forward
    with pytest.raises(ValueError, match="another library has replaced the forward of this ResnetBlock2D"):
        get_peft_model(unet, MonaConfig(target_modules=["mid_block.resnets.0"]))


def test_it_is_counted_without_weights():
    counted = count_parameters("sd-1.5", MonaConfig())
    assert {kind for kind, _ in counted.groups} == {"mona_adapter"}
    assert counted.num_trainable_parameters > 1e6


@pytest.mark.parametrize(
    ("target", "excluded"),
    [
        (None, ["after_attention_0", "after_mlp_0", "after_block"]),
        (["resnets.0"], ["after_block"]),
        (None, r".*\.after_.*"),
    ],
)
def test_leaving_every_place_out_is_refused(target, excluded):
    model = make_model("unet")
    with pytest.raises(ValueError, match="but for exclude_modules=.*after_.* matches nothing .* could adapt: down_bl"):
        get_peft_model(model, MonaConfig(target_modules=target, exclude_modules=excluded))
    assert not hasattr(model, "peft_config")
