"""Fixtures shared by all tests."""

import gc
import os
import resource
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from transformers.utils import logging as transformers_logging

from atomdiff.utils.precision import has_instructions
from tests.helpers import write_images
from tests.tiny_models import fresh_copy, make_pipe, make_xl_pipe

transformers_logging.disable_progress_bar()


# The tensors are small: threads only wait for each other, and on a busy machine much longer than they work.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start
os.environ["ACCELERATE_MIXED_PRECISION"] = "no"  # or results would depend on what the processor can do


@pytest.fixture(scope="module", autouse=True)
def small_heap() -> None:
    """Keep the garbage collector from looking at what is there: training runs collect, in .5 s among all libraries."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def half_precision() -> str:
    """A `mixed_precision`: bf16, or no where the processor would emulate it, which takes many times as long."""
    return "bf16" if has_instructions("bf16", torch.device("cpu")) else "no"


@pytest.fixture
def user_warnings() -> Callable[[Iterable[warnings.WarningMessage]], list[warnings.WarningMessage]]:
    """Picks the user warnings among recorded ones: Python may warn at any time of a file that a test left open."""
    return lambda recorded: [each for each in recorded if issubclass(each.category, UserWarning)]


def saved(template: Any, factory: pytest.TempPathFactory, name: str) -> Path:
    """Save a pipeline to a folder of this name."""
    folder = factory.mktemp("pipe") / name
    template.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_encoder_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of an image encoder like DINO, with random weights, for images of 32 pixels."""
    from transformers import CLIPImageProcessor, ViTConfig, ViTModel

    folder = tmp_path_factory.mktemp("dino")
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        ViTModel(ViTConfig(**small, image_size=32, patch_size=8)).save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    return str(folder)


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
            "validation_loss_steps": 0,
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


@pytest.fixture
def hub_server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """A stand-in for the Hub, which the Hub's client speaks to, with nobody logged in."""
    from tests.fake_hub import running_hub

    with running_hub(monkeypatch, tmp_path / "hf") as server:
        yield server


@pytest.fixture
def logged_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody is logged in on `hub_server` who may write."""
    monkeypatch.setenv("HF_TOKEN", "hf_writer")


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
