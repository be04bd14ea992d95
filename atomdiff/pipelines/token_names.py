"""The names of placeholder tokens: one for each vector of a trigger word."""

from collections.abc import Iterable
from typing import TypeVar

from atomdiff.utils.errors import UserError

T = TypeVar("T")


def placeholder_tokens(word: str, num_vectors: int) -> list[str]:
    """The placeholder tokens of a trigger word, named as diffusers looks for them: sks, sks_1, sks_2, ..."""
    return [word, *(f"{word}_{number}" for number in range(1, num_vectors))]


def group_placeholder_tokens(tokens: Iterable[str]) -> dict[str, list[str]]:
    """Group placeholder tokens by trigger word: {sks: [sks, sks_1, sks_2]}."""
    left = sorted(tokens, key=lambda token: (len(token), token))  # a trigger word before its further tokens
    groups = {}
    while left:
        word, count = left[0], 1
        while f"{word}_{count}" in left:
            count += 1
        groups[word] = placeholder_tokens(word, count)
        left = [other for other in left if other not in groups[word]]
    return groups


def rename_tokens(tokens: dict[str, T], word: str | None) -> dict[str, T]:
    """Return the token embeddings of a concept under another trigger word; None: as they are.

    Raises:
        UserError: there is not exactly one to rename.
    """
    if word is None:
        return tokens
    groups = group_placeholder_tokens(tokens)
    if len(groups) != 1:
        raise UserError(f"trigger_word={word!r} renames one word, but the concept has {len(groups)}: leave it out")
    ((_, group),) = groups.items()
    new = dict(zip(group, placeholder_tokens(word, len(group)), strict=True))
    return {new[old]: vectors for old, vectors in tokens.items()}
