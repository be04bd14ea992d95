"""A classifier's run, put together: accelerate, the model and its optimizer."""

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from peft import PeftConfig
from torch import Tensor, nn

from atomdiff.classify.config import ClassifyConfig
from atomdiff.classify.data import ImageDataset
from atomdiff.classify.method import add_trainable, exclude_head
from atomdiff.classify.model import hash_base, head_parameters, in_base, norm_statistics, open_model, open_processor
from atomdiff.classify.splits import Splits, read_splits
from atomdiff.training.config.optimizer import ParameterGroup
from atomdiff.training.optimizers import build_optimizer
from atomdiff.utils.errors import UserError


@dataclass(frozen=True)
class Run:
    """The parts of a run that every step needs."""

    config: ClassifyConfig
    accelerator: Accelerator
    method: PeftConfig | str | None
    """From `read_method`."""
    splits: Splits
    processor: Any
    """Makes the network's input of an image."""
    base: dict[str, str | None]
    """What the base is found and recognized by: base_model, revision, base_sha256."""
    num_base_parameters: int
    """The base's parameters and the statistics of its batch norms, without the head."""
    model: nn.Module
    """The classifier itself."""
    wrapped: nn.Module
    """The classifier as accelerate wrapped it."""
    optimizer: torch.optim.Optimizer
    lr_factor: Callable[[int], float]
    """Steps done -> factor on both learning rates."""


def build_run(config: ClassifyConfig, method: PeftConfig | str | None, accelerator: Accelerator) -> Run:
    """Find the images, open the base with a new head, and add what is trained to it.

    Raises:
        UserError: The images, the base or the adapter cannot be used, or do not go together.
    """
    splits = read_splits(config.train_data_dir, config.validation_share, config.test_share, config.seed)
    name, revision = config.pretrained_model_name_or_path, config.revision
    model = open_model(name, splits.classes, revision=revision, from_scratch=config.from_scratch, seed=config.seed)
    processor = open_processor(name, model, revision=revision, resolution=config.resolution)
    base = {"base_model": name, "revision": revision, "base_sha256": hash_base(model)}
    num_base_parameters = count(tensor for path, tensor in model.named_parameters() if in_base(model, path))
    num_base_parameters += count(norm_statistics(model).values())
    method = exclude_head(method, model)
    add_trainable(model, method, config.seed)
    optimizer, lr_factor = build_optimizer(config, parameter_groups(model))
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    run = Run(
        config, accelerator, method, splits, processor, base, num_base_parameters, model, wrapped, optimizer, lr_factor
    )
    try_forward(run)
    return run


@torch.no_grad()
def try_forward(run: Run) -> None:
    """Refuse a base, preprocessing or adapter that the first image does not go through."""
    run.model.eval()
    try:
        pixels, _ = ImageDataset(run.splits.train, run.processor)[0, 0]
        run.model(pixel_values=to_device(run, pixels[None]))
        if run.config.train_batch_size == 1 and run.config.updates_batch_norm:
            copy.deepcopy(run.model).train()(pixel_values=to_device(run, pixels[None]))
    except Exception as error:  # models raise whatever they like
        if "more than 1 value per channel" in str(error):
            found = "train_batch_size=1: the batch norms of this base need more than one value a channel"
            raise UserError(f"{found}; use at least 2, or batch_norm frozen") from error
        problem = " ".join(str(error).split())[:500]
        expected = "another resolution (some models take only their own), base or adapter"
        raise UserError(f"the model cannot process the images ({problem}); use {expected}") from error


def parameter_groups(model: Any) -> dict[ParameterGroup, list[nn.Parameter]]:
    """Return the parameters that are trained: those of the head and, unless it is trained alone, the rest before it."""
    rest = [tensor for path, tensor in model.named_parameters() if tensor.requires_grad and in_base(model, path)]
    head: dict[ParameterGroup, list[nn.Parameter]] = {"head": head_parameters(model)}
    return {"adapter": rest, **head} if rest else head


def to_device(run: Run, pixels: Tensor) -> Tensor:
    """Move a batch (batch, 3, h, w) to the device of the run."""
    return pixels.to(run.accelerator.device, memory_format=torch.channels_last)


def count(tensors: Iterable[Tensor]) -> int:
    """Count the elements of some tensors, but for those of batch norms' counters, which are whole numbers."""
    return sum(tensor.numel() for tensor in tensors if tensor.is_floating_point())
