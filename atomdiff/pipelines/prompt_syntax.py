"""Concepts named in a prompt, `<atoms:NAME:WEIGHT>`, and their trigger words in its text."""

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from atomdiff.pipelines.adapter_weight import AdapterWeight
from atomdiff.utils.errors import UserError
from atomdiff.utils.names import normalize_name
from atomdiff.utils.text_files import check_text

# As in A1111, whose own tags name LoRAs; the weight may be a JSON object, which has colons.
_TAG = re.compile(r"<\s*(?:atoms|lora)\s*:([^<>:]*)(?::([^<>]*))?>", re.IGNORECASE)
_BEGUN = re.compile(r"<\s*(?:atoms|lora)\s*:", re.IGNORECASE)
_EXPECTED = (
    "expected <atoms:NAME>, <atoms:NAME:0.8> or <atoms:NAME:{...}> with an adapter weight in JSON, such as "
    '{"weight": 0.8, "blocks": {"down": 0.5}, "steps": {"0": 1, "1": 0.2}}'
)


def split_tags(prompt: str) -> tuple[str, dict[str, AdapterWeight]]:
    """Take the tags out of a prompt.

    Args:
        prompt: with any number of `<atoms:NAME>`, `<atoms:NAME:0.8>`, `<atoms:NAME:{"blocks": {"down": 0.5}}>`; `lora`
            in place of `atoms` means the same.

    Returns:
        The text that is left, and name -> adapter weight in the order of the tags.

    Raises:
        UserError: a tag is unfinished, has no name or no weight that can be used, or a name stands in two; or the
            prompt has half of a character, as of an emoji that was cut.
    """
    check_text(f"the prompt {prompt!r}", prompt)
    weights: dict[str, AdapterWeight] = {}
    for tag in _TAG.finditer(prompt):
        name, value = normalize_name(tag[1].strip()), tag[2]
        if not name:
            raise UserError(f"found the tag {tag[0]!r} in the prompt {prompt!r}: it names no concept; {_EXPECTED}")
        if name in weights:
            raise UserError(f"the prompt {prompt!r} has two tags for {name!r}: give one, with the weight that you want")
        try:
            weights[name] = AdapterWeight.read(1.0 if value is None else _value(value))
        except UserError as error:
            raise UserError(f"found the tag {tag[0]!r} in the prompt {prompt!r}: {error}") from error
        except (ValueError, RecursionError) as error:
            raise UserError(f"found the tag {tag[0]!r} in the prompt {prompt!r}: {error}; {_EXPECTED}") from error
    text = _TAG.sub("", prompt)
    if _BEGUN.search(text):
        raise UserError(f"found a tag that does not end in the prompt {prompt!r}: {_EXPECTED}")
    return (" ".join(text.split()) if weights else prompt), weights


def set_tag(prompt: str, name: str, value: float | Mapping[str, Any] | None) -> str:
    """Return a prompt with another weight in the tag of a concept, which is added at the end if there is none.

    Args:
        prompt: with any number of tags.
        name: of the concept.
        value: its adapter weight as JSON has it; None: the tag is removed.
    """
    weight = f"{value:g}" if isinstance(value, (int, float)) else json.dumps(value, ensure_ascii=False)
    tag = f"<atoms:{name}:{weight}>"
    for found in _TAG.finditer(prompt):
        if normalize_name(found[1].strip()) == normalize_name(name):
            before, after = prompt[: found.start()], prompt[found.end() :]
            return f"{before.rstrip()} {after.lstrip()}".strip() if value is None else before + tag + after
    return prompt if value is None else f"{prompt.rstrip()} {tag}".lstrip()


def weight_as_json(weight: AdapterWeight) -> float | dict[str, Any]:
    """Return an adapter weight as JSON has it: a number where that says all, always the same for equal weights."""
    factors: dict[str, Any] = {
        "blocks": dict(sorted(weight.blocks.items())),
        "steps": {str(float(share)): float(weight.steps[share]) for share in sorted(weight.steps)},
    }
    factors = {name: values for name, values in factors.items() if values}
    if weight.keep != 1:
        factors["keep"] = weight.keep
    return {"weight": float(weight.weight), **factors} if factors else float(weight.weight)


def has_word(text: str, word: str) -> bool:
    """Tell whether a word, or a phrase of several, stands in a text; case does not matter, as to CLIP."""
    return re.search(_pattern(word), text, re.IGNORECASE) is not None


def replace_words(text: str, replacements: Mapping[str, str]) -> str:
    """Replace words, or phrases of several, each by its replacement with blanks around it.

    All are replaced at once; of those that begin alike the longest counts.
    """
    pieces = split_at_words(text, replacements)
    pieces[1::2] = [replacements[phrase] for phrase in pieces[1::2]]
    return text if len(pieces) == 1 else " ".join(" ".join(pieces).split())


def split_at_words(text: str, words: Iterable[str], passed_over: Iterable[str] = ()) -> list[str]:
    """Split a text where CLIP would see words, or phrases of several, in any case; the longest at a place counts.

    Words do not count in tokens that are `passed_over`: "mug" in "<mug-style>". Every other entry of the result is one
    of the words; between them is the text that is left.
    """
    known = {" ".join(word.lower().split()): word for word in words}
    patterns = {token: re.escape(token) for token in passed_over} | {word: _pattern(word) for word in known.values()}
    pattern = "|".join(patterns[word] for word in sorted(patterns, key=len, reverse=True))
    pieces, end = [], 0
    for match in re.finditer(pattern, text, re.IGNORECASE):
        word = known.get(" ".join(match[0].lower().split()))
        if word is not None:
            pieces += [text[end : match.start()], word]
            end = match.end()
    return [*pieces, text[end:]]


def _value(text: str) -> Any:
    """The number or the JSON object of a tag."""
    return json.loads(text) if text.lstrip().startswith("{") else float(text)


def _pattern(phrase: str) -> str:
    """Matches a phrase where CLIP would see its words: "sks" in "sks's" and "sks2", but not in "asks"."""
    around = r"[^\W\d_]" if phrase.isalpha() else r"\w"
    return rf"(?<!{around})" + r"\s+".join(map(re.escape, phrase.split())) + rf"(?!{around})"
