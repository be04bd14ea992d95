"""The training run of a classifier: folders of pictures in, a tuned classifier and a report out."""

import copy
import math
import time
from collections.abc import Callable, Iterable
from contextlib import closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import broadcast
from diffusers.optimization import get_scheduler
from peft import PeftConfig
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from atomdiff.classify.config import ClassifyConfig
from atomdiff.classify.data import (
    Augmentation,
    LabelledFiles,
    PictureSet,
    Splits,
    evaluation_batches,
    read_splits,
    training_batches,
)
from atomdiff.classify.method import make_trained, read_method, spare_head
from atomdiff.classify.model import (
    check_place,
    hash_base,
    head_parameters,
    in_base,
    norm_statistics,
    open_model,
    open_processor,
    save_classifier,
)
from atomdiff.training.run_log import RunLog
from atomdiff.tuner.read_config import describe_adapter
from atomdiff.utils.atomic import write_json, write_result
from atomdiff.utils.errors import UserError
from atomdiff.utils.folder_lock import lock_folder
from atomdiff.utils.paths import check_writable, refuse_overlap
from atomdiff.utils.precision import training_precision
from atomdiff.utils.seeds import derive_seed
from atomdiff.utils.versions import versions

_DEFAULT_RATES = {"full": 1e-4, "adapter": 5e-3}
_LOSS_SHARE = 0.05  # of a step's loss in the average loss after it


@dataclass(frozen=True)
class Run:
    """The parts of a run that every step needs."""

    config: ClassifyConfig
    accelerator: Accelerator
    method: PeftConfig | str | None
    """From `read_method`."""
    splits: Splits
    processor: Any
    """Makes the network's input of a picture."""
    model: nn.Module
    """The classifier itself."""
    wrapped: nn.Module
    """The classifier as accelerate wrapped it."""
    optimizer: torch.optim.Optimizer
    rate_factor: Callable[[int], float]
    """From the number of steps done to the factor on both learning rates."""


def train_classifier(config: ClassifyConfig) -> dict[str, Any]:
    """Tune a classifier and write it to `config.output_dir`, folder `classifier`, with a log and `report.json`.

    The weights of the best validation are those that are tested and saved: highest accuracy, then lowest loss. On a CPU
    the same config gives the same numbers.

    Returns:
        The report: accuracies in [0, 1] by split; trained numbers of the adapter, of batch norms' statistics and of the
        head; the share of the first two in the base's parameters and statistics; validations, seconds, versions.

    Raises:
        UserError: Something in the config, the pictures or the base does not fit, or the loss is not finite any more.
    """
    method = read_method(config)
    place = Path(config.output_dir) / "classifier"
    sources = {"train_data_dir": config.train_data_dir, "the base": config.pretrained_model_name_or_path}
    refuse_overlap({"output_dir": config.output_dir}, sources)
    check_place(place, (config.pretrained_model_name_or_path, config.train_data_dir))
    check_writable(Path(config.output_dir), f"output_dir={config.output_dir!r}")
    accelerator = _start(config)
    with lock_folder(Path(config.output_dir)) if accelerator.is_main_process else nullcontext():
        return run_training(config, method, place, accelerator)


def run_training(
    config: ClassifyConfig, method: PeftConfig | str | None, place: Path, accelerator: Accelerator
) -> dict[str, Any]:
    """Do what `train_classifier` says in a folder that is this run's alone."""
    splits = read_splits(config.train_data_dir, config.validation_share, config.test_share, config.seed)
    name, revision = config.pretrained_model_name_or_path, config.revision
    model = open_model(name, splits.classes, revision=revision, from_scratch=config.from_scratch, seed=config.seed)
    processor = open_processor(name, model, revision=revision, resolution=config.resolution)
    base = {"base_model": name, "revision": revision, "base_sha256": hash_base(model)}
    base_numbers = _count(tensor for path, tensor in model.named_parameters() if in_base(model, path))
    base_numbers += _count(norm_statistics(model).values())
    method = spare_head(method, model)
    make_trained(model, method, config.seed)
    optimizer, rate_factor = build_optimizer(config, model, method)
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    run = Run(config, accelerator, method, splits, processor, model, wrapped, optimizer, rate_factor)
    _try_out(run)

    started = time.perf_counter()
    validations = _train(run)
    seconds = time.perf_counter() - started

    numbers = _trained_numbers(config, model)
    scored = {"train": splits.train, "validation": splits.validation, "test": splits.test}
    scores = {split: evaluate(run, pictures) if pictures else None for split, pictures in scored.items()}
    report = {
        "accuracy": {split: score and round(score["accuracy"], 6) for split, score in scores.items()},
        "loss": {split: score and round(score["loss"], 6) for split, score in scores.items()},
        "pictures": {split: pictures and len(pictures) for split, pictures in scored.items()},
        "classes": splits.classes,
        "trained_numbers": numbers,
        "base_numbers": base_numbers,
        "share": (numbers["adapter"] + numbers["statistics"]) / base_numbers,
        "best_step": max(validations, key=_merit)["step"],
        "validations": validations,
        "train_seconds": round(seconds, 1),
        "config": config.snapshot(),
        "adapter": method if isinstance(method, str) else describe_adapter(method),
        "versions": versions(),
    }
    if accelerator.is_main_process:
        written = place.with_name("report.json")
        written.unlink(missing_ok=True)  # it is of the classifier that is replaced
        write_result(
            place, lambda path: save_classifier(path, model, processor, method, base, config.updates_batch_norm)
        )
        write_json(written, report)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return report


def _start(config: ClassifyConfig) -> Accelerator:
    Path(config.output_dir).mkdir(parents=True, exist_ok=True)
    AcceleratorState._reset_state()  # or the precision of this process's first run would stay for all
    try:
        precision = training_precision(config.mixed_precision)
        return Accelerator(mixed_precision=precision.name, cpu=not torch.accelerator.is_available())
    except ValueError as error:
        raise UserError(f"accelerate cannot start: {error}") from error


@torch.no_grad()
def _try_out(run: Run) -> None:
    """Refuse a base, preprocessing and adapter through which the first picture does not go."""
    run.model.eval()
    try:
        pixels, _ = PictureSet(run.splits.train, run.processor)[0, 0]
        run.model(pixel_values=_on_device(run, pixels[None]))
        if run.config.train_batch_size == 1 and run.config.updates_batch_norm:
            copy.deepcopy(run.model).train()(pixel_values=_on_device(run, pixels[None]))
    except Exception as error:  # models raise whatever they like
        if "more than 1 value per channel" in str(error):
            found = "train_batch_size=1: the batch norms of this base need more than one value a channel"
            raise UserError(f"{found}; take at least 2, or batch_norm frozen") from error
        problem = " ".join(str(error).split())[:500]
        expected = "another resolution (some models take only their own), base or adapter"
        raise UserError(f"pictures do not go through the model ({problem}); use {expected}") from error


def build_optimizer(
    config: ClassifyConfig, model: Any, method: PeftConfig | str | None
) -> tuple[torch.optim.Optimizer, Callable[[int], float]]:
    """Build AdamW: one group for the head and, unless it is trained alone, one before it for the rest.

    Returns:
        The optimizer, and a function from the number of steps done to the factor on each group's `initial_lr`.
    """
    rest = [tensor for path, tensor in model.named_parameters() if tensor.requires_grad and in_base(model, path)]
    rate = config.learning_rate
    if rate is None:
        rate = _DEFAULT_RATES["full" if method is None else "adapter"]
    groups: list[dict[str, Any]] = [{"params": rest, "lr": rate}] if rest else []
    groups.append({"params": head_parameters(model), "lr": config.head_learning_rate})
    optimizer = torch.optim.AdamW(groups, weight_decay=config.adam_weight_decay, fused=True)
    steps = {"num_warmup_steps": config.lr_warmup_steps, "num_training_steps": config.max_train_steps}
    return optimizer, get_scheduler(config.lr_scheduler, optimizer, **steps).lr_lambdas[0]


def _train(run: Run) -> list[dict[str, float]]:
    """Train until the last step or until validations get no better; leave the best weights in the model."""
    config, accelerator = run.config, run.accelerator
    augmentation = Augmentation(config.random_flip, config.random_resized_crop)
    pictures = PictureSet(run.splits.train, run.processor, augmentation, config.seed)
    process, workers = (accelerator.process_index, accelerator.num_processes), config.dataloader_num_workers
    batches = training_batches(pictures, config.train_batch_size, config.max_train_steps, process, workers)
    validations: list[dict[str, float]] = []
    best: dict[str, Tensor] = {}
    average, log_file = math.nan, Path(config.output_dir) / "training_log.jsonl"
    samples = config.train_batch_size * accelerator.num_processes
    with closing(RunLog(accelerator, log_file, 0, config.max_train_steps, config.logging_steps, samples)) as log:
        for step, (pixels, labels) in enumerate(batches, start=1):
            started = time.perf_counter()
            loss = train_step(run, step, pixels, labels)
            average = loss if math.isnan(average) else average + (loss - average) * _LOSS_SHARE
            log.step(step, loss, average, run.optimizer.param_groups[0]["lr"], time.perf_counter() - started)
            if step % config.validation_steps and step < config.max_train_steps:
                continue
            validations.append({"step": step, **evaluate(run, run.splits.validation)})
            leader = max(validations, key=_merit)
            if leader is validations[-1]:
                best = {name: tensor.detach().clone() for name, tensor in _changing(run.model).items()}
            patience = config.early_stopping_patience
            if patience is not None and len(validations) - 1 - validations.index(leader) >= patience:
                break
    for name, tensor in _changing(run.model).items():
        tensor.data.copy_(best[name])
    return validations


def train_step(run: Run, step: int, pixels: Tensor, labels: Tensor) -> float:
    """Move the parameters once; return the mean loss of the step's batches on all processes.

    Raises:
        UserError: The loss or a gradient is not finite; the parameters have not moved.
    """
    accelerator = run.accelerator
    set_modes(run)
    for group in run.optimizer.param_groups:
        group["lr"] = group["initial_lr"] * run.rate_factor(step - 1)
    torch.manual_seed(derive_seed(run.config.seed, "step", step, accelerator.process_index))  # for dropout
    logits = run.wrapped(pixel_values=_on_device(run, pixels)).logits  # (batch, classes)
    loss = F.cross_entropy(logits.float(), labels.to(accelerator.device))
    mean = float(accelerator.gather(loss.detach().reshape(1)).mean())
    _refuse_unless_finite(run, step, "loss", mean)
    accelerator.backward(loss)
    trained = [parameter for parameter in run.model.parameters() if parameter.requires_grad]
    norm = accelerator.clip_grad_norm_(trained, run.config.max_grad_norm or math.inf)
    if accelerator.scaler is None:  # which would skip such a step
        _refuse_unless_finite(run, step, "gradient's norm", float(norm))
    run.optimizer.step()
    run.optimizer.zero_grad()
    return mean


def set_modes(run: Run) -> None:
    """Put the model into training mode, but batch norms only if they are to follow the pictures."""
    run.model.train()
    for module in run.model.modules():
        if isinstance(module, _BatchNorm):
            module.train(run.config.updates_batch_norm)


@torch.no_grad()
def evaluate(run: Run, pictures: LabelledFiles) -> dict[str, float]:
    """Return accuracy in [0, 1] and mean loss on these pictures, not augmented, shared by all processes."""
    accelerator, config = run.accelerator, run.config
    run.model.eval()
    for statistic in norm_statistics(run.model).values():
        statistic.copy_(broadcast(statistic))  # every process gathered its own
    process = (accelerator.process_index, accelerator.num_processes)
    unchanged = PictureSet(pictures, run.processor)
    sums = torch.zeros(2, dtype=torch.float64)  # right answers, loss
    for pixels, labels in evaluation_batches(unchanged, config.eval_batch_size, process, config.dataloader_num_workers):
        # The bare model: accelerate's wrapper would wait for processes that have fewer batches.
        logits = run.model(pixel_values=_on_device(run, pixels)).logits.float().cpu()  # (batch, classes)
        right = (logits.argmax(dim=1) == labels).sum()
        sums += torch.stack([right.double(), F.cross_entropy(logits, labels, reduction="sum").double()])
    right, loss = (accelerator.reduce(sums.float().to(accelerator.device)) / len(pictures)).tolist()
    return {"accuracy": right, "loss": loss}


def _on_device(run: Run, pixels: Tensor) -> Tensor:
    return pixels.to(run.accelerator.device, memory_format=torch.channels_last)


def _merit(validation: dict[str, float]) -> tuple[float, float]:
    return validation["accuracy"], -validation["loss"]


def _changing(model: nn.Module) -> dict[str, Tensor]:
    """All that training changes."""
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    return {**trained, **norm_statistics(model)}


def _trained_numbers(config: ClassifyConfig, model: Any) -> dict[str, int]:
    head = _count(head_parameters(model))
    trained = _count(parameter for parameter in model.parameters() if parameter.requires_grad)
    statistics = _count(norm_statistics(model).values()) if config.updates_batch_norm else 0
    return {"adapter": trained - head, "statistics": statistics, "head": head}


def _count(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors if tensor.is_floating_point())


def _refuse_unless_finite(run: Run, step: int, name: str, value: float) -> None:
    if not math.isfinite(value):
        rates = ", ".join(f"{group['initial_lr']:g}" for group in run.optimizer.param_groups)
        raise UserError(f"step {step}: the {name} is {value}; lower learning_rate or head_learning_rate (now {rates})")
