"""`python -m npu_kernels` is the `npu-kernels` console script."""

import sys

from npu_kernels.cli import main

if __name__ == "__main__":
    sys.exit(main())
