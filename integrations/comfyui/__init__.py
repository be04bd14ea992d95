"""Concept files of atomdiff (`.atoms.safetensors`) in ComfyUI."""

import os
import sys

_VENDOR = os.path.join(os.path.dirname(__file__), "vendor")  # in a built pack: what it uses of atomdiff
if os.path.isdir(_VENDOR):
    sys.path.append(_VENDOR)

try:
    import atomdiff  # noqa: F401
except ImportError as error:
    raise ImportError(
        "the atoms nodes need atomdiff, without what it depends on: run `python -m pip install --no-deps atomdiff` "
        "with ComfyUI's Python"
    ) from error

from .nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS  # noqa: E402

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
