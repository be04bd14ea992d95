"""The report of an export: what was written, and what which program does not read."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

from atomdiff.utils.untrusted import list_some


@dataclass(frozen=True)
class ExportedLayer:
    """One layer of an exported file."""

    name: str
    """Its name in the file."""
    shape: tuple[int, ...]
    """Shape of its weight."""
    rank: int | None
    """Rank of its LoRA; None: the exact difference."""
    size: float
    """Frobenius norm of the weight difference."""
    residual: float
    """Frobenius norm of what the file misses of it, rounding included."""

    @property
    def error(self) -> float:
        """Relative error of the approximation."""
        return self.residual / self.size if self.size else 0.0


@dataclass(frozen=True)
class ExportReport:
    """What was written."""

    path: Path
    """The file or folder."""
    layers: tuple[ExportedLayer, ...] = ()
    """The layers in the file; none for a folder, and for concepts of token embeddings alone, which need no file."""
    embeddings: dict[str, Path] = field(default_factory=dict)
    """Trigger word -> the file of its token embeddings, without which the concept is incomplete."""
    biases_left_out: tuple[str, ...] = ()
    """Layers whose biases change, which a LoRA cannot hold."""
    unread: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Program -> layers that it does not read."""
    longer_tables: dict[str, str] = field(default_factory=dict)
    """Text encoder of a folder -> why its embedding table is longer than the base's, which ComfyUI refuses."""
    is_folder: bool = False
    """Whether a pipeline was written, which has the trigger words in its tokenizers."""

    @property
    def error(self) -> float:
        """Relative Frobenius error over all layers."""
        size = math.hypot(*(layer.size for layer in self.layers))
        return math.hypot(*(layer.residual for layer in self.layers)) / size if size else 0.0


def describe_export(report: ExportReport) -> str:
    """A report as a readable table."""
    lines = []
    if report.layers:
        width = max(len(layer.name) for layer in report.layers)
        lines.append(f"{'layer':<{width}}{'shape':>20}{'rank':>7}{'relative error':>16}")
        for layer in report.layers:
            shape = " x ".join(map(str, layer.shape))
            lines.append(f"{layer.name:<{width}}{shape:>20}{layer.rank or 'all':>7}{layer.error:>16.2e}")
        lines.append(f"{len(report.layers)} layers, relative error {report.error:.2e} over all of them")
        if report.error > 0.1:
            lines.append("much of the concept is missing: a higher --rank is closer, --to diff is exact")
        lines.append("")
    if report.biases_left_out:
        lines.append(f"left out, as a LoRA has no biases: those of {list_some(report.biases_left_out)}")
    for program, names in report.unread.items():
        all_of_it = len(names) == len(report.layers)
        lines.append(f"{program} does not read {'the file: it reads LoRAs only' if all_of_it else list_some(names)}")
    if report.layers or not report.embeddings or report.is_folder:
        lines.append(f"saved {report.path}")
    for encoder, why in report.longer_tables.items():
        lines.append(f"ComfyUI refuses a checkpoint made of it, for the size of {encoder}'s embedding table: {why}")
    for word, path in report.embeddings.items():
        needed = "which only diffusers reads from the folder" if report.is_folder else "without which it is incomplete"
        lines.append(
            f"saved {path}, the embedding of {word!r}, {needed}: put it among the embeddings and write {path.stem} "
            f"(ComfyUI: embedding:{path.stem}) for {word!r} in prompts"
        )
    return "\n".join(lines)
