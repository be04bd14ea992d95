"""Train: accelerate launch train_scripts/train_dreambooth.py --config configs/demo.yaml [--field value ...]."""

import sys

from atomdiff._quiet import quiet_libraries
from atomdiff.errors import UserError
from atomdiff.train_config import load_config


def main() -> int:
    """Run the training and return the exit status: 2 for a mistake in what was asked, 130 if stopped."""
    try:
        config = load_config()
        quiet_libraries()
        from accelerate import PartialState

        from atomdiff.dreambooth import train  # after the libraries were silenced

        written = train(config)
        PartialState().print(f"saved {written}")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        print(str(stop) or "stopped before the first step; nothing was saved", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
