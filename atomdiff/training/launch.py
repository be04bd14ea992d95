"""Start of a run: accelerate, the optional packages that it needs, and its tracker."""

from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import GradientAccumulationPlugin, ProjectConfiguration

from atomdiff.training.config import TrainConfig
from atomdiff.training.config.optimizer import OptimizerConfig
from atomdiff.utils.atomic import writing
from atomdiff.utils.choices import Precision
from atomdiff.utils.errors import UserError
from atomdiff.utils.fields import NeedsPackage, marked_fields
from atomdiff.utils.precision import training_precision


def start_accelerator(config: TrainConfig) -> Accelerator:
    """Start accelerate with the run's precision, accumulation and tracker.

    Raises:
        UserError: This machine cannot do what is asked, such as fp16 without a GPU.
    """
    check_packages(config)
    if config.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
    folder = Path(config.output_dir)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    accelerator = new_accelerator(
        config.mixed_precision,
        gradient_accumulation_plugin=GradientAccumulationPlugin(config.gradient_accumulation_steps),
        log_with=config.report_to,
        project_config=ProjectConfiguration(str(folder), logging_dir=str(folder / config.logging_dir)),
    )
    if config.detect_anomaly and accelerator.mixed_precision == "fp16":
        expected = "expected mixed_precision bf16 or no: in fp16, steps that overflow are done again"
        raise UserError(f"detect_anomaly=True, mixed_precision='fp16': {expected}")
    if config.enable_xformers_memory_efficient_attention and accelerator.device.type != "cuda":
        expected = "use PyTorch's own attention (the default) or plain_attention"
        raise UserError(f"enable_xformers_memory_efficient_attention=True: needs a GPU; {expected}")
    return accelerator


def new_accelerator(mixed_precision: Precision | None, **options: Any) -> Accelerator:
    """Start accelerate with this precision and options of `Accelerator`, on a GPU if there is one.

    Raises:
        UserError: This machine cannot do what is asked.
    """
    AcceleratorState._reset_state()  # or the precision of this process's first run would stay for all
    try:
        precision = training_precision(mixed_precision).name
        # unasked, accelerate takes CPU processes for unrelated ones
        return Accelerator(mixed_precision=precision, cpu=not torch.accelerator.is_available(), **options)
    except (ValueError, ImportError) as error:
        raise UserError(f"accelerate cannot start: {error}") from error


def check_packages(config: OptimizerConfig) -> None:
    """Check that the optional packages that a run needs are installed.

    Raises:
        UserError: One is missing; the message says how to install it.
    """
    marked = marked_fields(type(config), NeedsPackage)
    needed = {field: package for field, package in marked.items() if getattr(config, field)}
    if config.optimizer_spec.needs:
        needed["optimizer"] = config.optimizer_spec.needs
    for field, package in needed.items():
        check_package(f"{field}={getattr(config, field)!r}", package)


def check_package(asked: str, package: NeedsPackage) -> None:
    """Check that an optional package is installed.

    Raises:
        UserError: It is not; the message names what was asked for and how to install the package.
    """
    if find_spec(package.package) is None:
        raise UserError(f'{asked}: {package.package} is missing; pip install "atomdiff[{package.extra}]"')


def frozen_dtype(accelerator: Accelerator) -> torch.dtype:
    """Return the precision of the weights of a run that are not trained."""
    return {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32)


def start_trackers(config: TrainConfig, accelerator: Accelerator) -> None:
    """Open the tracker, if there is one, and give it the run's settings, without the access token."""
    if config.report_to:
        settings = asdict(replace(config, hub_token=None))
        plain = (bool, int, float, str, type(None))
        fields = {name: value if isinstance(value, plain) else str(value) for name, value in settings.items()}
        accelerator.init_trackers("atomdiff", config=fields)
