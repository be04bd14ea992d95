"""What is trained of one layer: one factor or two, each a small set of atoms on one view of the weight."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from atomdiff.atoms.layout import View, fit_block
from atomdiff.tuner.config import AtomConfig


@dataclass(frozen=True)
class Factor:
    """Atoms D (m, d) of a layer and the shapes of what is trained in their place."""

    kind: Literal["atom", "channel"]
    """First part of the tensors' names: atoms of kernels and whole blocks, or of channels."""
    view: View
    """The rows that the atoms belong to."""
    axes: tuple[int, ...]
    """The axes of a row; their product is d."""
    num_atoms: int
    """m."""
    recursion: int | None = None
    """m1, the number of atoms that each atom is a combination of; None: the atoms are trained themselves."""
    inputs: int = 0
    """Number of input channels, that combine them each in its own way."""

    @property
    def size(self) -> int:
        """d, the length of a row."""
        return math.prod(self.axes)

    def trained(self) -> dict[str, tuple[int, ...]]:
        """Tensor kind -> shape of what is trained."""
        if self.recursion is None:
            return {f"{self.kind}_delta": (self.num_atoms, self.size)}
        return {
            "recursion_delta": (self.num_atoms, self.recursion, self.size),
            "recursion_mix": (self.inputs, self.num_atoms, self.recursion),
        }

    def stored(self, config: AtomConfig) -> dict[str, tuple[int, ...]]:
        """Tensor kind -> shape of what a file holds."""
        basis = {f"{self.kind}_basis": (self.num_atoms, self.size)} if config.stores_basis else {}
        return self.trained() | basis


def factors_of(config: AtomConfig, module_name: str, weight_shape: Sequence[int]) -> tuple[Factor, ...]:
    """The factors of one layer: of its kernels (or whole blocks), and of its channel blocks.

    A layer without a kernel has only the latter; if it has no blocks either, one number that scales its weight.

    Args:
        config: settings of the adapter.
        module_name: path of the layer.
        weight_shape: (out, in/groups, ...).

    Raises:
        ValueError: `config.num_atoms` exceeds the numbers in a row, which only the basis `sparse` allows.
    """
    block = fit_block(weight_shape, config.block_of(module_name))
    has_kernel = math.prod(weight_shape[2:]) > 1
    factors = []
    if has_kernel or block == (1, 1):
        view = View(block if config.joint else (1, 1))
        axes = view.axes(weight_shape)
        size = math.prod(axes)
        num_atoms = (config.num_atoms or size) if has_kernel else 1
        if num_atoms > size and config.basis != "sparse":
            row = f"a block of {block[0]} x {block[1]} kernels" if config.joint else "the kernel"
            raise ValueError(
                f"num_atoms={num_atoms}, but {row} of {module_name} has only {size} numbers: "
                f"use at most {size}, or None for all; more than that takes basis='sparse'"
            )
        recursion = config.recursion if has_kernel else None
        factors.append(Factor("atom", view, axes, num_atoms, recursion, weight_shape[1]))
    if block != (1, 1) and not (config.joint and has_kernel):
        view = View(block, whole=False)
        factors.append(Factor("channel", view, view.axes(weight_shape), math.prod(block)))
    return tuple(factors)
