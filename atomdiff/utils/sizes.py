"""Sizes of files as people write them."""

import re

from atomdiff.utils.errors import UserError

_UNITS = {"": 1, "B": 1, "KB": 1000, "KIB": 1024, "MB": 1000**2, "MIB": 1024**2}


def parse_bytes(text: str | int, name: str) -> int:
    """Read a number of bytes such as 10KB, 1.5 MB or 8192.

    Args:
        text: the number, with or without a unit.
        name: what it is called in messages.

    Raises:
        UserError: it is none, or below 1.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(text))
    unit = _UNITS.get(match[2].upper()) if match else None
    count = int(float(match[1]) * unit) if match and unit else 0
    if count < 1:
        raise UserError(f"{name}={text!r}: expected a number of bytes, such as 8192, 10KB or 1.5MB")
    return count
