"""Tune a classifier: accelerate launch train_scripts/train_classifier.py --train_data_dir FOLDER ... [--field value].

Every field of `atomdiff.classify.config.ClassifyConfig` is an option; --help lists them.
"""

import sys

from atomdiff.classify.config import ClassifyConfig
from atomdiff.cli.run_program import run_program
from atomdiff.utils.options import parse_with_overrides
from atomdiff.utils.quiet import quiet_libraries

PROGRAM = "train_classifier.py"


def main() -> int:
    """Run; return the exit status: 0; 2 for a mistake in what was asked, with one line that says so; 130 if stopped."""
    return run_program(PROGRAM, train)


def train() -> None:
    """Tune, save, and print the accuracies."""
    config = parse_with_overrides(ClassifyConfig, prog=PROGRAM)
    quiet_libraries()
    from accelerate import PartialState

    from atomdiff.classify.train import train_classifier

    report = train_classifier(config)
    shown = {split: accuracy for split, accuracy in report["accuracy"].items() if accuracy is not None}
    accuracies = ", ".join(f"{split} {accuracy:.3f}" for split, accuracy in shown.items())
    PartialState().print(f"saved {config.output_dir}/classifier; accuracy: {accuracies}")


if __name__ == "__main__":
    sys.exit(main())
