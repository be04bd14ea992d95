"""Prompt fidelity by a recognizer: whether images show the scene, the color or the pattern that their prompts ask for.

The counterpart of CLIP-T (DreamBooth, arXiv 2208.12242, section 4.2) where a classifier knows the labels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from PIL import Image
from torch import Tensor

from atomdiff.evaluate.encoders import ImageEncoder, Recognizer
from atomdiff.evaluate.suite import Evaluation, PromptSuite

LABEL_KINDS = ("scene", "color", "pattern")


def label_accuracy(kind: str) -> Callable[[Evaluation], dict[str, Tensor] | None]:
    """Return the metric of a kind of label: 1 for each image in which the encoder recognizes its label, else 0.

    Its values, `base` and `concept`, are those of the prompts that have such a label (prompts, images). It is None
    where none has, or where the encoder recognizes nothing.
    """

    def accuracy(evaluation: Evaluation) -> dict[str, Tensor] | None:
        encoder, suite = evaluation.encoder, evaluation.suite
        expected = [labels.get(kind) for labels in suite.labels for _ in range(suite.images_per_prompt)]
        labels = list(dict.fromkeys(label for label in expected if label))
        if not labels or not isinstance(encoder, Recognizer):
            return None
        found: dict[str, Tensor] = {}
        for name, generated in evaluation.both.items():
            images = [image for image, label in zip(generated.subject, expected, strict=True) if label]
            recognized = hits(encoder.recognize(images, labels), [label for label in expected if label])
            found[name] = evaluation.by_prompt(recognized)
        return found

    return accuracy


def check_labels(encoders: Iterable[ImageEncoder], suites: Iterable[PromptSuite]) -> None:
    """Let all encoders that recognize something look for the labels of the prompts in an empty image.

    Raises:
        UserError: one does not know them.
    """
    empty = [Image.new("RGB", (64, 64))]
    labels = [each for suite in suites for each in suite.labels]
    by_kind = [list(dict.fromkeys(each[kind] for each in labels if kind in each)) for kind in LABEL_KINDS]
    for encoder in encoders:
        if isinstance(encoder, Recognizer):
            for of_kind in filter(None, by_kind):
                encoder.recognize(empty, of_kind)


def hits(predicted: Sequence[str | None], expected: Sequence[str | None]) -> Tensor:
    """Return 1 for each image in which a classifier sees what the prompt names, else 0 (n,).

    Args:
        predicted: the label seen in each image.
        expected: the label in each image's prompt.

    Raises:
        ValueError: there are no images, or the numbers of labels differ.
    """
    if not predicted or len(predicted) != len(expected):
        raise ValueError(
            f"found {len(predicted)} predicted and {len(expected)} expected labels; give one of each per image"
        )
    return torch.tensor([float(seen == named) for seen, named in zip(predicted, expected, strict=True)])
