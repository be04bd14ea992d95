"""The result of an extraction: the atoms, and how much of the tuning they explain."""

from __future__ import annotations

import math
from dataclasses import dataclass

from atomdiff.concepts.concept_file import ConceptFile


@dataclass(frozen=True)
class ExtractedLayer:
    """One layer that was tuned."""

    module: str
    """Its path, with the component."""
    size: float
    """Frobenius norm of the base weight."""
    difference: float
    """Frobenius norm of tuned minus base weight."""
    residual: float
    """Frobenius norm of the part of it that the atoms do not explain."""

    @property
    def explained(self) -> float:
        """1 - |residual|^2 / |difference|^2."""
        return 1 - (self.residual / self.difference) ** 2


@dataclass(frozen=True)
class Extraction:
    """A concept, and how much of the tuning it explains."""

    concept: ConceptFile
    """The contents of the concept file."""
    layers: tuple[ExtractedLayer, ...]
    """The layers that atoms adapt and tuning changed."""
    unexplained: dict[str, tuple[int, float]]
    """Kind of other parameters that were tuned -> how many, and the Frobenius norm of their differences."""
    other_models: dict[str, int]
    """Other components of the pipeline that were tuned -> how many of their tensors differ."""

    @property
    def explained(self) -> float:
        """Share of the squared difference that is explained, over the layers that atoms adapt."""
        return self._share(0.0)

    @property
    def explained_of_all(self) -> float:
        """Share of the squared difference that is explained, over all parameters of the model."""
        return self._share(math.hypot(*(size for _, size in self.unexplained.values())))

    def _share(self, rest: float) -> float:
        residual = math.hypot(rest, *(layer.residual for layer in self.layers))
        return 1 - (residual / math.hypot(rest, *(layer.difference for layer in self.layers))) ** 2


def describe_extraction(found: Extraction) -> str:
    """An extraction as a readable table."""
    width = max(len(layer.module) for layer in found.layers)
    lines = [f"{'layer':<{width}}{'difference':>12}{'explained':>12}"]
    for layer in found.layers:
        relative = layer.difference / layer.size if layer.size else math.inf
        lines.append(f"{layer.module:<{width}}{relative:>12.2e}{layer.explained:>12.4f}")
    lines += ["", f"explained: {found.explained:.4f} of the squared difference of {len(found.layers)} layers"]
    if found.unexplained:
        lines.append(f"           {found.explained_of_all:.4f} of that of all parameters; left out:")
    for kind, (count, size) in found.unexplained.items():
        lines.append(f"           {count} {kind} (difference {size:.3g} in total)")
    for part, count in found.other_models.items():
        lines.append(f"left out: {count} tensors of the {part}, which was tuned as well")
    return "\n".join(lines)
