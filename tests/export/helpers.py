"""Adapters of several methods with random parameters in a pipeline, and what other programs make of exports."""

import copy

import torch
from peft import IA3Config, LoHaConfig, LoraConfig
from safetensors.torch import load_file

import atomdiff
from atomdiff.pipelines.models import pipeline_models
from atomdiff.pipelines.placeholder_tokens import add_placeholder_token, set_token_embedding
from atomdiff.tuner import AtomConfig
from tests.helpers import add_adapter

METHODS = {  # by component; text encoders that a pipeline lacks are passed over
    "atoms": {part: AtomConfig(target_modules="all") for part in ("unet", "text_encoder", "text_encoder_2")},
    "sparse": {"unet": AtomConfig(basis="sparse", channel_block=1, target_modules=["conv_in", "conv1"])},
    "lora": {
        "unet": LoraConfig(r=2, lora_alpha=3, target_modules=["to_q", "conv2", "proj_in"], init_lora_weights=False),
        "text_encoder": LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False),
    },
    "loha": {"unet": LoHaConfig(r=2, target_modules=["to_k", "conv2"], init_weights=False)},
    "ia3": {"unet": IA3Config(target_modules=["to_k", "conv1"], feedforward_modules=[])},
}


def add_random_adapter(pipe, method="atoms", name="default", seed=0, word=None, size=0.05):
    """Add an adapter with random parameters, and a trigger word, as a training run leaves them."""
    for part, config in METHODS[method].items():
        if part in pipe.components:
            add_adapter(pipe, name, config, [part], seed, size)
    if word:
        generator = torch.Generator().manual_seed(seed)
        encoders = {part: model for part, model in pipeline_models(pipe).items() if part.startswith("text_encoder")}
        add_placeholder_token(pipe, word)
        vectors = {part: torch.randn(m.config.hidden_size, generator=generator) for part, m in encoders.items()}
        set_token_embedding(pipe, word, vectors)
    atomdiff.list_atoms(pipe)  # notices what was added without `load_atoms`


def copy_of(template):
    """A deep copy of a pipeline."""
    pipe = copy.deepcopy(template)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate_latents(pipe, prompt="a photo of ohwx mug"):
    """The latents of an image that takes two steps."""
    pipe.set_progress_bar_config(disable=True)
    noise = torch.Generator().manual_seed(0)
    size = {"height": 32, "width": 32} if "XL" in type(pipe).__name__ else {}
    return pipe(prompt, num_inference_steps=2, generator=noise, output_type="latent", **size).images.float()


def load_textual_inversion(pipe, word, file):
    """Load exported token embeddings by diffusers' own call."""
    for key, rows in load_file(file).items():
        number = "_2" if key == "clip_g" else ""
        parts = {part: getattr(pipe, part + number) for part in ("text_encoder", "tokenizer")}
        pipe.load_textual_inversion({word: rows}, token=word, **parts)
