"""The judge: a small network that names what an image of the toybox shows and embeds individuals."""

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

from atomdiff.toybox.world import CLASSES, COLORS, IMAGE_SIZE, PATTERNS, SCENES
from atomdiff.utils.assets import ASSETS
from atomdiff.utils.atomic import new_folder
from atomdiff.utils.errors import UserError

LABELS: dict[str, tuple[str, ...]] = {
    "class": CLASSES,
    "scene": tuple(SCENES),
    "color": tuple(COLORS),
    "pattern": PATTERNS,
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


class Judge(nn.Module):
    """A classifier for each kind of label, and an embedding in which images of the same individual are near each other.

    Args:
        widths: channels at 64, 32, 16, 8 and 4 pixels a side.
        embedding: length of the embedding.
    """

    def __init__(self, widths: tuple[int, ...] = (24, 48, 96, 160, 224), embedding: int = 96) -> None:
        super().__init__()
        levels: list[nn.Module] = []
        for before, after in zip((3, *widths), widths, strict=False):
            down = nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False)
            levels.append(nn.Sequential(down, nn.BatchNorm2d(after), nn.ReLU(), Residual(after)))
        self.levels = nn.ModuleList(levels)
        features = 2 * (widths[-1] + widths[-2])
        self.heads = nn.ModuleDict({kind: nn.Linear(features, len(words)) for kind, words in LABELS.items()})
        self.embedding = nn.Sequential(nn.Linear(features, 384), nn.ReLU(), nn.Linear(384, embedding))

    def features(self, images: Tensor) -> list[Tensor]:
        """Maps of every level, (n, c, side, side) at 64 to 4 pixels a side, of images (n, 3, 128, 128) in [-1, 1]."""
        maps = []
        for level in self.levels:
            images = level(images)
            maps.append(images)
        return maps

    def forward(self, images: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Return logits by kind (n, words) and unit embeddings (n, e) of images (n, 3, 128, 128) in [-1, 1]."""
        pools = [pool for maps in self.features(images)[-2:] for pool in (maps.mean((2, 3)), maps.amax((2, 3)))]
        features = torch.cat(pools, dim=1)  # (n, f), of the last two levels
        logits = {kind: head(features) for kind, head in self.heads.items()}
        return logits, F.normalize(self.embedding(features).float(), dim=1)

    @torch.no_grad()
    def look(self, images: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Return what `forward` does, of images and their mirror images together: things are seen from both sides."""
        (logits, one), (mirrored, other) = self(images), self(images.flip(-1))
        return {kind: logits[kind] + mirrored[kind] for kind in LABELS}, F.normalize(one + other, dim=1)

    def _look_at(self, images: list[Image.Image]) -> tuple[dict[str, Tensor], Tensor]:
        size = (IMAGE_SIZE, IMAGE_SIZE)
        scaled = [image.convert("RGB").resize(size, Image.Resampling.LANCZOS) for image in images]
        pixels = torch.from_numpy(np.stack([np.asarray(image) for image in scaled]))
        signal = rearrange(pixels, "n h w c -> n c h w").float() / 127.5 - 1
        logits, embeddings = zip(*(self.look(chunk) for chunk in signal.split(64)), strict=True)
        return {kind: torch.cat([chunk[kind] for chunk in logits]) for kind in LABELS}, torch.cat(embeddings)

    def embed(self, images: list[Image.Image]) -> Tensor:
        """Return unit embeddings (n, e): the closer two of them, the more alike the individuals in the images."""
        return self._look_at(images)[1]

    def classify(self, images: list[Image.Image]) -> dict[str, list[str]]:
        """Return the most likely word of each kind of label for every image."""
        logits = self._look_at(images)[0]
        return {kind: [words[i] for i in logits[kind].argmax(1).tolist()] for kind, words in LABELS.items()}

    def recognize(self, images: list[Image.Image], labels: Sequence[str]) -> list[str]:
        """Return the most likely word for every image, of the kind that has all the labels.

        Raises:
            UserError: no kind has all of them.
        """
        known = [kind for kind, words in LABELS.items() if set(labels) <= set(words)]
        if not known:
            words = "; ".join(f"{kind}: {', '.join(words)}" for kind, words in LABELS.items())
            raise UserError(
                f"the judge of the toybox: found the labels {', '.join(labels)}; expected of one of {words}"
            )
        return self.classify(images)[known[0]]


def save_judge(judge: Judge, folder: Path) -> None:
    """Write the weights (fp16) and the words they were trained on."""
    state = {key: (t.half() if t.is_floating_point() else t).contiguous() for key, t in judge.state_dict().items()}
    with new_folder(folder, own=(_WEIGHTS, _LABELS)) as unfinished:
        save_file(state, unfinished / _WEIGHTS)
        (unfinished / _LABELS).write_text(json.dumps(LABELS, indent=1) + "\n")


def load_judge(folder: str | Path = JUDGE_FOLDER) -> Judge:
    """Load a judge, ready to score; by default the embedded one.

    Raises:
        FileNotFoundError: the folder has no `labels.json` or no `judge.safetensors`.
        ValueError: the judge was trained on other words than the world has.
    """
    folder = Path(folder)
    if json.loads((folder / _LABELS).read_text()) != {kind: list(words) for kind, words in LABELS.items()}:
        raise ValueError(f"{folder}: a judge of other words than the world has; train one with benchmarks/pretrain")
    judge = Judge()
    judge.load_state_dict(load_file(folder / _WEIGHTS))  # copied into float32
    return judge.eval()
