"""Tune a classifier: accelerate launch train_scripts/train_classifier.py --train_data_dir FOLDER ... [--field value].

The same as `atomdiff classify`; under `accelerate launch` processes share the batches.
"""

import sys

from atomdiff.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["classify", *sys.argv[1:]]))
