"""Models with every kind of block that adapters of activations know, and random values for adapters."""

from functools import partial

import torch
from peft import get_peft_model
from transformers import (
    ConvNextConfig,
    ConvNextForImageClassification,
    ConvNextV2Config,
    ConvNextV2ForImageClassification,
    DeiTConfig,
    DeiTForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    SwinConfig,
    SwinForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from atomdiff.activation_adapters import CoeffTuningConfig, ConvAdapterConfig, MonaConfig
from atomdiff.activation_adapters.conv_adapter.config import PLACEMENTS
from tests.tiny_models import make_unet

SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
PATCHES = {"image_size": (24, 32), "patch_size": 8}
STAGES = {"hidden_sizes": [8, 12], "depths": [1, 2]}
SWIN = {"image_size": 32, "patch_size": 4, "embed_dim": 8, "depths": [2, 1], "num_heads": [2, 2], "window_size": 4}
MODELS = {
    "unet": lambda: make_unet(),
    "unet of SDXL": lambda: make_unet(transformer_layers_per_block=(1, 2), use_linear_projection=True),
    "resnet": lambda: ResNetForImageClassification(ResNetConfig(embedding_size=8, layer_type="basic", **STAGES)),
    "resnet, bottlenecks": lambda: ResNetForImageClassification(ResNetConfig(embedding_size=8, **STAGES)),
    "convnext": lambda: ConvNextForImageClassification(ConvNextConfig(num_stages=2, **STAGES)),
    "convnext v2": lambda: ConvNextV2ForImageClassification(ConvNextV2Config(num_stages=2, **STAGES)),
    "vit": lambda: ViTForImageClassification(ViTConfig(**SMALL, **PATCHES)),
    "deit": lambda: DeiTForImageClassification(DeiTConfig(**SMALL, **PATCHES)),
    "swin": lambda: SwinForImageClassification(SwinConfig(**SWIN)),
}
METHODS = {
    "mona": lambda: MonaConfig(hidden_size=6),
    "conv_adapter": lambda: ConvAdapterConfig(reduction=2),
    "coeff_tuning": lambda: CoeffTuningConfig(),
    **{
        f"conv_adapter, {placement}": partial(ConvAdapterConfig, reduction=2, placement=placement)
        for placement in PLACEMENTS[1:]
    },
}
CASES = [
    *(("mona", model) for model in MODELS),
    *(("conv_adapter", model) for model in MODELS),
    *(("coeff_tuning", model) for model in ("unet", "unet of SDXL", "vit", "deit")),
    *(("conv_adapter, residual_parallel", model) for model in MODELS if model not in ("vit", "deit", "swin")),
    *((f"conv_adapter, {way}_sequential", model) for way in ("conv", "residual") for model in ("unet", "resnet")),
]


def make_model(name):
    """A model of random weights, always the same ones, in evaluation mode."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return MODELS[name]().requires_grad_(False).eval()


def call(model, batch=2, seed=1, grad=False):
    """What a model gives for noise; images and latents are no squares."""
    with torch.set_grad_enabled(grad):
        return _call(model, batch, seed)


def _call(model, batch, seed):
    generator = torch.Generator().manual_seed(seed)
    config = getattr(model, "config", None)
    if "block_out_channels" in config:
        latents = torch.randn(batch, 4, 8, 12, generator=generator)
        return model(latents, 500, torch.randn(batch, 7, 32, generator=generator)).sample
    height, width = (32, 32) if getattr(config, "window_size", None) else (24, 32)
    return model(torch.randn(batch, 3, height, width, generator=generator)).logits


def shake(model, name="default", seed=2, scale=0.2):
    """Give an adapter random values, as if it had been trained."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if f".{name}." in key:
                parameter.add_(scale * torch.randn(parameter.shape, generator=generator))


def trained(method, base, seed=2):
    """A model with an adapter that was given random values, always the same ones, in evaluation mode."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = get_peft_model(base, METHODS[method]())
    shake(model, seed=seed)
    return model.eval()
