"""Prompt fidelity: whether pictures show what their prompts ask for.

The counterpart of CLIP-T (DreamBooth, arXiv 2208.12242, section 4.2) where a classifier knows the labels.
"""

from collections.abc import Sequence


def prompt_match(predicted: Sequence[str], expected: Sequence[str]) -> float:
    """Return the share of pictures, from 0 to 1, in which a classifier sees what the prompt names.

    Args:
        predicted: the label seen in each picture.
        expected: the label in each picture's prompt.

    Raises:
        ValueError: there are no pictures, or the numbers of labels differ.
    """
    if not predicted or len(predicted) != len(expected):
        raise ValueError(
            f"found {len(predicted)} predicted and {len(expected)} expected labels; give one of each a picture"
        )
    return sum(seen == named for seen, named in zip(predicted, expected, strict=True)) / len(predicted)
