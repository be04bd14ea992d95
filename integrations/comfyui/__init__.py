"""Concept files of atomdiff (`.atoms.safetensors`) in ComfyUI."""

try:
    import atomdiff  # noqa: F401
except ImportError as error:
    raise ImportError(
        "the atoms nodes need atomdiff, without what it depends on: run `python -m pip install --no-deps atomdiff` "
        "with ComfyUI's Python"
    ) from error

from .nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
