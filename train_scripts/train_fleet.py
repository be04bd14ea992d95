"""Train many subjects: python train_scripts/train_fleet.py --subjects TABLE --num_workers N [--field value ...].

The same as `atomdiff fleet`, which starts its workers itself: it needs no `accelerate launch`.
"""

import sys

from atomdiff.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["fleet", *sys.argv[1:]]))
