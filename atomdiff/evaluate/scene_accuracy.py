"""Prompt fidelity by a recognizer: whether images show the scenes that their prompts ask for.

The counterpart of CLIP-T (DreamBooth, arXiv 2208.12242, section 4.2) where a classifier knows the labels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from atomdiff.evaluate.encoders import Recognizer
from atomdiff.evaluate.suite import Evaluation


def scene_accuracy(evaluation: Evaluation) -> dict[str, Tensor] | None:
    """Return 1 for each of the subject's images whose scene the encoder recognizes, else 0, `base` and `concept`.

    Returns:
        Values (prompts, images); None: the encoder recognizes nothing, or the suite names no scenes.
    """
    encoder, suite = evaluation.encoder, evaluation.suite
    if not isinstance(encoder, Recognizer) or not suite.scenes:
        return None
    expected = [label for label in suite.scenes for _ in range(suite.images_per_prompt)]
    labels = list(dict.fromkeys(suite.scenes))
    return {
        name: evaluation.by_prompt(hits(encoder.recognize(generated.subject, labels), expected))
        for name, generated in evaluation.both.items()
    }


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
