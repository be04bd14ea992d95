"""Write the images of all subjects: photos to train on, and unseen ones to compare with.

    python -m benchmarks.pretrain.subjects

The evaluation subjects go to `samples/subjects/<class>/`, those for tuning to `samples/tuning_subjects/<class>/`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from atomdiff.toybox.world import SUBJECTS, TUNING_SUBJECTS, write_subject_images


def main() -> None:
    """Write both folders."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("samples"), help="folder that receives both")
    out = parser.parse_args().out
    write_subject_images(out / "subjects", SUBJECTS)
    write_subject_images(out / "tuning_subjects", TUNING_SUBJECTS)


if __name__ == "__main__":
    main()
