"""These tests need the emulated NPU: they are skipped with the reason where it cannot run, which CI does not allow."""

import os

import emulator
import pytest

if (reason := emulator.why_not()) is not None:
    if "REQUIRE_EMULATED_NPU" in os.environ:
        raise RuntimeError(reason)
    pytest.skip(reason, allow_module_level=True)
