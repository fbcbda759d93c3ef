"""`python -m llama_model` is the `llama-model` console script."""

import sys

from llama_model.cli import main

if __name__ == "__main__":
    sys.exit(main())
