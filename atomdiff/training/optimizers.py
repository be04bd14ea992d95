"""The optimizer of a training run and the course of its learning rates.

AdamW: Loshchilov, Hutter, "Decoupled Weight Decay Regularization", arXiv 1711.05101; its state in 8 bits: Dettmers et
al., "8-bit Optimizers via Block-wise Quantization", arXiv 2110.02861; Prodigy: Mishchenko, Defazio, "Prodigy: An
Expeditiously Adaptive Parameter-Free Learner", arXiv 2306.06101; schedule-free AdamW: Defazio et al., "The Road Less
Scheduled", arXiv 2405.15682.
"""

from collections.abc import Callable
from typing import Any

import torch
from diffusers.optimization import get_scheduler

from atomdiff.training.config import TrainConfig
from atomdiff.training.model import TrainingModel


def build_optimizer(
    config: TrainConfig, concept: TrainingModel, processes: int = 1
) -> tuple[torch.optim.Optimizer, Callable[[int], float]]:
    """Build the optimizer: a group, with its `name`, for each of `concept.parameter_groups()`.

    Words have no weight decay. Prodigy finds one length of step for all groups together.

    Args:
        config: The run.
        concept: What is trained.
        processes: How many processes share the run.

    Returns:
        The optimizer, and a function from the number of steps done to the factor on each group's `initial_lr`.
    """
    photos = config.train_batch_size * config.gradient_accumulation_steps * processes if config.scale_lr else 1
    groups: list[dict[str, Any]] = [
        {
            "name": name,
            "params": parameters,
            "lr": config.learning_rates[name] * photos,
            "weight_decay": 0.0 if name == "token" else config.adam_weight_decay,
        }
        for name, parameters in concept.parameter_groups().items()
    ]
    optimizer = _optimizer(config, groups)
    schedule = get_scheduler(
        config.lr_scheduler,
        optimizer,
        num_warmup_steps=config.lr_warmup_steps,
        num_training_steps=config.max_train_steps,
        num_cycles=config.lr_num_cycles,
        power=config.lr_power,
    )
    return optimizer, schedule.lr_lambdas[0]


def _optimizer(config: TrainConfig, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    settings: dict[str, Any] = {
        "lr": groups[0]["lr"] or 1.0,  # which nothing but the schedule "polynomial" looks at: it starts from there
        "betas": (config.adam_beta1, config.adam_beta2),
        "eps": config.adam_epsilon,
    }
    if config.optimizer == "prodigy":
        from prodigyopt import Prodigy

        safe = {"use_bias_correction": True, "safeguard_warmup": True}  # as in diffusers' scripts
        prodigy: torch.optim.Optimizer = Prodigy(groups, d_coef=config.prodigy_d_coef, **safe, **settings)
        return prodigy
    if config.optimizer == "adamw_schedulefree":
        from schedulefree import AdamWScheduleFree

        schedule_free = AdamWScheduleFree(groups, **settings)
        schedule_free.train()
        return schedule_free  # type: ignore[no-any-return]
    if config.use_8bit_adam:
        from bitsandbytes.optim import AdamW8bit

        eight_bit: torch.optim.Optimizer = AdamW8bit(groups, **settings)
        return eight_bit
    return torch.optim.AdamW(groups, fused=True, **settings)


def current_rate(optimizer: torch.optim.Optimizer) -> float:
    """Return the adapter's learning rate; with Prodigy times the length of step that it has found."""
    group = optimizer.param_groups[0]
    rate: float = group["lr"] * group.get("d", 1.0)
    return rate


def load_optimizer(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """Put back a `state_dict()`; learning rates stay those that the optimizer was built with."""
    groups = [
        {**then, "lr": now["lr"], "initial_lr": now["initial_lr"]}
        for then, now in zip(saved["param_groups"], optimizer.param_groups, strict=True)
    ]
    optimizer.load_state_dict({**saved, "param_groups": groups})
