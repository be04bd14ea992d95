"""A training run, put together: the base, its dataset, what is trained of it, and the optimizer."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from peft import PeftConfig
from torch import nn

from atomdiff.bases.find import denoiser_of
from atomdiff.training.base_model import BasePipeline, copy_base, load_base
from atomdiff.training.config import TrainConfig
from atomdiff.training.dataset import DreamBoothDataset, build_dataset
from atomdiff.training.fingerprint import base_keys
from atomdiff.training.launch import frozen_dtype
from atomdiff.training.measurements import Measurements
from atomdiff.training.model import TrainingModel, build_training_model
from atomdiff.training.noise import ForwardDiffusion, forward_diffusion, set_training_scheduler
from atomdiff.training.optimizers import build_optimizer
from atomdiff.training.sharding import configure_deepspeed
from atomdiff.training.validation_loss import fix_samples
from atomdiff.utils.progress import log
from atomdiff.utils.tensor_cache import DiskCache


@dataclass(frozen=True)
class Run:
    """The parts of a run that its steps, checkpoints and validation images need."""

    config: TrainConfig
    accelerator: Accelerator
    pipe: BasePipeline
    """The base, with what is trained in it."""
    dataset: DreamBoothDataset
    model: TrainingModel
    wrapped: nn.Module
    """The model as accelerate wrapped it."""
    trainable: dict[str, nn.Parameter]
    """The model's trainable parameters, by name."""
    optimizer: torch.optim.Optimizer
    lr_factor: Callable[[int], float]
    """Steps done -> factor on the learning rates."""
    diffusion: ForwardDiffusion
    ema: EMAModel | None
    """Moving average of the trainable parameters, if it is asked for."""
    measurements: Measurements = field(default_factory=Measurements)
    """What is measured on the way."""
    start: list[dict[str, Any]] = field(default_factory=list)
    """The concepts that the run started from, as `describe_source` has them; empty: a cold start."""
    loss_spikes: list[dict[str, Any]] = field(default_factory=list)
    """The steps of this process whose loss was a spike: step, loss and images."""
    started: float = field(default_factory=time.time)
    """Seconds since 1970."""

    @property
    def samples_per_step(self) -> int:
        """How many samples a step sees, on all processes."""
        images = self.config.instance_images_per_step(self.accelerator.num_processes)
        return images * (2 if self.dataset.class_images else 1)


def build_run(
    config: TrainConfig,
    accelerator: Accelerator,
    adapter: PeftConfig | None,
    text_adapter: PeftConfig | None,
    loaded: BasePipeline | None = None,
) -> Run:
    """Load the base, build the dataset, and add what is trained to the base; or to a copy of one that is loaded."""
    if loaded is not None:
        pipe = copy_base(loaded, share_weights=adapter is not None)
    else:
        if accelerator.is_main_process:
            log(f"loading the base {config.pretrained_model_name_or_path}")
        pipe = load_base(config)  # in float32; the VAE of SDXL overflows in float16
    set_training_scheduler(config, pipe)
    base = base_keys(pipe)
    if adapter is not None:
        denoiser_of(pipe).to(frozen_dtype(accelerator))
    dataset = build_dataset(config, pipe, accelerator, base)
    if accelerator.is_main_process:
        log("preparing the model")
    cache = DiskCache(config.cache_folder)
    kept = [*dataset.preservation_prompts.values(), *dataset.other_prompts]
    model = build_training_model(config, pipe, adapter, dataset.prompts, text_adapter, cache, kept)
    scale = config.learning_rate_scale(accelerator.num_processes)
    optimizer, lr_factor = build_optimizer(config, model.parameter_groups(), scale)
    configure_deepspeed(config, accelerator)
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    trainable = model.trained_parameters()
    ema = EMAModel(trainable.values(), decay=config.ema_decay) if config.use_ema else None
    diffusion = forward_diffusion(config, pipe)
    samples = None
    if config.validation_loss_interval and accelerator.is_main_process:
        samples = fix_samples(dataset, diffusion, model, accelerator, config.train_batch_size)
    return Run(
        config,
        accelerator,
        pipe,
        dataset,
        model,
        wrapped,
        trainable,
        optimizer,
        lr_factor,
        diffusion,
        ema,
        Measurements(samples),
    )
