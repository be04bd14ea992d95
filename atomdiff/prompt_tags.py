"""Concepts named in a prompt, `<atoms:NAME:WEIGHT>`, and their trigger words in its text."""

import json
import re
from collections.abc import Mapping
from typing import Any

from atomdiff.errors import UserError
from atomdiff.strength import Strength

# As in A1111, whose own tags name LoRAs; the weight may be a JSON object, which has colons.
_TAG = re.compile(r"<\s*(?:atoms|lora)\s*:([^<>:]*)(?::([^<>]*))?>", re.IGNORECASE)
_BEGUN = re.compile(r"<\s*(?:atoms|lora)\s*:", re.IGNORECASE)
_EXPECTED = (
    "expected <atoms:NAME>, <atoms:NAME:0.8> or <atoms:NAME:{...}> with a strength in JSON, such as "
    '{"weight": 0.8, "blocks": {"down": 0.5}, "steps": {"0": 1, "1": 0.2}}'
)


def split_tags(prompt: str) -> tuple[str, dict[str, Strength]]:
    """Take the tags out of a prompt.

    Args:
        prompt: with any number of `<atoms:NAME>`, `<atoms:NAME:0.8>`, `<atoms:NAME:{"blocks": {"down": 0.5}}>`; `lora`
            in place of `atoms` means the same.

    Returns:
        The text that is left, and name -> strength in the order of the tags.

    Raises:
        UserError: a tag is unfinished, has no name or no strength that can be used, or a name stands in two.
    """
    found: dict[str, Strength] = {}
    for tag in _TAG.finditer(prompt):
        name, value = tag[1].strip(), tag[2]
        if not name:
            raise UserError(f"found the tag {tag[0]!r} in the prompt {prompt!r}: it names no concept; {_EXPECTED}")
        if name in found:
            raise UserError(f"the prompt {prompt!r} has two tags for {name!r}: give one, with the weight that you want")
        try:
            found[name] = Strength.read(1.0 if value is None else _value(value))
        except UserError as error:
            raise UserError(f"found the tag {tag[0]!r} in the prompt {prompt!r}: {error}") from error
        except (ValueError, RecursionError) as error:
            raise UserError(f"found the tag {tag[0]!r} in the prompt {prompt!r}: {error}; {_EXPECTED}") from error
    left = _TAG.sub("", prompt)
    if _BEGUN.search(left):
        raise UserError(f"found a tag that does not end in the prompt {prompt!r}: {_EXPECTED}")
    return (" ".join(left.split()) if found else prompt), found


def describe_strength(strength: Strength) -> float | dict[str, Any]:
    """A strength as JSON has it: a number where that says all, always the same for equal strengths."""
    factors = {
        "blocks": dict(sorted(strength.blocks.items())),
        "steps": {str(float(share)): float(strength.steps[share]) for share in sorted(strength.steps)},
    }
    factors = {name: values for name, values in factors.items() if values}
    return {"weight": float(strength.weight), **factors} if factors else float(strength.weight)


def has_word(text: str, word: str) -> bool:
    """Tell whether a word, or a phrase of several, stands in a text; case does not matter, as to CLIP."""
    return re.search(_pattern(word), text, re.IGNORECASE) is not None


def replace_words(text: str, replacements: Mapping[str, str]) -> str:
    """Replace words, or phrases of several, at once; of those that begin alike the longest counts.

    Args:
        text: the text.
        replacements: word or phrase -> what takes its place, blanks around it.
    """
    if not replacements:
        return text
    longest_first = sorted(replacements, key=len, reverse=True)
    anyone = "|".join(f"({_pattern(phrase)})" for phrase in longest_first)

    def replacement(found: re.Match[str]) -> str:
        return f" {replacements[longest_first[(found.lastindex or 1) - 1]]} "

    replaced = re.sub(anyone, replacement, text, flags=re.IGNORECASE)
    return text if replaced == text else " ".join(replaced.split())


def _value(text: str) -> Any:
    """The number or the JSON object of a tag."""
    return json.loads(text) if text.lstrip().startswith("{") else float(text)


def _pattern(phrase: str) -> str:
    """Matches a phrase where CLIP would see its words: "sks" in "sks's" and "sks2", but not in "asks"."""
    around = r"[^\W\d_]" if phrase.isalpha() else r"\w"
    return rf"(?<!{around})" + r"\s+".join(map(re.escape, phrase.split())) + rf"(?!{around})"
