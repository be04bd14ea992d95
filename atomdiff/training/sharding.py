"""Runs whose weights or optimizer states are split among processes: what they cannot do, and how weights become whole.

FSDP2 (`torch.distributed.fsdp.fully_shard`) gives each process a part of every parameter, as a DTensor: Zhao et al.,
"PyTorch FSDP: Experiences on Scaling Fully Sharded Data Parallel", arXiv 2304.11277. Stage 2 of DeepSpeed's ZeRO splits
gradients and optimizer states: Rajbhandari et al., "ZeRO: Memory Optimizations Toward Training Trillion Parameter
Models", arXiv 1910.02054.
"""

from typing import Any

from accelerate import Accelerator
from accelerate.utils import DistributedType, parse_flag_from_env
from peft import PeftConfig
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from atomdiff.training.config import TrainConfig
from atomdiff.tuner import AtomConfig
from atomdiff.utils.errors import UserError

_ASKED = {DistributedType.FSDP: "ACCELERATE_USE_FSDP", DistributedType.DEEPSPEED: "ACCELERATE_USE_DEEPSPEED"}

# The only value that an option may have, and why.
_EITHER = {"optimizer": "adamw", "use_8bit_adam": False, "init_from": None}
_FSDP = _EITHER | {
    "train_token": False,
    "use_ema": False,
    "validation_steps": 0,
    "save_steps": 0,
    "validation_loss_steps": 0,
    "preservation": "none",
    "load_in_8bit": False,
    "load_in_4bit": False,
}
_DEEPSPEED = _EITHER | {"checkpointing_steps": 0, "resume_from_checkpoint": None}
_WHY = {
    DistributedType.FSDP: "a process has only a part of each weight while it trains",
    DistributedType.DEEPSPEED: "it moves the parameters itself, and a process has only a part of the optimizer's state",
}


def check_sharding(config: TrainConfig, accelerator: Accelerator, adapter: PeftConfig | None) -> None:
    """Check that what is asked for can be done with weights or states that are split among processes.

    Raises:
        UserError: It cannot; or FSDP or DeepSpeed is asked for where accelerate would pass over it, as on a CPU.
    """
    kind = accelerator.distributed_type
    for asked, variable in _ASKED.items():
        if parse_flag_from_env(variable) and kind != asked:
            found = f"accelerate is configured for {asked.value}, but starts {kind.value} on {accelerator.device.type}"
            raise UserError(f"{found}; expected a launch on GPUs, or another file of configs/accelerate/")
    if kind not in _ASKED:
        return
    if kind == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise UserError("FSDP: found fsdp_version 1 in the config of accelerate; expected fsdp_version: 2")
    wrong = [
        (f"{name}={value!r}", f"{name}={allowed!r}")
        for name, allowed in (_FSDP if kind == DistributedType.FSDP else _DEEPSPEED).items()
        if (value := getattr(config, name)) != allowed
    ]
    precision, precisions = accelerator.mixed_precision, ("no", "bf16") if kind == DistributedType.FSDP else ("no",)
    if precision not in precisions:
        wrong.append((f"mixed_precision={precision!r}", f"mixed_precision={' or '.join(map(repr, precisions))}"))
    if kind == DistributedType.DEEPSPEED and config.train_token and config.token_steps < config.max_train_steps:
        fraction = f"train_text_encoder_ti_frac={config.train_text_encoder_ti_frac}"
        wrong.append((fraction, "train_text_encoder_ti_frac=1"))
    if isinstance(adapter, AtomConfig):
        fixed = {"select": "all", "share": None}
        wrong += [
            (f"{name}={value!r} in the adapter", f"{name}={allowed!r}")
            for name, allowed in fixed.items()
            if (value := getattr(adapter, name)) != allowed
        ]
    if wrong:
        values, expected = (", ".join(texts) for texts in zip(*wrong, strict=True))
        raise UserError(f"{kind.value}: found {values}; expected {expected}: {_WHY[kind]}")


def configure_deepspeed(config: TrainConfig, accelerator: Accelerator) -> None:
    """Tell DeepSpeed, if it is there, what it would ask a data loader and does itself: batch size and clipping."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        told = {"train_micro_batch_size_per_gpu": config.train_batch_size, "gradient_clipping": config.max_grad_norm}
        accelerator.state.deepspeed_plugin.deepspeed_config.update(told)


def whole(value: Any) -> Any:
    """Return a tensor, or tensors in nested dicts and lists, with all parts; to be called on all processes."""
    if isinstance(value, DTensor):
        tensor: Any = value.detach()
        return tensor.full_tensor()
    if isinstance(value, dict):
        return {name: whole(each) for name, each in value.items()}
    return [whole(each) for each in value] if isinstance(value, list) else value


def split_like(parameter: Tensor, value: Any) -> Any:
    """Return this process's part of a tensor of a parameter's shape, if it has only a part of the parameter."""
    if not isinstance(parameter, DTensor) or not isinstance(value, Tensor) or value.shape != parameter.shape:
        return value
    return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)


def gather_weights(model: nn.Module) -> None:
    """Give a model whole weights, on the CPU, in place of those that are split; it cannot be trained any more.

    To be called on all processes; each parameter is on the device once, one after the other.
    """
    gathered: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if isinstance(parameter, DTensor):
                if parameter not in gathered:
                    tensor = whole(parameter).to("cpu", copy=True)
                    gathered[parameter] = nn.Parameter(tensor, requires_grad=parameter.requires_grad)
                module._parameters[name] = gathered[parameter]
