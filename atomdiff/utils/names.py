"""Names of files and concepts, as they are compared."""

import re
import unicodedata

from atomdiff.utils.errors import UserError
from atomdiff.utils.untrusted import printable

_NAME = re.compile(r"\w[\w.-]{0,99}")
_MAX_BYTES = 200  # of a name in UTF-8: file systems take 255, with suffix
_EXPECTED = f"letters, digits, '_', '-' and '.', at most 100 and {_MAX_BYTES} bytes, a letter, digit or '_' first"


def normalize_name(name: str) -> str:
    """Return the name in NFC: file systems and keyboards write "é" as one character or as two."""
    return unicodedata.normalize("NFC", name)


def check_concept_name(name: str) -> None:
    """Check that a name can be that of a concept's file and stand in the tags of prompts.

    Raises:
        UserError: it cannot.
    """
    if not _NAME.fullmatch(name) or len(name.encode()) > _MAX_BYTES:
        raise UserError(f"found the name {printable(name)!r} for a concept; expected {_EXPECTED}")
