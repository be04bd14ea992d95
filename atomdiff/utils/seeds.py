"""Seeds for every use of randomness in a run, all derived from the one of its config."""

import hashlib


def derive_seed(seed: int, *path: str | int) -> int:
    """Return a seed (63 bits) for one use of randomness, from the run's seed and the name of the use."""
    digest = hashlib.sha256(repr((seed, *path)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
