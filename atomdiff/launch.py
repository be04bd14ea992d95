"""How a run starts: accelerate, with the packages that the run asks for, and its tracker."""

from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import GradientAccumulationPlugin, ProjectConfiguration

from atomdiff.errors import UserError
from atomdiff.train_config import TrainConfig

_EXTRAS = {"use_8bit_adam": "bitsandbytes", "enable_xformers_memory_efficient_attention": "xformers"}


def start_accelerator(config: TrainConfig) -> Accelerator:
    """Start accelerate with the run's precision, accumulation and tracker.

    Raises:
        UserError: This machine cannot do what is asked, such as fp16 without a GPU.
    """
    for field, package in _EXTRAS.items():
        if getattr(config, field) and find_spec(package) is None:
            raise UserError(f'{field}=True: {package} is missing; pip install "atomdiff[gpu]"')
    folder = Path(config.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    AcceleratorState._reset_state()  # or the precision of this process's first run would stay for all
    try:
        accelerator = Accelerator(
            mixed_precision=config.mixed_precision,
            cpu=not torch.accelerator.is_available(),  # unasked, accelerate takes CPU processes for unrelated ones
            gradient_accumulation_plugin=GradientAccumulationPlugin(config.gradient_accumulation_steps),
            log_with=config.report_to,
            project_config=ProjectConfiguration(str(folder), logging_dir=str(folder / config.logging_dir)),
        )
    except (ValueError, ImportError) as error:
        raise UserError(f"accelerate cannot start: {error}") from error
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise UserError("mixed_precision='fp16': needs a GPU; a CPU can do 'bf16' or 'no'")
    return accelerator


def start_trackers(config: TrainConfig, accelerator: Accelerator) -> None:
    """Open the tracker, if there is one, and give it the run's settings."""
    if config.report_to:
        plain = (bool, int, float, str, type(None))
        fields = {name: value if isinstance(value, plain) else str(value) for name, value in asdict(config).items()}
        accelerator.init_trackers("atomdiff", config=fields)
