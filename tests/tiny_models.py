"""Complete Stable Diffusion pipelines, random and tiny, built without the hub."""

import copy
import string
from collections import Counter
from functools import cache
from itertools import pairwise
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    Flux2Transformer2DModel,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer, PreTrainedModel

# Each of these words is one token of the tiny tokenizer; all other text falls apart into letters.
WORDS = "a an the photo picture of on in at with red blue green mug teapot robot cat beach forest city table sks"
SYMBOLS = list(string.ascii_lowercase + string.digits + string.punctuation)


@cache
def learn_merges(words: tuple[str, ...]) -> list[tuple[str, str]]:
    """Byte-pair encoding of the words, until each is one piece; ties are broken by the alphabet."""
    merges = []
    pieces = [[*word[:-1], word[-1] + "</w>"] for word in words]
    while pairs := Counter(pair for word in pieces for pair in pairwise(word)):
        left, right = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append((left, right))
        for word in pieces:
            for start in reversed(range(len(word) - 1)):
                if word[start : start + 2] == [left, right]:
                    word[start : start + 2] = [left + right]
    return merges


def make_tokenizer() -> CLIPTokenizer:
    """Build a real CLIPTokenizer with 77 positions whose merges were learned from `WORDS`."""
    merges = list(learn_merges(tuple(WORDS.split())))
    tokens = ["<|startoftext|>", "<|endoftext|>", *SYMBOLS, *(symbol + "</w>" for symbol in SYMBOLS)]
    tokens += [left + right for left, right in merges]
    vocabulary = {token: number for number, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=77)


def make_text_encoder(tokenizer: CLIPTokenizer, kind: type[PreTrainedModel] = CLIPTextModel) -> PreTrainedModel:
    """Build a random CLIP text encoder with 2 layers of 32 channels."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        projection_dim=32,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return kind(config).eval()


def make_vae() -> AutoencoderKL:
    """Build a random VAE: 32x32 images to 4 latent channels of 8x8."""
    return AutoencoderKL(
        block_out_channels=(8, 8, 16),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=32,
    ).eval()


def make_unet(**changes: Any) -> UNet2DConditionModel:
    """Build a random UNet for latents of 8x8, in which `changes` differ from SD 1.x."""
    usual = {
        "sample_size": 8,
        "block_out_channels": (32, 64),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 1,
        "cross_attention_dim": 32,
        "attention_head_dim": 8,
        "norm_num_groups": 8,
    }
    return UNet2DConditionModel(**usual | changes).eval()


FLUX2 = {
    "in_channels": 8,
    "num_layers": 2,
    "num_single_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "joint_attention_dim": 24,
    "timestep_guidance_channels": 16,
    "axes_dims_rope": (4, 4, 4, 4),
    "guidance_embeds": False,
}


def make_flux2_transformer() -> tuple[Flux2Transformer2DModel, dict[str, Any]]:
    """Build a random transformer of FLUX.2 from seed 0, of sizes `FLUX2`, and inputs for it."""
    generator = torch.Generator().manual_seed(1)
    inputs = {
        "hidden_states": torch.randn(2, 9, 8, generator=generator),
        "encoder_hidden_states": torch.randn(2, 5, 24, generator=generator),
        "timestep": torch.tensor([0.3, 0.7]),
        "img_ids": torch.zeros(2, 9, 4),
        "txt_ids": torch.zeros(2, 5, 4),
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Flux2Transformer2DModel(**FLUX2), inputs


def make_scheduler(prediction_type: str) -> DDIMScheduler:
    """Build the scheduler of Stable Diffusion."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=prediction_type,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def make_pipe(prediction_type: str = "v_prediction", **unet: Any) -> StableDiffusionPipeline:
    """Build the tiny pipeline: 32x32 images, 4 latent channels of 8x8, v-prediction; weights from seed 0."""
    tokenizer = make_tokenizer()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        text_encoder = make_text_encoder(tokenizer)
        vae = make_vae()
        unet = make_unet(**unet)
    pipe = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=make_scheduler(prediction_type),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def make_xl_pipe() -> StableDiffusionXLPipeline:
    """Build a tiny SDXL pipeline: images and latents as `make_pipe`, epsilon, both text encoders; from seed 0."""
    tokenizer = make_tokenizer()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        parts = {
            "text_encoder": make_text_encoder(tokenizer),
            "text_encoder_2": make_text_encoder(tokenizer, CLIPTextModelWithProjection),
            "vae": make_vae(),
            "unet": make_unet(
                cross_attention_dim=64,  # both text encoders' states side by side
                attention_head_dim=(2, 4),
                transformer_layers_per_block=(1, 2),
                use_linear_projection=True,
                addition_embed_type="text_time",
                addition_time_embed_dim=8,
                projection_class_embeddings_input_dim=32 + 6 * 8,
            ),
        }
    pipe = StableDiffusionXLPipeline(
        **parts,
        tokenizer=tokenizer,
        tokenizer_2=make_tokenizer(),
        scheduler=make_scheduler("epsilon"),
        add_watermarker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def fresh_copy(template: Any, **options: Any) -> Any:
    """Return a pipeline with deep copies of the parts of `template`, and tokenizers of its own."""
    parts = template.components.items()
    own = {name: make_tokenizer() if name.startswith("tokenizer") else copy.deepcopy(part) for name, part in parts}
    pipe = type(template)(**own, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe
