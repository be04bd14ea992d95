"""The English article that goes with a noun."""

import re

# Spelled with a vowel that is not spoken as one, and the other way round.
_CONSONANT = re.compile(r"eu|ew|one\b|once|u(ni(?!n|m)|nan|s[aeiu]|sb\b|t[aeio]|fo|kulele|ran|bi|rol)", re.IGNORECASE)
_VOWEL = re.compile(r"hour|honest|hono|heir|herb\b|x-ray|[aeiou]", re.IGNORECASE)
_LACKING = re.compile(
    r"\b(of|with|and|beside|near|by|like|holding|showing) (?=\{(class_name|subject)\})", re.IGNORECASE
)
_BEFORE_CLASS = re.compile(r"\b([Aa])n? (?=\{(class_name|subject)\})")


def article(noun: str) -> str:
    """Return "a" or "an", whichever stands before a noun when it is spoken: an umbrella, an hour, a unicorn."""
    return "an" if _VOWEL.match(noun) and not _CONSONANT.match(noun) else "a"


def with_article(noun: str) -> str:
    """Return a noun with its article."""
    return f"{article(noun)} {noun}"


def add_article(prompt: str) -> str:
    """Put an article before `{class_name}` or `{subject}` where it follows a preposition or "and", as names do."""
    return _LACKING.sub(lambda found: f"{found[0]}a ", prompt)


def fit_article(prompt: str, class_name: str) -> str:
    """Make an article right that stands before `{class_name}` or `{subject}` in a prompt."""
    return _BEFORE_CLASS.sub(lambda found: f"{found[1]}{article(class_name)[1:]} ", prompt)
