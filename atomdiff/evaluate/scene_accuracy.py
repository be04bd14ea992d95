"""Prompt fidelity: whether images show the scenes that their prompts ask for.

The counterpart of CLIP-T (DreamBooth, arXiv 2208.12242, section 4.2) where a classifier knows the labels.
"""

from __future__ import annotations

from collections.abc import Sequence

from atomdiff.evaluate.suite import Evaluation


def scene_accuracy(evaluation: Evaluation) -> dict[str, float]:
    """Return the share of the subject's images whose scene the encoder recognizes, `base` and `concept`."""
    suite = evaluation.suite
    return {
        name: accuracy(evaluation.encoder.recognize(generated.subject, [*suite.scenes]), suite.labels)
        for name, generated in evaluation.both.items()
    }


def accuracy(predicted: Sequence[str], expected: Sequence[str]) -> float:
    """Return the share of images, from 0 to 1, in which a classifier sees what the prompt names.

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
    return sum(seen == named for seen, named in zip(predicted, expected, strict=True)) / len(predicted)
