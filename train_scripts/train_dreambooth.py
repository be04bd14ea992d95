"""Train: accelerate launch train_scripts/train_dreambooth.py --config configs/demo.yaml [--field value ...].

The same as `atomdiff train`; under `accelerate launch` processes share the batches.
"""

import sys

from atomdiff.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
