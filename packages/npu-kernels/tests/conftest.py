"""Starts the emulated NPU where torch_npu is installed."""

import os
import tempfile
from pathlib import Path

# Without CANN, an installed torch_npu makes `import torch` itself fail unless it is told not to load it.
os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")

import emulator


def pytest_configure(config):
    """Before anything is collected: transformers imports an installed torch_npu, and with it CANN's libraries."""
    if emulator.why_not() is not None:
        return
    cache = getattr(config, "cache", None)  # none with `-p no:cacheprovider`
    emulator.start(cache.mkdir("emulator") if cache else Path(tempfile.mkdtemp(prefix="emulated-npu-")))
