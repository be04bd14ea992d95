"""The judge: a small network of the toybox's world that names what a picture shows and tells individuals apart."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from atomdiff.toybox.scenes import CLASSES, COLORS, PICTURE_SIZE, SCENES
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


class _Residual(nn.Module):
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
        return F.relu(x + self.body(x))


class Judge(nn.Module):
    """Four classifiers and an embedding of individuals on one convolutional trunk.

    Args:
        widths: channels at 32, 16, 8 and 4 pixels a side.
        embedding: length of the embedding.
    """

    def __init__(self, widths: tuple[int, ...] = (24, 48, 96, 160), embedding: int = 64) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in zip((3, *widths), widths, strict=False):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
            layers += [_Residual(after)]
        self.trunk = nn.Sequential(*layers)
        features = widths[-1] * 2
        self.heads = nn.ModuleDict({name: nn.Linear(features, len(words)) for name, words in LABELS.items()})
        self.embedding = nn.Sequential(nn.Linear(features, 256), nn.ReLU(), nn.Linear(256, embedding))

    def forward(self, pictures: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Logits by label kind (n, words) and unit embeddings (n, e) of pictures (n, 3, 64, 64) in [-1, 1]."""
        maps = self.trunk(pictures)  # (n, c, 4, 4)
        features = torch.cat([maps.mean((2, 3)), maps.amax((2, 3))], dim=1)
        logits = {name: head(features) for name, head in self.heads.items()}
        return logits, F.normalize(self.embedding(features).float(), dim=1)

    @torch.no_grad()
    def _look(self, images: list[Image.Image]) -> tuple[dict[str, Tensor], Tensor]:
        size = (PICTURE_SIZE, PICTURE_SIZE)
        scaled = [image.convert("RGB").resize(size, Image.Resampling.LANCZOS) for image in images]
        pixels = torch.from_numpy(np.stack([np.asarray(image) for image in scaled]))
        signal = rearrange(pixels, "n h w c -> n c h w").float() / 127.5 - 1
        logits, vectors = zip(*(self(chunk) for chunk in signal.split(64)), strict=True)
        return {name: torch.cat([chunk[name] for chunk in logits]) for name in LABELS}, torch.cat(vectors)

    def embed(self, images: list[Image.Image]) -> Tensor:
        """Unit vectors (n, e): the closer two of them, the more alike the individuals in the pictures."""
        return self._look(images)[1]

    def classify(self, images: list[Image.Image]) -> dict[str, list[str]]:
        """The most likely word of each kind (`class`, `scene`, `colour`, `pattern`) for every picture."""
        logits = self._look(images)[0]
        return {name: [LABELS[name][i] for i in logits[name].argmax(1).tolist()] for name in LABELS}

    def recognize(self, images: list[Image.Image], labels: Sequence[str]) -> list[str]:
        """The most likely word for every picture, of the kind that has all the labels."""
        kind = next(kind for kind, words in LABELS.items() if set(labels) <= set(words))
        return self.classify(images)[kind]


def save_judge(judge: Judge, folder: Path) -> None:
    """Write the weights (fp16) and the words they were trained on."""
    state = {key: (t.half() if t.is_floating_point() else t).contiguous() for key, t in judge.state_dict().items()}
    with new_folder(folder, own=("judge.safetensors", "labels.json")) as unfinished:
        save_file(state, unfinished / "judge.safetensors")
        (unfinished / "labels.json").write_text(json.dumps(LABELS, indent=1) + "\n")


def load_judge(folder: str | Path = JUDGE_FOLDER) -> Judge:
    """The committed judge, ready to score.

    Raises:
        FileNotFoundError: the folder holds no `judge.safetensors`.
        ValueError: the judge was trained on other words than this world has.
    """
    folder = Path(folder)
    if json.loads((folder / "labels.json").read_text()) != {name: list(words) for name, words in LABELS.items()}:
        raise ValueError(f"{folder}: other words than the world; train one with benchmarks/toybox/pretrain.py")
    judge = Judge()
    judge.load_state_dict(load_file(folder / "judge.safetensors"))
    return judge.float().eval()
