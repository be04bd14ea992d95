"""The judge of 128x128 images: names what an image shows, and embeds individuals: the same are near each other."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from atomdiff.toybox.world import CLASSES, COLORS, IMAGE_SIZE, PATTERNS, SCENES

LABELS: dict[str, tuple[str, ...]] = {
    "class": tuple(CLASSES),
    "scene": tuple(SCENES),
    "color": tuple(COLORS),
    "pattern": tuple(PATTERNS),
}


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
        widths: channels at 64, 32, 16, 8 and 4 pixels a side.
        embedding: length of the embedding.
    """

    def __init__(self, widths: tuple[int, ...] = (24, 48, 96, 160, 224), embedding: int = 96) -> None:
        super().__init__()
        levels: list[nn.Module] = []
        for before, after in zip((3, *widths), widths, strict=False):
            down = nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False)
            levels.append(nn.Sequential(down, nn.BatchNorm2d(after), nn.ReLU(), _Residual(after)))
        self.levels = nn.ModuleList(levels)
        features = 2 * (widths[-1] + widths[-2])
        self.heads = nn.ModuleDict({name: nn.Linear(features, len(words)) for name, words in LABELS.items()})
        self.embedding = nn.Sequential(nn.Linear(features, 384), nn.ReLU(), nn.Linear(384, embedding))

    def features(self, images: Tensor) -> list[Tensor]:
        """Maps of every level, (n, c, side, side) at 64 to 4 pixels a side, of images (n, 3, 128, 128) in [-1, 1]."""
        maps = []
        for level in self.levels:
            images = level(images)
            maps.append(images)
        return maps

    def forward(self, images: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Logits by label kind (n, words) and unit embeddings (n, e) of images (n, 3, 128, 128) in [-1, 1]."""
        pooled = [pool for maps in self.features(images)[-2:] for pool in (maps.mean((2, 3)), maps.amax((2, 3)))]
        features = torch.cat(pooled, dim=1)
        logits = {name: head(features) for name, head in self.heads.items()}
        return logits, F.normalize(self.embedding(features).float(), dim=1)

    @torch.no_grad()
    def _look(self, images: list[Image.Image]) -> tuple[dict[str, Tensor], Tensor]:
        size = (IMAGE_SIZE, IMAGE_SIZE)
        scaled = [image.convert("RGB").resize(size, Image.Resampling.LANCZOS) for image in images]
        pixels = torch.from_numpy(np.stack([np.asarray(image) for image in scaled]))
        signal = rearrange(pixels, "n h w c -> n c h w").float() / 127.5 - 1
        logits, vectors = zip(*(self(chunk) for chunk in signal.split(64)), strict=True)
        return {name: torch.cat([chunk[name] for chunk in logits]) for name in LABELS}, torch.cat(vectors)

    def embed(self, images: list[Image.Image]) -> Tensor:
        """Unit vectors (n, e): the closer two of them, the more alike the individuals in the images."""
        return self._look(images)[1]

    def classify(self, images: list[Image.Image]) -> dict[str, list[str]]:
        """The most likely word of each kind (`class`, `scene`, `color`, `pattern`) for every image."""
        logits = self._look(images)[0]
        return {name: [LABELS[name][i] for i in logits[name].argmax(1).tolist()] for name in LABELS}


def save_judge(judge: Judge, folder: Path) -> None:
    """Write the weights (fp16) and the words they were trained on."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {key: (t.half() if t.is_floating_point() else t).contiguous() for key, t in judge.state_dict().items()}
    save_file(state, folder / "judge.safetensors")
    (folder / "labels.json").write_text(json.dumps(LABELS, indent=1) + "\n")


def load_judge(folder: str | Path) -> Judge:
    """A judge that was saved, ready to score.

    Raises:
        FileNotFoundError: the folder holds no `judge.safetensors`.
        ValueError: its labels are not those of this world.
    """
    if json.loads((Path(folder) / "labels.json").read_text()) != {k: list(v) for k, v in LABELS.items()}:
        raise ValueError(f"the judge in {folder} was trained on other words; train it anew")
    judge = Judge()
    judge.load_state_dict(
        {k: t.float() if t.is_floating_point() else t for k, t in load_file(Path(folder) / "judge.safetensors").items()}
    )
    return judge.eval()
