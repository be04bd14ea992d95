"""The optimizer of a training run, built from its `OptimizerSpec`, and its learning-rate schedule."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from diffusers.optimization import get_scheduler
from torch import nn

from atomdiff.training.config.optimizer import OptimizerConfig, ParameterGroup
from atomdiff.training.sharding import split_like


def build_optimizer(
    config: OptimizerConfig, parameter_groups: Mapping[ParameterGroup, Sequence[nn.Parameter]], scale: float = 1.0
) -> tuple[torch.optim.Optimizer, Callable[[int], float]]:
    """Build the optimizer, with a parameter group, and its `name`, for each of those that are trained.

    Token embeddings have no weight decay. All learning rates are multiplied by `scale`.

    Returns:
        The optimizer, and a function from the number of steps done to the factor on each group's `initial_lr`.
    """
    groups: list[dict[str, Any]] = [
        {
            "name": name,
            "params": parameters,
            "lr": config.learning_rates[name] * scale,
            "weight_decay": 0.0 if name == "token" else config.adam_weight_decay,
        }
        for name, parameters in parameter_groups.items()
    ]
    settings = {
        "lr": groups[0]["lr"] or 1.0,  # which nothing but the schedule "polynomial" looks at: it starts from there
        "betas": (config.adam_beta1, config.adam_beta2),
        "eps": config.adam_epsilon,
    }
    spec = config.optimizer_spec
    build = spec.build_8bit if config.use_8bit_adam and spec.build_8bit else spec.build
    optimizer = build(config, groups, settings)
    schedule = get_scheduler(
        config.lr_scheduler,
        optimizer,
        num_warmup_steps=config.lr_warmup_steps,
        num_training_steps=config.max_train_steps,
        num_cycles=config.lr_num_cycles,
        power=config.lr_power,
    )
    return optimizer, schedule.lr_lambdas[0]


def current_rate(optimizer: torch.optim.Optimizer) -> float:
    """Return the first group's learning rate, the adapter's if there is one; with Prodigy times its step size."""
    group = optimizer.param_groups[0]
    rate: float = group["lr"] * group.get("d", 1.0)
    return rate


def load_optimizer(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """Load a `state_dict()`; learning rates stay those that the optimizer was built with."""
    groups = [
        {**then, "lr": now["lr"], "initial_lr": now["initial_lr"]}
        for then, now in zip(saved["param_groups"], optimizer.param_groups, strict=True)
    ]
    numbers = [number for group in saved["param_groups"] for number in group["params"]]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state = {
        number: {name: split_like(parameter, value) for name, value in saved["state"][number].items()}
        for number, parameter in zip(numbers, parameters, strict=True)
        if number in saved["state"]
    }
    optimizer.load_state_dict({**saved, "state": state, "param_groups": groups})
