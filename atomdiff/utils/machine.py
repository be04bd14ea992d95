"""What a result was computed on: processor and device, in words."""

import os
import platform
import re
from pathlib import Path

_GB = 1e9


def describe_processor() -> str:
    """Return the processor's name, its cores, torch's threads and kernels, and its half precisions."""
    import torch

    from atomdiff.utils.precision import cpu_capabilities

    names = [name for name, has in sorted(cpu_capabilities().items()) if has]
    cpuinfo, model = Path("/proc/cpuinfo"), platform.processor()
    if cpuinfo.is_file() and (found := re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text(errors="replace"))):
        model = found[1]
    kernels = torch.backends.cpu.get_cpu_capability()
    half = f", half precision: {', '.join(names)}" if names else ", no half precision"
    return f"{model or 'unknown'}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, {kernels}{half}"


def describe_device() -> str:
    """Return the GPUs of this machine, with their memory and the version of CUDA; "cpu" if there are none."""
    import torch

    if not torch.accelerator.is_available():
        return "cpu"
    kind = torch.accelerator.current_accelerator()
    if kind is None or kind.type != "cuda":
        return str(kind)
    each = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    gpus = ", ".join(f"{gpu.name} with {gpu.total_memory / _GB:.0f} GB" for gpu in each)
    return f"cuda: {gpus}; CUDA {torch.version.cuda}"
