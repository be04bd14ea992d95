"""How a run starts: accelerate, with the packages that the run asks for, and its tracker."""

from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import GradientAccumulationPlugin, ProjectConfiguration

from atomdiff.training.config import TrainConfig
from atomdiff.utils.atomic import writing
from atomdiff.utils.errors import UserError
from atomdiff.utils.precision import training_precision

# Field and value -> the package that they need, and the extra that it comes with.
_EXTRAS: dict[tuple[str, Any], tuple[str, str]] = {
    ("use_8bit_adam", True): ("bitsandbytes", "gpu"),
    ("load_in_8bit", True): ("bitsandbytes", "gpu"),
    ("load_in_4bit", True): ("bitsandbytes", "gpu"),
    ("enable_xformers_memory_efficient_attention", True): ("xformers", "gpu"),
    ("optimizer", "prodigy"): ("prodigyopt", "optimizers"),
    ("optimizer", "adamw_schedulefree"): ("schedulefree", "optimizers"),
}


def start_accelerator(config: TrainConfig) -> Accelerator:
    """Start accelerate with the run's precision, accumulation and tracker.

    Raises:
        UserError: This machine cannot do what is asked, such as fp16 without a GPU.
    """
    for (field, value), (package, extra) in _EXTRAS.items():
        if getattr(config, field) == value and find_spec(package) is None:
            raise UserError(f'{field}={value!r}: {package} is missing; pip install "atomdiff[{extra}]"')
    if config.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
    folder = Path(config.output_dir)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    AcceleratorState._reset_state()  # or the precision of this process's first run would stay for all
    try:
        accelerator = Accelerator(
            mixed_precision=training_precision(config.mixed_precision).name,
            cpu=not torch.accelerator.is_available(),  # unasked, accelerate takes CPU processes for unrelated ones
            gradient_accumulation_plugin=GradientAccumulationPlugin(config.gradient_accumulation_steps),
            log_with=config.report_to,
            project_config=ProjectConfiguration(str(folder), logging_dir=str(folder / config.logging_dir)),
        )
    except (ValueError, ImportError) as error:
        raise UserError(f"accelerate cannot start: {error}") from error
    if config.enable_xformers_memory_efficient_attention and accelerator.device.type != "cuda":
        expected = "PyTorch's own attention (the default) or plain_attention serve this machine"
        raise UserError(f"enable_xformers_memory_efficient_attention=True: needs a GPU; {expected}")
    return accelerator


def frozen_dtype(accelerator: Accelerator) -> torch.dtype:
    """Return the precision of the weights of a run that are not trained."""
    return {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32)


def start_trackers(config: TrainConfig, accelerator: Accelerator) -> None:
    """Open the tracker, if there is one, and give it the run's settings."""
    if config.report_to:
        plain = (bool, int, float, str, type(None))
        fields = {name: value if isinstance(value, plain) else str(value) for name, value in asdict(config).items()}
        accelerator.init_trackers("atomdiff", config=fields)
