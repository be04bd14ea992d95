"""The judge: a small network of the toybox's world that names what an image shows and tells individuals apart."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from atomdiff.toybox.scenes import CLASSES, COLORS, IMAGE_SIZE, SCENES
from atomdiff.toybox.shapes import PATTERNS
from atomdiff.utils.assets import ASSETS
from atomdiff.utils.atomic import new_folder

LABELS: dict[str, tuple[str, ...]] = {
    "class": CLASSES,
    "scene": SCENES,
    "colour": tuple(COLORS),  # so spelled in the embedded weights
    "pattern": tuple(PATTERNS),
}
JUDGE_FOLDER = ASSETS / "samples" / "toybox-judge"
_WEIGHTS, _LABELS = "judge.safetensors", "labels.json"


class Residual(nn.Module):
    """Two 3x3 convolutions of `width` channels beside the identity."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(batch, width, h, w) -> the same."""
        return F.relu(x + self.body(x))


class ImageJudge(nn.Module):
    """A classifier for each kind of label, and an embedding of individuals, on one trunk that subclasses add.

    A subclass names its labels and the side of its images, and has a method `pooled`: images -> features (n, f).
    """

    labels: ClassVar[dict[str, tuple[str, ...]]]
    image_size: ClassVar[int]
    pooled: Any

    def add_heads(self, features: int, hidden: int, embedding: int) -> None:
        """Add the layers above the trunk, whose features are `features` numbers an image."""
        self.heads = nn.ModuleDict({kind: nn.Linear(features, len(words)) for kind, words in self.labels.items()})
        self.embedding = nn.Sequential(nn.Linear(features, hidden), nn.ReLU(), nn.Linear(hidden, embedding))

    def forward(self, images: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Return logits by kind of label (n, words) and unit embeddings (n, e) of images (n, 3, h, w) in [-1, 1]."""
        features = self.pooled(images)
        logits = {kind: head(features) for kind, head in self.heads.items()}
        return logits, F.normalize(self.embedding(features).float(), dim=1)

    @torch.no_grad()
    def _look(self, images: list[Image.Image]) -> tuple[dict[str, Tensor], Tensor]:
        size = (self.image_size, self.image_size)
        scaled = [image.convert("RGB").resize(size, Image.Resampling.LANCZOS) for image in images]
        pixels = torch.from_numpy(np.stack([np.asarray(image) for image in scaled]))
        signal = rearrange(pixels, "n h w c -> n c h w").float() / 127.5 - 1
        logits, embeddings = zip(*(self(chunk) for chunk in signal.split(64)), strict=True)
        return {kind: torch.cat([chunk[kind] for chunk in logits]) for kind in self.labels}, torch.cat(embeddings)

    def embed(self, images: list[Image.Image]) -> Tensor:
        """Return unit embeddings (n, e): the closer two of them, the more alike the individuals in the images."""
        return self._look(images)[1]

    def classify(self, images: list[Image.Image]) -> dict[str, list[str]]:
        """Return the most likely word of each kind of label for every image."""
        logits = self._look(images)[0]
        return {kind: [words[i] for i in logits[kind].argmax(1).tolist()] for kind, words in self.labels.items()}

    def recognize(self, images: list[Image.Image], labels: Sequence[str]) -> list[str]:
        """Return the most likely word for every image, of the kind that has all the labels."""
        kind = next(kind for kind, words in self.labels.items() if set(labels) <= set(words))
        return self.classify(images)[kind]


class Judge(ImageJudge):
    """The judge of 64x64 images.

    Args:
        widths: channels at 32, 16, 8 and 4 pixels a side.
        embedding: length of the embedding.
    """

    labels = LABELS
    image_size = IMAGE_SIZE

    def __init__(self, widths: tuple[int, ...] = (24, 48, 96, 160), embedding: int = 64) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in zip((3, *widths), widths, strict=False):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
            layers += [Residual(after)]
        self.trunk = nn.Sequential(*layers)
        self.add_heads(widths[-1] * 2, 256, embedding)

    def pooled(self, images: Tensor) -> Tensor:
        """(n, 3, 64, 64) -> features (n, f)."""
        maps = self.trunk(images)  # (n, c, 4, 4)
        return torch.cat([maps.mean((2, 3)), maps.amax((2, 3))], dim=1)


def save_judge(judge: ImageJudge, folder: Path) -> None:
    """Write the weights (fp16) and the words they were trained on."""
    state = {key: (t.half() if t.is_floating_point() else t).contiguous() for key, t in judge.state_dict().items()}
    with new_folder(folder, own=(_WEIGHTS, _LABELS)) as unfinished:
        save_file(state, unfinished / _WEIGHTS)
        (unfinished / _LABELS).write_text(json.dumps(judge.labels, indent=1) + "\n")


def load_judge(folder: str | Path = JUDGE_FOLDER, kind: type[ImageJudge] = Judge) -> ImageJudge:
    """Load a judge, ready to score; by default the embedded one.

    Raises:
        FileNotFoundError: the folder holds no `judge.safetensors`.
        ValueError: the judge was trained on other words than its world has.
    """
    folder = Path(folder)
    if json.loads((folder / _LABELS).read_text()) != {name: list(words) for name, words in kind.labels.items()}:
        raise ValueError(f"{folder}: other words than the world; train one with benchmarks/toybox/pretrain.py")
    judge = kind()
    judge.load_state_dict(load_file(folder / _WEIGHTS))  # copied into float32
    return judge.eval()
