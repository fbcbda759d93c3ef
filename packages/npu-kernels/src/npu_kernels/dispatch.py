"""Which backend of an op runs: the reference where PUNA_KERNELS says so, else the fastest that the device has."""

import functools
import os
from collections.abc import Callable, Mapping
from typing import ParamSpec, TypeVar

from npu_kernels.errors import KernelError

VARIABLE = "PUNA_KERNELS"

P = ParamSpec("P")
R = TypeVar("R")


def select(backends: Mapping[str, Callable[P, R]]) -> Callable[P, R]:
    """The function among an op's backends that runs."""
    return backends[backend_name()]


def backend_name() -> str:
    """Its name: "reference", or "torch": PyTorch's own ops, fused where it has such, on every device."""
    return "reference" if _reference_is_asked_for() else "torch"


@functools.cache  # read once: an op is called hundreds of times a step
def _reference_is_asked_for() -> bool:
    value = os.environ.get(VARIABLE, "")
    if value not in ("", "reference"):
        raise KernelError(f'{VARIABLE} is {value!r}: the only choice is "reference" (plain PyTorch); leave it out else')
    return value == "reference"
