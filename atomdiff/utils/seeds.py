"""Seeds for every use of randomness in a run, all derived from the one of its config."""

import hashlib
from contextlib import AbstractContextManager


def derive_seed(seed: int, *path: str | int) -> int:
    """Return a seed (63 bits) for one use of randomness, from the run's seed and the name of the use."""
    digest = hashlib.sha256(repr((seed, *path)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def fork_rng() -> AbstractContextManager[None]:
    """Make a `with` block after which torch's generators are as before, those of the CPU and of this process's GPU."""
    import torch

    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    return torch.random.fork_rng(devices=devices)  # unasked, it takes all GPUs and warns of it
