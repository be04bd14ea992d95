"""`python -m atomdiff` is the command `atomdiff`."""

import sys

from atomdiff.cli.main import main

sys.exit(main())
