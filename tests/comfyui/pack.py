"""The node pack, as ComfyUI imports it."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

PACK = Path(__file__).parents[2] / "integrations" / "comfyui"


def import_pack():
    """Import the pack as `comfyui_atoms`, once ComfyUI's modules can be imported."""
    spec = importlib.util.spec_from_file_location("comfyui_atoms", PACK / "__init__.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["comfyui_atoms"] = module
    spec.loader.exec_module(module)
    return module
