"""The plain variant of the method: what is trained of a layer's atoms, and what other variants override."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from atomdiff.atoms.layout import View

if TYPE_CHECKING:
    from atomdiff.atoms.settings import AtomSettings
    from atomdiff.tuner.config import AtomConfig

_RANDOM_START = 0.5  # size of a random start: about that of the change of a weight, relative to the weight


@dataclass(frozen=True)
class Atoms:
    """Atoms D (m, d) on one view of a layer's weight, whose delta dD (m, d) is trained.

    The plain variant: atoms of kernels, and beside them those of channel blocks. Other variants of the atoms of kernels
    override what differs.
    """

    name: str
    """First part of the tensors' names: `atom`, or `channel` for those of channel blocks."""
    view: View
    """The rows that the atoms belong to."""
    axes: tuple[int, ...]
    """The axes of a row; their product is d."""
    num_atoms: int
    """m."""

    parameter_names: ClassVar[tuple[str, ...]] = ("atom_delta", "channel_delta")
    """All trained tensors there may be, as files name them."""
    shared_names: ClassVar[tuple[str, ...]] = ()
    """Those of them that are one parameter in all layers where they have the same shape."""
    only_kernels: ClassVar[bool] = True
    """Whether layers without a kernel have plain atoms."""
    takes_blocks: ClassVar[bool] = False
    """Whether a row is a whole block of channels with its kernels, so that there are no atoms of channels beside it."""

    @classmethod
    def is_chosen(cls, config: AtomSettings) -> bool:
        """Whether a config means this variant."""
        return True

    @classmethod
    def check(cls, config: AtomSettings) -> None:
        """Check the variant's own fields, also where it is not chosen.

        Raises:
            ValueError: a field has a value it may not have, or contradicts another one.
        """

    @classmethod
    def check_targets(cls, config: AtomSettings, layers: Mapping[str, Sequence[Atoms]]) -> None:
        """Check, where the variant is chosen, that it has something to act on in the matching layers.

        Raises:
            ValueError: it has not.
        """

    @classmethod
    def label(cls, config: AtomSettings) -> str:
        """How reports and model cards describe it."""
        return f"channel blocks of {config.channel_block}"

    @classmethod
    def why_not_fitted(cls, config: AtomSettings) -> str:
        """Why least squares cannot fit its deltas to a tuned weight; empty: they can."""
        return ""

    @classmethod
    def of_kernels(cls, config: AtomSettings, view: View, weight_shape: Sequence[int], num_atoms: int) -> Atoms:
        """The atoms of the kernels, or whole blocks, of a layer."""
        return cls("atom", view, view.axes(weight_shape), num_atoms)

    @classmethod
    def of_channels(cls, config: AtomSettings, view: View) -> Atoms:
        """The atoms of the channel blocks of a layer."""
        return Atoms("channel", view, view.block, math.prod(view.block))

    @property
    def size(self) -> int:
        """d, the length of a row."""
        return math.prod(self.axes)

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of each trained tensor."""
        return {f"{self.name}_delta": (self.num_atoms, self.size)}

    def initial_tensors(self, config: AtomConfig, seed: int) -> dict[str, Tensor]:
        """Name -> what each trained tensor starts from: zeros, or random values without `init_weights`."""
        is_zero = config.init_weights or config.filled_by_loader
        return {
            name: torch.zeros(shape) if is_zero else _RANDOM_START * torch.randn(shape) / shape[-1] ** 0.5
            for name, shape in self.parameter_shapes().items()
        }

    @property
    def delta_name(self) -> str:
        """Name of the trained tensor (..., d) that the delta is linear in."""
        return f"{self.name}_delta"

    def delta(self, tensor: Callable[[str], Tensor]) -> Tensor:
        """Delta dD (m, d), or (in, m, d) where `view.by_input`; `tensor` gives trained tensors and atoms by name."""
        return tensor(self.delta_name)

    @classmethod
    def deltas(cls, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`delta_name` -> delta of all atoms of a layer, from its tensors alone."""
        return {name: tensor for name, tensor in tensors.items() if name.endswith("_delta")}

    def stored_shapes(self, config: AtomSettings) -> dict[str, tuple[int, ...]]:
        """Name -> shape of each tensor in a file."""
        basis = {f"{self.name}_basis": (self.num_atoms, self.size)} if config.stores_basis else {}
        return self.parameter_shapes() | basis


def check_count(name: str, count: Any) -> None:
    """Check that a field is a whole number of at least 1.

    Raises:
        ValueError: it is not.
    """
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise ValueError(f"{name}={count!r}: expected a whole number of at least 1")
