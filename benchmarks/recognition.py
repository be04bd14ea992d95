"""Which of several subjects an image shows: the one to whose photos it is most similar, as the judge sees it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from PIL import Image

from atomdiff.evaluate.encoders import ImageEncoder
from atomdiff.evaluate.similarity import similarities
from atomdiff.evaluate.suite import read_subject


class Gallery:
    """The photos of several subjects.

    Args:
        judge: what compares images.
        photos: by subject, best ones that nothing was trained on.
    """

    def __init__(self, judge: ImageEncoder, photos: Mapping[str, Sequence[Image.Image]]) -> None:
        self._judge = judge
        self._embeddings = {name: judge.embed([*images]) for name, images in photos.items()}

    @classmethod
    def read(cls, judge: ImageEncoder, folder: Path) -> Gallery:
        """Read the photos of all subjects in a folder; of those with a folder `unseen`, the photos in that."""
        subjects = sorted(path for path in folder.iterdir() if path.is_dir())
        return cls(judge, {path.name: read_subject(path)[1] for path in subjects})

    def recognize(self, images: Sequence[Image.Image]) -> list[str]:
        """Return the subject of each image: that with the highest mean similarity to its photos."""
        embedded, names = self._judge.embed([*images]), [*self._embeddings]
        scores = torch.stack([similarities(embedded, photos) for photos in self._embeddings.values()], 1)
        return [names[index] for index in scores.argmax(1).tolist()]

    def top_1(self, images: Sequence[Image.Image], subjects: Sequence[str]) -> float:
        """Return the share of images that are recognized as what they should show."""
        found = self.recognize(images)
        return sum(seen == shown for seen, shown in zip(found, subjects, strict=True)) / len(found)
