"""The precision to compute in: bfloat16 where the processor or GPU has instructions for it, float32 elsewhere."""

from __future__ import annotations

import os
import sys
import warnings
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from atomdiff.utils.choices import Precision
from atomdiff.utils.errors import UserError

_DTYPES: dict[Precision, torch.dtype] = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_NAMES: dict[str, Precision] = {"no": "no", "float32": "no"}
_NAMES |= {"fp16": "fp16", "float16": "fp16", "bf16": "bf16", "bfloat16": "bf16"}
# Instructions that multiply numbers of each type, as torch and Linux name them.
_INSTRUCTIONS: dict[Precision, tuple[str, ...]] = {
    "bf16": ("amx_bf16", "avx512_bf16", "bf16"),
    "fp16": ("amx_fp16", "avx512_fp16", "fp16_arith", "asimdhp"),
    "no": (),
}
_NARROW = ("DEFAULT", "NO AVX", "AVX2")  # what torch's kernels are limited to on an x86 processor without AVX-512
_CONFIGURED = "ACCELERATE_MIXED_PRECISION"  # set by `accelerate launch`


@dataclass(frozen=True)
class ChosenPrecision:
    """A precision, and why it was chosen."""

    name: Precision
    """As accelerate calls it."""
    reason: str

    @property
    def dtype(self) -> torch.dtype:
        """As torch calls it."""
        return _DTYPES[self.name]

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')} ({self.reason})"


def choose_precision(asked: str | None, device: torch.device, *, field: str = "mixed_precision") -> ChosenPrecision:
    """Choose the precision of a run, an image or a benchmark.

    What was asked for goes first, then what accelerate is configured to; where neither says anything, it is bfloat16 if
    the device has instructions for it, else float32. Half precision that a processor has to emulate is warned of. On a
    GPU, accelerate's "no" says nothing: its launcher cannot leave it out.

    Args:
        asked: by accelerate's or torch's name ("bf16", "bfloat16"); None: nothing was asked for.
        device: where to compute.
        field: name of the option, for messages.

    Raises:
        UserError: accelerate is configured to a precision that is not known here.
    """
    configured = os.environ.get(_CONFIGURED)
    if configured == "no" and device.type != "cpu" and not _is_deepspeed():
        configured = None  # `accelerate launch` sets it where nothing is configured, too
    if asked is not None:
        chosen = ChosenPrecision(_NAMES[asked], "as asked for")
        source = f"{field}={asked!r}"
    elif configured is not None:
        if configured not in _NAMES:
            raise UserError(f"{_CONFIGURED}={configured!r}: expected one of no, fp16, bf16; or give {field}")
        chosen = ChosenPrecision(_NAMES[configured], f"as accelerate is configured; {field} decides otherwise")
        source = f"{_CONFIGURED}={configured}"
    else:
        return _fastest(device)
    if chosen.name != "no" and not has_instructions(chosen.name, device):
        kind = str(chosen.dtype).removeprefix("torch.")
        cost = ", about 12 times slower than float32" if device.type == "cpu" else ", slower than float32"
        found = f"{_describe(device)} has no {kind} instructions and emulates them{cost}"
        warnings.warn(f"{source}: {found}; leave it out, or ask for float32", stacklevel=1)  # shown once
    return chosen


def compute_device() -> torch.device:
    """Return the device of this process: the one that accelerate gives it, a GPU if there is one."""
    from accelerate import PartialState

    # Unasked, accelerate takes CPU processes for unrelated ones.
    device: torch.device = PartialState(cpu=not torch.accelerator.is_available()).device
    return device


def training_precision(asked: str | None) -> ChosenPrecision:
    """Choose the precision of a training run on this process's device, and say which and why on the main process.

    Raises:
        UserError: as `choose_precision`; or fp16 without a GPU.
    """
    device = compute_device()
    if device.type == "cpu" and _NAMES.get(asked or os.environ.get(_CONFIGURED, "no")) == "fp16":
        raise UserError("mixed_precision='fp16': needs a GPU; a CPU can do 'bf16' or 'no'")
    chosen = choose_precision(asked, device)
    log_precision(chosen, device)
    return chosen


def _is_deepspeed() -> bool:
    """Whether accelerate was launched with DeepSpeed, whose configuration has a precision of its own."""
    from accelerate.utils import parse_flag_from_env

    return bool(parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"))


def log_precision(chosen: ChosenPrecision, device: torch.device) -> None:
    """Say on the main process what is computed in, where, and why."""
    from accelerate import PartialState

    if PartialState().is_main_process:
        print(f"precision: {chosen} on {device.type}", file=sys.stderr)


def autocast(device: torch.device, asked: str | None = None) -> torch.autocast:
    """Make a `with` block that computes in the precision of `choose_precision`."""
    chosen = choose_precision(asked, device)
    return torch.autocast(device.type, chosen.dtype, enabled=chosen.name != "no")


def _fastest(device: torch.device) -> ChosenPrecision:
    where = _describe(device)
    if device.type == "mps":
        return ChosenPrecision("no", f"{where} may lack bfloat16 instructions")
    if has_instructions("bf16", device):
        return ChosenPrecision("bf16", f"{where} has instructions for it")
    return ChosenPrecision("no", f"{where} has no bfloat16 instructions")


def _describe(device: torch.device) -> str:
    return "this processor" if device.type == "cpu" else f"this GPU ({device.type})"


def has_instructions(name: Precision, device: torch.device) -> bool:
    """Return whether the device computes in a half precision rather than emulating it."""
    if device.type == "cpu":
        return not _limited() and any(cpu_capabilities().get(each) for each in _INSTRUCTIONS[name])
    if name == "fp16" or device.type == "mps":
        return True
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    supported = getattr(getattr(torch, device.type, None), "is_bf16_supported", None)
    return supported is not None and bool(supported())


def _limited() -> bool:
    """Return whether torch or oneDNN is built or told not to use the half-precision instructions of this processor."""
    if not torch.backends.mkldnn.is_available():  # which has the kernels
        return True
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA", os.environ.get("DNNL_MAX_CPU_ISA", "DEFAULT")).upper()
    wide = limit in ("DEFAULT", "ALL") or any(each in limit for each in ("BF16", "FP16", "AMX", "AVX10"))
    return not wide or torch.backends.cpu.get_cpu_capability() in _NARROW


@cache
def cpu_capabilities() -> dict[str, bool]:
    """Return the instructions of the processor that matter here, as torch or Linux lists them; {} if neither does."""
    names = {name for names in _INSTRUCTIONS.values() for name in names}
    if hasattr(torch.cpu, "get_capabilities"):  # torch 2.11 and later
        found = torch.cpu.get_capabilities()
        return {name: bool(found.get(name)) for name in names}
    if sys.platform == "linux":
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
        flags = {flag for line in lines if line.startswith(("flags", "Features")) for flag in line.split()}
        return {name: name in flags for name in names}
    return {}
