"""The words that stand for the vectors of trigger words."""

from collections.abc import Iterable


def placeholder_tokens(word: str, num_vectors: int) -> list[str]:
    """The words for the vectors of a trigger word, named as diffusers looks for them: sks, sks_1, sks_2, ..."""
    return [word, *(f"{word}_{number}" for number in range(1, num_vectors))]


def group_placeholder_tokens(words: Iterable[str]) -> dict[str, list[str]]:
    """Group words by the trigger word whose vectors they stand for: {sks: [sks, sks_1, sks_2]}."""
    left = sorted(words, key=lambda word: (len(word), word))  # a trigger word before its further ones
    groups = {}
    while left:
        word, count = left[0], 1
        while f"{word}_{count}" in left:
            count += 1
        groups[word] = placeholder_tokens(word, count)
        left = [other for other in left if other not in groups[word]]
    return groups
