"""The optimizer of a training run and the course of its learning rates."""

from collections.abc import Callable
from typing import Any

import torch
from diffusers.optimization import get_scheduler

from atomdiff.concept import Concept
from atomdiff.train_config import TrainConfig


def build_optimizer(config: TrainConfig, concept: Concept) -> tuple[torch.optim.Optimizer, Callable[[int], float]]:
    """Build AdamW: one group for the adapter, one without weight decay for the trigger word's vector.

    Returns:
        The optimizer, and a function from the number of steps done to the factor on each group's `initial_lr`.
    """
    token = concept.token_vector
    adapter = [parameter for parameter in concept.trained().values() if parameter is not token]
    groups: list[dict[str, Any]] = [
        {"params": adapter, "lr": config.learning_rate, "weight_decay": config.adam_weight_decay}
    ]
    if token is not None:
        groups.append({"params": [token], "lr": config.token_learning_rate, "weight_decay": 0.0})
    betas = (config.adam_beta1, config.adam_beta2)
    settings: dict[str, Any] = {"lr": config.learning_rate, "betas": betas, "eps": config.adam_epsilon}
    if config.use_8bit_adam:
        from bitsandbytes.optim import AdamW8bit

        optimizer: torch.optim.Optimizer = AdamW8bit(groups, **settings)
    else:
        optimizer = torch.optim.AdamW(groups, fused=True, **settings)
    schedule = get_scheduler(
        config.lr_scheduler,
        optimizer,
        num_warmup_steps=config.lr_warmup_steps,
        num_training_steps=config.max_train_steps,
        num_cycles=config.lr_num_cycles,
        power=config.lr_power,
    )
    return optimizer, schedule.lr_lambdas[0]
