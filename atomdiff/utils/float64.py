"""Double precision, on devices that have none, too."""

import torch
from torch import Tensor

_WITHOUT_FLOAT64 = ("mps", "xpu")


def in_float64(tensor: Tensor) -> Tensor:
    """A tensor in float64: on its device, or on the CPU where that has none (Apple's GPUs, some of Intel's)."""
    near = tensor.cpu() if tensor.device.type in _WITHOUT_FLOAT64 else tensor
    return near.to(torch.float64)  # a call of its own: the move itself would convert on the device
