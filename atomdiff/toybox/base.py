"""The architecture of the toybox's base model: the usual classes of Stable Diffusion, a few million parameters."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from atomdiff.toybox.places import PLACES
from atomdiff.toybox.scenes import CLASSES, COLORS, IMAGE_SIZE
from atomdiff.toybox.shapes import PATTERNS
from atomdiff.utils.assets import find_asset

RARE_WORDS = ("sks", "zwx", "ohwx", "xjy", "qqv", "vlk")
LATENT_CHANNELS = 8
DOWNSAMPLING = 4
TEXT_WIDTH = 128
MAX_TOKENS = 24
_START, _END = "<|startoftext|>", "<|endoftext|>"


def build_vae() -> AutoencoderKL:
    """An autoencoder from (3, 64, 64) to (8, 16, 16)."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=IMAGE_SIZE,
        mid_block_add_attention=False,
    )


def build_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer in which every word of the world and every rare word is one token, others fall into letters."""
    return make_tokenizer([*(phrase for phrase, _ in PLACES.values()), *CLASSES, *COLORS, *PATTERNS])


def make_tokenizer(phrases: list[str]) -> CLIPTokenizer:
    """A CLIP tokenizer in which the words of phrases, of captions and rare ones are one token each."""
    words = f"a an photo of picture {' '.join((*phrases, *RARE_WORDS))}".split()
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    letters = [letter + end for letter in pre_tokenizers.ByteLevel.alphabet() for end in ("", "</w>")]
    trainer = trainers.BpeTrainer(
        vocab_size=10_000,
        min_frequency=1,
        special_tokens=[*sorted(letters), _START, _END],
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    bpe.train_from_iterator(sorted(set(words)), trainer)
    with TemporaryDirectory() as folder:
        vocab, merges = bpe.model.save(folder)
        tokenizer = CLIPTokenizer(vocab, merges, model_max_length=MAX_TOKENS)
        tokenizer.save_pretrained(folder)
        return CLIPTokenizer.from_pretrained(folder)


def build_text_encoder(tokenizer: CLIPTokenizer, layers: int = 2) -> CLIPTextModel:
    """A CLIP text model of a few layers."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=4 * TEXT_WIDTH,
            num_hidden_layers=layers,
            num_attention_heads=4,
            max_position_embeddings=MAX_TOKENS,
            projection_dim=TEXT_WIDTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build_unet() -> UNet2DConditionModel:
    """A UNet on (8, 16, 16) latents with attention below the highest resolution, and plain attention processors."""
    unet = UNet2DConditionModel(
        sample_size=IMAGE_SIZE // DOWNSAMPLING,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(64, 128, 192),
        layers_per_block=1,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=(2, 4, 6),
        norm_num_groups=32,
    )
    unet.set_attn_processor(AttnProcessor())
    return unet


def build_scheduler() -> DDIMScheduler:
    """Stable Diffusion's schedule, v-prediction, brought to zero terminal SNR (Lin et al., arXiv 2305.08891)."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
    )


def assemble(
    vae: AutoencoderKL, tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel, unet: UNet2DConditionModel
) -> StableDiffusionPipeline:
    """The parts as a `StableDiffusionPipeline` without a safety checker."""
    return StableDiffusionPipeline(
        vae=vae,
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        unet=unet,
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def load_toybox(folder: str | Path = "samples/toybox-sd") -> StableDiffusionPipeline:
    """The pretrained base in float32."""
    return StableDiffusionPipeline.from_pretrained(find_asset(str(folder)))
