"""Fixtures shared by all tests: a complete Stable Diffusion pipeline, random and tiny, built without the hub."""

import copy
import os
import string
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
from transformers.utils import logging as transformers_logging

transformers_logging.disable_progress_bar()

# The tensors are small: threads only wait for each other, and on a busy machine much longer than they work.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start

# Each of these words is one token of the tiny tokenizer; all other text falls apart into letters.
WORDS = "a an the photo picture of on in at with red blue green mug teapot robot cat beach forest city table sks"
SYMBOLS = list(string.ascii_lowercase + string.digits + string.punctuation)


def learn_merges(words: list[str]) -> list[tuple[str, str]]:
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
    """Build a real CLIPTokenizer with 77 positions whose merges were learnt from `WORDS`."""
    merges = learn_merges(WORDS.split())
    tokens = ["<|startoftext|>", "<|endoftext|>", *SYMBOLS, *(symbol + "</w>" for symbol in SYMBOLS)]
    tokens += [left + right for left, right in merges]
    vocabulary = {token: number for number, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=77)


def make_pipe() -> StableDiffusionPipeline:
    """Build the tiny pipeline: 32x32 pictures, 4 latent channels of 8x8, v-prediction; weights from seed 0."""
    tokenizer = make_tokenizer()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
        vae = AutoencoderKL(
            block_out_channels=(8, 8, 16),
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            latent_channels=4,
            layers_per_block=1,
            norm_num_groups=4,
            sample_size=32,
        )
        unet = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(32, 64),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            layers_per_block=1,
            cross_attention_dim=32,
            attention_head_dim=8,
            norm_num_groups=8,
        )
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    pipe = StableDiffusionPipeline(
        vae=vae.eval(),
        text_encoder=text_encoder.eval(),
        tokenizer=tokenizer,
        unet=unet.eval(),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="session")
def pipe_template() -> StableDiffusionPipeline:
    return make_pipe()


@pytest.fixture
def tiny_pipe(pipe_template: StableDiffusionPipeline) -> StableDiffusionPipeline:
    """A fresh, random StableDiffusionPipeline in fp32, always with the same weights; the test may change it."""
    pipe = StableDiffusionPipeline(
        **{name: copy.deepcopy(part) for name, part in pipe_template.components.items()}, requires_safety_checker=False
    )
    pipe.tokenizer = make_tokenizer()
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="session")
def tiny_pipe_folder(pipe_template: StableDiffusionPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny_pipe` saved as a pipeline folder; read only, since all tests share it."""
    folder = tmp_path_factory.mktemp("pipe") / "tiny-sd"
    pipe_template.save_pretrained(folder)
    return folder
