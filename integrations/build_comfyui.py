"""Build the ComfyUI node pack as its registry takes it: the nodes, and of atomdiff the modules that they import.

python integrations/build_comfyui.py OUTPUT
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACK = ROOT / "integrations" / "comfyui"


def imports() -> list[str]:
    """Return the lines of the pack that import from atomdiff."""
    lines = [line.strip() for file in sorted(PACK.glob("*.py")) for line in file.read_text("utf-8").splitlines()]
    return sorted({line for line in lines if line.startswith("from atomdiff")})


def modules() -> list[Path]:
    """Return the files of atomdiff that are loaded when the pack is, relative to the repository."""
    code = "\n".join(["import sys", *imports(), "for m in sys.modules.values(): print(getattr(m, '__file__', ''))"])
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = [Path(line) for line in done.stdout.splitlines()]
    return sorted(path.relative_to(ROOT) for path in loaded if path.is_relative_to(ROOT / "atomdiff"))


def build(output: Path) -> None:
    """Write the pack to a folder that is not there yet."""
    shutil.copytree(PACK, output, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "LICENSE", output)
    for path in modules():
        (output / "vendor" / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, output / "vendor" / path)


if __name__ == "__main__":
    build(Path(sys.argv[1]))
