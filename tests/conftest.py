"""Fixtures shared by all tests: a complete Stable Diffusion pipeline, random and tiny, built without the hub."""

import copy
import os
import resource
import string
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer, PreTrainedModel
from transformers.utils import logging as transformers_logging

from atomdiff.utils.precision import has_instructions
from tests.helpers import write_images

transformers_logging.disable_progress_bar()

# The tensors are small: threads only wait for each other, and on a busy machine much longer than they work.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start
os.environ["ACCELERATE_MIXED_PRECISION"] = "no"  # or results would depend on what the processor can do

# Each of these words is one token of the tiny tokenizer; all other text falls apart into letters.
WORDS = "a an the photo picture of on in at with red blue green mug teapot robot cat beach forest city table sks"
SYMBOLS = list(string.ascii_lowercase + string.digits + string.punctuation)


@pytest.fixture
def half_precision() -> str:
    """A `mixed_precision`: bf16, or no where the processor would emulate it, which takes many times as long."""
    return "bf16" if has_instructions("bf16", torch.device("cpu")) else "no"


@pytest.fixture
def user_warnings() -> Callable[[Iterable[warnings.WarningMessage]], list[warnings.WarningMessage]]:
    """Picks the user warnings among recorded ones: Python may warn at any time of a file that a test left open."""
    return lambda recorded: [each for each in recorded if issubclass(each.category, UserWarning)]


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
    """Build a real CLIPTokenizer with 77 positions whose merges were learned from `WORDS`."""
    merges = learn_merges(WORDS.split())
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
    pipe = type(template)(**{name: copy.deepcopy(part) for name, part in template.components.items()}, **options)
    for name in ("tokenizer", "tokenizer_2"):
        if name in pipe.components:
            setattr(pipe, name, make_tokenizer())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def saved(template: Any, factory: pytest.TempPathFactory, name: str) -> Path:
    """Save a pipeline to a folder of this name."""
    folder = factory.mktemp("pipe") / name
    template.save_pretrained(folder)
    return folder


@pytest.fixture
def teapot_images(tmp_path: Path) -> Path:
    """A folder `teapot` of three random images of different widths."""
    return write_images(tmp_path / "teapot", widths=(32, 40, 48))


@pytest.fixture
def train_config(tmp_path: Path, tiny_pipe_folder: Path, request: pytest.FixtureRequest) -> Callable[..., Any]:
    """Makes a TrainConfig of a short run on the tiny pipeline, by default on `teapot_images`."""

    def make(**fields: Any) -> Any:
        from atomdiff.training.config import TrainConfig

        if not fields.keys() & {"instance_data_dir", "concepts_list"}:
            fields["instance_data_dir"] = str(request.getfixturevalue("teapot_images"))
        usual = {
            "pretrained_model_name_or_path": str(tiny_pipe_folder),
            "output_dir": str(tmp_path / "out"),
            "class_name": "teapot",
            "train_batch_size": 2,
            "max_train_steps": 3,
            "num_inference_steps": 2,
            "logging_steps": 1,
            "report_to": None,
        }
        return TrainConfig(**usual | fields)

    return make


@contextmanager
def _small_files(size: int) -> Iterator[None]:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.fixture
def small_files() -> Callable[[int], AbstractContextManager[None]]:
    """A `with` block in which files can have so many bytes: as a disk that is full then."""
    return _small_files


@pytest.fixture(scope="session")
def pipe_template() -> StableDiffusionPipeline:
    return make_pipe()


@pytest.fixture(scope="session")
def sd2_pipe_template() -> StableDiffusionPipeline:
    return make_pipe(use_linear_projection=True, attention_head_dim=[2, 4])


@pytest.fixture(scope="session")
def xl_pipe_template() -> StableDiffusionXLPipeline:
    return make_xl_pipe()


@pytest.fixture
def tiny_pipe(pipe_template: StableDiffusionPipeline) -> StableDiffusionPipeline:
    """A fresh, random StableDiffusionPipeline in fp32, always with the same weights; the test may change it."""
    return fresh_copy(pipe_template, requires_safety_checker=False)


@pytest.fixture
def tiny_sd2_pipe(sd2_pipe_template: StableDiffusionPipeline) -> StableDiffusionPipeline:
    """As `tiny_pipe`, with the UNet of SD 2.x: linear projections, heads counted by block; v-prediction."""
    return fresh_copy(sd2_pipe_template, requires_safety_checker=False)


@pytest.fixture
def tiny_xl_pipe(xl_pipe_template: StableDiffusionXLPipeline) -> StableDiffusionXLPipeline:
    """A fresh, random StableDiffusionXLPipeline in fp32, always with the same weights; the test may change it."""
    return fresh_copy(xl_pipe_template, add_watermarker=False)


@pytest.fixture(scope="session")
def tiny_pipe_folder(pipe_template: StableDiffusionPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny_pipe` saved as a pipeline folder; read only, since all tests share it."""
    return saved(pipe_template, tmp_path_factory, "tiny-sd")


@pytest.fixture(scope="session")
def tiny_sd2_pipe_folder(sd2_pipe_template: StableDiffusionPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny_sd2_pipe` saved as a pipeline folder; read only, since all tests share it."""
    return saved(sd2_pipe_template, tmp_path_factory, "tiny-sd2")


@pytest.fixture(scope="session")
def tiny_xl_pipe_folder(xl_pipe_template: StableDiffusionXLPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny_xl_pipe` saved as a pipeline folder; read only, since all tests share it."""
    return saved(xl_pipe_template, tmp_path_factory, "tiny-sdxl")
