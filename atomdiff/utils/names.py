"""Names of files and concepts, as they are compared."""

import unicodedata


def normalize_name(name: str) -> str:
    """Return the name in NFC: file systems and keyboards write "é" as one character or as two."""
    return unicodedata.normalize("NFC", name)
