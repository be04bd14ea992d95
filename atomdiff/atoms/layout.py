"""Weights seen as rows of small blocks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from einops import rearrange
from torch import Tensor

Block = tuple[int, int]

_WEIGHT = "(o p) (i q) n"


def fit_block(weight_shape: Sequence[int], channel_block: int) -> Block:
    """Choose the block of channels for one weight.

    Args:
        weight_shape: (out, in/groups, ...) as the module stores it; (in, out/groups, ...) where it is transposed.
        channel_block: wanted size of the block along both channel axes, at least 1.

    Returns:
        (p, q), the size along the first and the second axis; a side that `channel_block` does not divide gets 1.
    """
    first, second = weight_shape[:2]
    return (
        channel_block if first % channel_block == 0 else 1,
        channel_block if second % channel_block == 0 else 1,
    )


def as_kernels(weight: Tensor) -> Tensor:
    """Give a weight one kernel axis: (out, in/groups, ...) -> (out, in/groups, n), n positions in row-major order."""
    return weight.reshape(*weight.shape[:2], -1)


@dataclass(frozen=True)
class View:
    """A weight (out, in/groups, n) seen as rows of d numbers, one a block of p x q channels."""

    block: Block = (1, 1)
    """(p, q); (1, 1) makes every kernel a row."""
    whole: bool = True
    """Whether a row is a whole block, d = p * q * n, or its channels at one kernel position, d = p * q."""

    def axes(self, weight_shape: Sequence[int]) -> tuple[int, ...]:
        """The axes of a row, in their order; their product is d."""
        return (*self.block, *weight_shape[2:]) if self.whole else self.block

    def rows(self, weight: Tensor) -> Tensor:
        """All rows X (blocks, d) of a weight (out, in/groups, ...)."""
        rows = "(o i) (p q n)" if self.whole else "(o i n) (p q)"
        return rearrange(as_kernels(weight), f"{_WEIGHT} -> {rows}", **self._sides())

    def from_rows(self, rows: Tensor, weight_shape: Sequence[int]) -> Tensor:
        """What `rows` was made from: (blocks, d) -> (out, in/groups, ...)."""
        pattern = "(o i) (p q n)" if self.whole else "(o i n) (p q)"
        positions = math.prod(weight_shape[2:])
        weight = rearrange(
            rows, f"{pattern} -> {_WEIGHT}", o=weight_shape[0] // self.block[0], n=positions, **self._sides()
        )
        return weight.reshape(weight_shape)

    def columns(self, weight: Tensor, by_input: bool = False) -> Tensor:
        """The rows of a weight (out, in/groups, n) as columns (batch, d, width), gathered by output or by input blocks.

        A small matrix multiplies many long rows so, which is 10 times faster on a CPU than X @ S.
        """
        return rearrange(weight, f"{_WEIGHT} -> {self._columns(by_input)}", **self._sides())

    def from_columns(self, columns: Tensor, positions: int, by_input: bool = False) -> Tensor:
        """What `columns` was made from: (batch, d, width) -> (out, in/groups, n), n being `positions`."""
        return rearrange(columns, f"{self._columns(by_input)} -> {_WEIGHT}", n=positions, **self._sides())

    def coefficient_columns(self, coefficients: Tensor, weight_shape: Sequence[int], by_input: bool = False) -> Tensor:
        """Coefficients (blocks, m) in the order of `rows` -> (batch, m, width) in the order of `columns`."""
        rows, columns, sides = self._coefficients(weight_shape, by_input)
        return rearrange(coefficients, f"{rows} -> {columns}", **sides).contiguous()

    def coefficient_rows(self, columns: Tensor, weight_shape: Sequence[int], by_input: bool = False) -> Tensor:
        """Undo `coefficient_columns`: (batch, m, width) -> (blocks, m)."""
        rows, of_columns, sides = self._coefficients(weight_shape, by_input)
        return rearrange(columns, f"{of_columns} -> {rows}", **sides)

    def _coefficients(self, weight_shape: Sequence[int], by_input: bool) -> tuple[str, str, dict[str, int]]:
        rows = "(o i) m" if self.whole else "(o i n) m"
        columns = self._columns(by_input).replace("(p q n)" if self.whole else "(p q)", "m")
        return rows, columns, {"o": weight_shape[0] // self.block[0], "i": weight_shape[1] // self.block[1]}

    def _columns(self, by_input: bool) -> str:
        if not self.whole:
            return "o (p q) (n i)"
        return "i (p q n) o" if by_input else "o (p q n) i"

    def _sides(self) -> dict[str, int]:
        return {"p": self.block[0], "q": self.block[1]}
