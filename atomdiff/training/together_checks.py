"""Which runs can be trained in one batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields

from torch import nn

from atomdiff.training.config import TrainConfig
from atomdiff.training.config.memory import MemoryConfig
from atomdiff.training.config.train import TrainingBaseConfig
from atomdiff.training.run import Run
from atomdiff.tuner.read_config import read_adapter
from atomdiff.utils.errors import UserError

_METHODS = ("ATOMS", "LORA", "LOHA", "LOKR", "OFT", "IA3", "LN_TUNING")
"""Those whose layers were compared with the same layers alone."""
_ALIKE = (
    *(field.name for group in (TrainingBaseConfig, MemoryConfig) for field in fields(group)),
    *("adapter", "max_train_steps", "gradient_accumulation_steps", "mixed_precision", "preservation"),
    *("train_text_encoder", "detect_anomaly"),
)
_REFUSED = {
    "train_text_encoder": "each subject would need text encoders of its own",
    "load_in_8bit": "quantized weights cannot be shared by subjects",
    "load_in_4bit": "quantized weights cannot be shared by subjects",
    "detect_anomaly": "it would check what is computed for all subjects",
}
_RANDOM = "the random numbers of dropout would not be those of a subject alone"


def check_together(runs: Sequence[TrainConfig]) -> None:
    """Check that runs can be trained in one batch.

    Raises:
        UserError: They cannot; the message says why.
    """
    advice = "; or train with subjects_per_batch 1"
    for name in _ALIKE:
        if len(values := {str(getattr(run, name)) for run in runs}) > 1:
            raise UserError(f"{name}={', '.join(sorted(values))}: expected the same for all subjects{advice}")
    config = runs[0]
    adapter = read_adapter(config.adapter)
    method = "full" if adapter is None else str(getattr(adapter.peft_type, "value", adapter.peft_type))
    if method not in _METHODS:
        why = "each subject would need a base of its own" if adapter is None else "it was not tried in one batch"
        raise UserError(f"adapter={config.adapter!r} ({method}): {why}; expected one of {', '.join(_METHODS)}{advice}")
    for name, value in vars(adapter).items():
        if "dropout" in name and value:
            raise UserError(f"adapter={config.adapter!r}, {name}={value!r}: {_RANDOM}; expected 0{advice}")
    for name, why in _REFUSED.items():
        if getattr(config, name):
            raise UserError(f"{name}={getattr(config, name)!r}: {why}; leave it out{advice}")


def check_started(run: Run) -> None:
    """Check what can be told only of a run that is there.

    Raises:
        UserError: It cannot be trained in one batch with others.
    """
    accelerator, advice = run.accelerator, "train with subjects_per_batch 1"
    if accelerator.num_processes > 1:
        raise UserError(f"found {accelerator.num_processes} processes: expected one; or {advice}")
    if accelerator.scaler is not None:
        why = "the scale of the losses would be one for all subjects"
        raise UserError(f"mixed_precision='fp16': {why}; expected bf16 or no; or {advice}")
    if any(isinstance(module, nn.Dropout) and module.p for module in run.model.denoiser.modules()):
        raise UserError(f"the base has dropout: {_RANDOM}; {advice}")
