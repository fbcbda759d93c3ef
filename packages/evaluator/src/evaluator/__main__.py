"""`python -m evaluator` is the `evaluator` console script."""

import sys

from evaluator.cli import main

if __name__ == "__main__":
    sys.exit(main())
