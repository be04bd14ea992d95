"""The directions in which a delta changes a weight, the one that changes it most first."""

from __future__ import annotations

import torch
from torch import Tensor

_LEAST = 1e-6  # of the largest importance: what is below is rounding


def principal_directions(delta: Tensor, energies: Tensor) -> tuple[Tensor, Tensor]:
    """The right singular vectors v_k of the change A @ dD of the rows of a weight, and how much each changes it.

    Importance is |A @ dD @ v_k| / |X|, the norm of the weight's relative change along v_k. The first few directions
    make the change of that rank which is closest to A @ dD (Eckart, Young).

    Args:
        delta: dD (..., m, d); the changes by all of its leading axes count alike.
        energies: diagonal of A.T @ A over |X|^2, (m,): the share of the weight that each atom makes up.

    Returns:
        Importance (n,), descending, and directions (d, n), orthonormal, in float64; n is the rank of the change.
    """
    scaled = delta.to(torch.float64) * energies.to(torch.float64).sqrt()[:, None]
    rows = scaled.reshape(-1, delta.shape[-1])
    squares, vectors = torch.linalg.eigh(rows.T @ rows / max(delta[..., 0, 0].numel(), 1))  # ascending
    importance, vectors = squares.clamp(min=0).sqrt().flip(0), vectors.flip(1)
    rank = int((importance > _LEAST * importance[0]).sum())
    return importance[:rank], vectors[:, :rank]


def truncate(atoms: Tensor, delta: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
    """Orthonormal atoms (k, d) and a delta (k, d) that make the same change as `delta`, along k directions alone.

    D'.T @ dD' = D.T @ dD @ V @ V.T, for orthonormal atoms D (m, d), delta dD (m, d) and directions V (d, k).
    """
    wide = directions.to(torch.float64)
    new_atoms, triangle = torch.linalg.qr(
        atoms.to(torch.float64).T @ (delta.to(torch.float64) @ wide)
    )  # (d, k), (k, k)
    return new_atoms.T.to(atoms.dtype).contiguous(), (triangle @ wide.T).to(delta.dtype).contiguous()
