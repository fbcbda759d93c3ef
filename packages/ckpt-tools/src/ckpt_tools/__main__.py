"""`python -m ckpt_tools` is the `ckpt-tools` console script."""

import sys

from ckpt_tools.cli import main

if __name__ == "__main__":
    sys.exit(main())
