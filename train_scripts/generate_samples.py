"""Generate: accelerate launch train_scripts/generate_samples.py --prompts "a photo of sks mug" [--field value ...].

The same as `atomdiff sample`; under `accelerate launch` the processes share the images.
"""

import sys

from atomdiff.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["sample", *sys.argv[1:]]))
