"""Adapters of several methods with random parameters in a pipeline, and what tests compare before and after."""

import copy

import torch
from peft import IA3Config, LoHaConfig, LoraConfig
from safetensors.torch import load_file

from atomdiff.pipelines.models import pipeline_models
from atomdiff.pipelines.placeholder_tokens import add_placeholder_token, set_token_embedding
from atomdiff.tuner import AtomConfig

METHODS = {
    "atoms": (
        lambda: AtomConfig(target_modules="all"),
        {f"text_encoder{n}": lambda: AtomConfig(target_modules="all") for n in ("", "_2")},
    ),
    "sparse": (lambda: AtomConfig(basis="sparse", channel_block=1, target_modules=["conv_in", "conv1"]), {}),
    "lora": (
        lambda: LoraConfig(r=2, lora_alpha=3, target_modules=["to_q", "conv2", "proj_in"], init_lora_weights=False),
        {"text_encoder": lambda: LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)},
    ),
    "loha": (lambda: LoHaConfig(r=2, target_modules=["to_k", "conv2"], init_weights=False), {}),
    "ia3": (lambda: IA3Config(target_modules=["to_k", "conv1"], feedforward_modules=[]), {}),
}


def add_random_adapter(pipe, method="atoms", name="default", seed=0, word=None, size=0.05):
    """Add an adapter with random parameters, and a trigger word, as a training run leaves them."""
    generator = torch.Generator().manual_seed(seed)
    of_unet, of_encoders = METHODS[method]
    for component, config in {"unet": of_unet, **of_encoders}.items():
        model = getattr(pipe, component, None)
        if model is None:
            continue
        model.add_adapter(config(), name)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if f".{name}" in key:
                    parameter.add_(torch.randn(parameter.shape, generator=generator) * size)
    if word:
        add_placeholder_token(pipe, word)
        vectors = {
            component: torch.randn(model.get_input_embeddings().embedding_dim, generator=generator)
            for component, model in pipeline_models(pipe).items()
            if component.startswith("text_encoder")
        }
        set_token_embedding(pipe, word, vectors)


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


def bits(pipe):
    """All tensors of a pipeline's models, as they are now."""
    models = pipeline_models(pipe).items()
    return {f"{part}.{key}": value.clone() for part, model in models for key, value in model.state_dict().items()}


def assert_unchanged(pipe, before):
    """Assert that a pipeline has the `bits` that it had before, and no others."""
    now = bits(pipe)
    assert now.keys() == before.keys() and all(torch.equal(now[key], value) for key, value in before.items())


def load_textual_inversion(pipe, word, file):
    """Load exported token embeddings by diffusers' own call."""
    for key, rows in load_file(file).items():
        number = "_2" if key == "clip_g" else ""
        parts = {part: getattr(pipe, part + number) for part in ("text_encoder", "tokenizer")}
        pipe.load_textual_inversion({word: rows}, token=word, **parts)


def predict(pipe, prompt="a photo of sks mug"):
    """What the UNet predicts for a prompt, from the same noise each time."""
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return pipe.unet(noise, 5, pipe.encode_prompt(prompt, "cpu", 1, False)[0]).sample
