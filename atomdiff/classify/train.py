"""The training run of a classifier: folders of images in, a tuned classifier and a report out."""

import math
import time
from contextlib import closing, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from peft import PeftConfig
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from atomdiff.classify.config import ClassifyConfig
from atomdiff.classify.data import Augmentation, ImageDataset, evaluation_batches, training_batches
from atomdiff.classify.layer_budget import check_budget, keep_to_budget
from atomdiff.classify.method import read_method
from atomdiff.classify.model import head_parameters, norm_statistics
from atomdiff.classify.run import Run, build_run, count, to_device
from atomdiff.classify.saving import check_result_folder, save_classifier
from atomdiff.classify.splits import LabeledFiles
from atomdiff.concepts.layer_choice import count_by_block
from atomdiff.training.ema import averaged
from atomdiff.training.launch import check_packages, new_accelerator
from atomdiff.training.loop import clip_gradients, mean_over_processes, set_learning_rates, update_average
from atomdiff.training.method import ADAPTER_NAME
from atomdiff.training.optimizers import current_rate
from atomdiff.training.run_log import RunLog
from atomdiff.tuner.read_config import describe_adapter
from atomdiff.tuner.selection import (
    acting_layers,
    first_lasting_step,
    frozen_scores,
    layer_scores,
    selection_penalty,
)
from atomdiff.utils.atomic import write_json, write_result
from atomdiff.utils.errors import UserError
from atomdiff.utils.folder_lock import lock_folder
from atomdiff.utils.paths import check_writable, refuse_overlap
from atomdiff.utils.seeds import derive_seed
from atomdiff.utils.versions import versions

_FULL_LEARNING_RATE = 1e-4  # of all weights, unless the optimizer estimates its step size


def train_classifier(config: ClassifyConfig) -> dict[str, Any]:
    """Tune a classifier and write it to `config.output_dir`, folder `classifier`, with a log and `report.json`.

    The weights of the best validation are those that are tested and saved: highest accuracy, then lowest loss. On a CPU
    the same config gives the same numbers.

    Returns:
        The report: accuracies in [0, 1] by split; numbers of trainable parameters of the adapter, of batch norms'
        statistics and of the head; the first two as a share of the base's parameters and statistics; which layers
        stayed, if that was learned; validations, seconds, versions.

    Raises:
        UserError: Something in the config, the images or the base does not fit, or the loss is not finite any more.
    """
    method = read_method(config)
    check_packages(config)
    if method is None and config.learning_rate is None and not config.optimizer_spec.estimates_step_size:
        config = replace(config, learning_rate=_FULL_LEARNING_RATE)
    folder = Path(config.output_dir) / "classifier"
    sources = {"train_data_dir": config.train_data_dir, "the base": config.pretrained_model_name_or_path}
    refuse_overlap({"output_dir": config.output_dir}, sources)
    check_result_folder(folder, (config.pretrained_model_name_or_path, config.train_data_dir))
    check_writable(Path(config.output_dir), f"output_dir={config.output_dir!r}")
    Path(config.output_dir).mkdir(parents=True, exist_ok=True)
    accelerator = new_accelerator(config.mixed_precision)
    with lock_folder(Path(config.output_dir)) if accelerator.is_main_process else nullcontext():
        return run_training(config, method, folder, accelerator)


def run_training(
    config: ClassifyConfig, method: PeftConfig | str | None, folder: Path, accelerator: Accelerator
) -> dict[str, Any]:
    """Do what `train_classifier` says in a folder that is this run's alone."""
    run = build_run(config, method, accelerator)
    check_budget(run)
    started = time.perf_counter()
    validations = training_loop(run)
    seconds = time.perf_counter() - started
    report = _report(run, validations, seconds)
    if accelerator.is_main_process:
        report_file = folder.with_name("report.json")
        report_file.unlink(missing_ok=True)  # it is of the classifier that is replaced
        parts = (run.model, run.processor, run.method, run.base, config.updates_batch_norm)
        write_result(folder, lambda path: save_classifier(path, *parts))
        write_json(report_file, report)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return report


def _report(run: Run, validations: list[dict[str, float]], seconds: float) -> dict[str, Any]:
    """Return what `train_classifier` reports."""
    trainable = _count_trainable(run)
    evaluated = {"train": run.splits.train, "validation": run.splits.validation, "test": run.splits.test}
    results = {split: evaluate(run, images) if images else None for split, images in evaluated.items()}
    return {
        "accuracy": {split: result and round(result["accuracy"], 6) for split, result in results.items()},
        "loss": {split: result and round(result["loss"], 6) for split, result in results.items()},
        "images": {split: images and len(images) for split, images in evaluated.items()},
        "classes": run.splits.classes,
        "num_trainable_parameters": trainable,
        "num_base_parameters": run.num_base_parameters,
        "selected_layers": _selected_layers(run),
        "trainable_share": (trainable["adapter"] + trainable["statistics"]) / run.num_base_parameters,
        "best_step": _best(run, validations)["step"],
        "validations": validations,
        "train_seconds": round(seconds, 1),
        "config": run.config.snapshot(),
        "adapter": run.method if isinstance(run.method, str) else describe_adapter(run.method),
        "versions": versions(),
    }


def _selected_layers(run: Run) -> str | None:
    """Return which layers the classifier has, if that was learned."""
    scores = layer_scores(run.model, ADAPTER_NAME)
    acting = acting_layers(scores)
    return ": ".join(filter(None, (f"{len(acting)} of {len(scores)}", count_by_block(acting)))) if scores else None


def training_loop(run: Run) -> list[dict[str, float]]:
    """Train until the last step or until validations get no better; leave the best weights in the model."""
    config, accelerator = run.config, run.accelerator
    augmentation = Augmentation(config.random_flip, config.random_resized_crop)
    dataset = ImageDataset(run.splits.train, run.processor, augmentation, config.seed)
    process, workers = (accelerator.process_index, accelerator.num_processes), config.dataloader_num_workers
    batches = training_batches(dataset, config.train_batch_size, config.max_train_steps, process, workers)
    validations: list[dict[str, float]] = []
    best: dict[str, Tensor] = {}
    average, log_file = math.nan, Path(config.output_dir) / "training_log.jsonl"
    samples = config.train_batch_size * accelerator.num_processes
    trainable = [parameter for parameter in run.model.parameters() if parameter.requires_grad]
    lasting = first_lasting_step(layer_scores(run.model, ADAPTER_NAME), config.max_train_steps)
    with closing(RunLog(accelerator, log_file, 0, config.max_train_steps, config.logging_steps, samples)) as log:
        for step, (pixels, labels) in enumerate(batches, start=1):
            started = time.perf_counter()
            loss = train_step(run, step, pixels, labels)
            average = update_average(average, loss)
            log.step(step, loss, average, current_rate(run.optimizer), time.perf_counter() - started)
            keep_to_budget(run, step)
            if step % config.validation_steps and step < config.max_train_steps:
                continue
            with averaged(trainable, run.optimizer, None):
                validations.append({"step": step, **evaluate(run, run.splits.validation)})
                if step < lasting:
                    continue
                best_validation = _best(run, validations)
                if best_validation is validations[-1]:
                    best = {name: tensor.detach().clone() for name, tensor in _changing(run.model).items()}
            patience = config.early_stopping_patience
            if patience is not None and len(validations) - 1 - validations.index(best_validation) >= patience:
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
    set_learning_rates(run.optimizer, run.lr_factor(step - 1))
    torch.manual_seed(derive_seed(run.config.seed, "step", step, accelerator.process_index))  # for dropout
    logits = run.wrapped(pixel_values=to_device(run, pixels)).logits  # (batch, classes)
    loss = F.cross_entropy(logits.float(), labels.to(accelerator.device))
    mean = mean_over_processes(accelerator, loss)
    _refuse_unless_finite(run, step, "loss", mean)
    done, scores = (step - 1) / run.config.max_train_steps, layer_scores(run.model, ADAPTER_NAME)
    accelerator.backward(loss + selection_penalty(scores, done))
    for score in frozen_scores(scores):
        score.grad = None  # no optimizer moves a parameter without one
    trainable = [parameter for parameter in run.model.parameters() if parameter.requires_grad]
    norm = clip_gradients(accelerator, trainable, run.config.max_grad_norm)
    if accelerator.scaler is None:  # which would skip such a step
        _refuse_unless_finite(run, step, "gradient's norm", norm)
    run.optimizer.step()
    run.optimizer.zero_grad()
    return mean


def set_modes(run: Run) -> None:
    """Put the model into training mode, but batch norms only if they are to follow the images."""
    run.model.train()
    for module in run.model.modules():
        if isinstance(module, _BatchNorm):
            module.train(run.config.updates_batch_norm)


@torch.no_grad()
def evaluate(run: Run, images: LabeledFiles) -> dict[str, float]:
    """Return accuracy in [0, 1] and mean loss on these images, not augmented, shared by all processes."""
    accelerator, config = run.accelerator, run.config
    run.model.eval()
    for statistic in norm_statistics(run.model).values():
        statistic.copy_(broadcast(statistic))  # every process gathered its own
    process = (accelerator.process_index, accelerator.num_processes)
    unchanged = ImageDataset(images, run.processor)
    sums = torch.zeros(2, dtype=torch.float64)  # correct answers, loss
    for pixels, labels in evaluation_batches(unchanged, config.eval_batch_size, process, config.dataloader_num_workers):
        # The bare model: accelerate's wrapper would wait for processes that have fewer batches.
        logits = run.model(pixel_values=to_device(run, pixels)).logits.float().cpu()  # (batch, classes)
        correct = (logits.argmax(dim=1) == labels).sum()
        sums += torch.stack([correct.double(), F.cross_entropy(logits, labels, reduction="sum").double()])
    correct, loss = (accelerator.reduce(sums.float().to(accelerator.device)) / len(images)).tolist()
    return {"accuracy": correct, "loss": loss}


def _best(run: Run, validations: list[dict[str, float]]) -> dict[str, float]:
    """Return the best validation of those with no more layers than the classifier may have."""
    lasting = first_lasting_step(layer_scores(run.model, ADAPTER_NAME), run.config.max_train_steps)
    return max((found for found in validations if found["step"] >= lasting), key=_merit)


def _merit(validation: dict[str, float]) -> tuple[float, float]:
    return validation["accuracy"], -validation["loss"]


def _changing(model: nn.Module) -> dict[str, Tensor]:
    """Collect all that training changes, by path."""
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    return {**trained, **norm_statistics(model)}


def _count_trainable(run: Run) -> dict[str, int]:
    head = count(head_parameters(run.model))
    trainable = count(parameter for parameter in run.model.parameters() if parameter.requires_grad)
    statistics = count(norm_statistics(run.model).values()) if run.config.updates_batch_norm else 0
    return {"adapter": trainable - head, "statistics": statistics, "head": head}


def _refuse_unless_finite(run: Run, step: int, name: str, value: float) -> None:
    if not math.isfinite(value):
        rates = ", ".join(f"{group['initial_lr']:g}" for group in run.optimizer.param_groups)
        raise UserError(f"step {step}: the {name} is {value}; lower learning_rate or head_learning_rate (now {rates})")
