"""The architecture of the toybox's base: a Stable Diffusion of the usual classes for 128x128 images."""

from __future__ import annotations

from tempfile import TemporaryDirectory

from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, StableDiffusionPipeline, UNet2DConditionModel
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from atomdiff.toybox.world import CLASSES, COLORS, IMAGE_SIZE, PATTERNS, SCENES

RARE_WORDS = ("sks", "zwx", "ohwx", "xjy", "qqv", "vlk")
LATENT_CHANNELS = 16
DOWNSAMPLING = 8
TEXT_WIDTH = 128
MAX_TOKENS = 24
NUM_INFERENCE_STEPS, GUIDANCE_SCALE = 15, 1.5  # as in configs/demo.yaml
_START, _END = "<|startoftext|>", "<|endoftext|>"


def build_vae() -> AutoencoderKL:
    """An autoencoder from (3, 128, 128) to (16, 16, 16)."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(32, 64, 128, 128),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=IMAGE_SIZE,
        mid_block_add_attention=False,
    )


def build_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer in which every word of the world and every rare word is one token, others fall into letters."""
    words = f"a an photo of picture {' '.join((*SCENES.values(), *CLASSES, *COLORS, *PATTERNS, *RARE_WORDS))}".split()
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


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """A CLIP text model with three layers."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=4 * TEXT_WIDTH,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=MAX_TOKENS,
            projection_dim=TEXT_WIDTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build_unet() -> UNet2DConditionModel:
    """A UNet on (16, 16, 16) latents with attention at every resolution: a pattern is the same all over its object.

    The last block has none: without it, a training step on a CPU takes a fifth less time, a prediction as well.
    """
    return UNet2DConditionModel(
        sample_size=IMAGE_SIZE // DOWNSAMPLING,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        down_block_types=("CrossAttnDownBlock2D",) * 3,
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(96, 160, 224),
        layers_per_block=1,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=(3, 5, 7),  # diffusers' name for the number of heads, 32 channels each
        norm_num_groups=32,
    )


def build_scheduler() -> DPMSolverMultistepScheduler:
    """Stable Diffusion's schedule, v-prediction, brought to zero terminal SNR (Lin et al., arXiv 2305.08891).

    It is solved by the stochastic DPM-Solver++ (Lu et al., arXiv 2211.01095): the noise that it adds in every step
    corrects errors of the steps before, so outlines and patterns become more regular.
    """
    return DPMSolverMultistepScheduler(
        algorithm_type="sde-dpmsolver++",
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
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
