"""The one place that knows the accelerators: Ascend NPU, CUDA GPU and plain CPU.

`torch_npu` is imported here only: when an NPU is asked for by name, or when nothing is named and it is installed; and
not where `installation` sees that importing it would fail.
"""

import functools
import importlib.util
import platform
import sys
import warnings
from dataclasses import dataclass
from types import ModuleType

import torch

from npu_kernels import installation, peaks
from npu_kernels.errors import KernelError

BACKENDS = {"npu": "hccl", "cuda": "nccl", "cpu": "gloo"}
"""Device type to its collective backend, in the order in which a device is looked for."""


@dataclass(frozen=True, slots=True)
class Device:
    """One kind of accelerator, and what training code asks of it. `device()` finds the machine's."""

    type: str
    """ "npu", "cuda" or "cpu", as torch spells it."""

    @property
    def collective_backend(self) -> str:
        """The backend of torch.distributed for its tensors: "hccl", "nccl" or "gloo"."""
        return BACKENDS[self.type]

    @property
    def name(self) -> str:
        """The chip as its driver names it; of a CPU the architecture."""
        return platform.machine() if self.type == "cpu" else str(self._module.get_device_name())

    def torch_device(self, index: int | None = None) -> torch.device:
        """Where tensors go: chip `index` of this process's, or its current one."""
        if self.type == "cpu":
            return torch.device("cpu")
        return torch.device(self.type, int(self._module.current_device()) if index is None else index)

    def count(self) -> int:
        """How many chips this process sees."""
        return 1 if self.type == "cpu" else int(self._module.device_count())

    def set_current(self, index: int) -> None:
        """Makes chip `index` the process's own. Nothing to do on a CPU."""
        if self.type != "cpu":
            self._module.set_device(index)

    def synchronize(self) -> None:
        """Returns when everything that was queued on the current chip is done."""
        if self.type != "cpu":
            self._module.synchronize()

    def max_memory_bytes(self) -> int | None:
        """The most bytes that tensors took on the current chip so far; None on a CPU, which does not count them."""
        return None if self.type == "cpu" else int(self._module.max_memory_allocated())

    def peak_flops(self, dtype: torch.dtype) -> float | None:
        """Dense peak of the current chip in FLOP/s for matrix products of `dtype`; None where it is not known."""
        return None if self.type == "cpu" else peaks.flops(self.name, str(dtype).removeprefix("torch."))

    def peak_bytes_per_s(self) -> float | None:
        """Peak bandwidth of the current chip's memory in byte/s; None where it is not known."""
        return None if self.type == "cpu" else peaks.bytes_per_s(self.name)

    @property
    def _module(self) -> ModuleType:
        module: ModuleType = torch.get_device_module(self.type)
        return module


def device(name: str | None = None) -> Device:
    """The machine's accelerator: the first that is there of NPU, CUDA and CPU, or the one that is named.

    Args:
        name: "npu", "cuda" or "cpu".

    Raises:
        KernelError: The name is none of them, or no such device can be used; the message says why.
    """
    if name is None:
        return next(Device(kind) for kind in BACKENDS if why_not(kind) is None)
    if name not in BACKENDS:
        raise KernelError(f"no device is called {name!r}: choose from {', '.join(BACKENDS)}")
    reason = why_not(name)
    if reason is not None:
        raise KernelError(f"device {name} cannot be used: {reason}")
    return Device(name)


def why_not(kind: str) -> str | None:
    """Why a kind of device cannot be used here; None where it can."""
    if kind == "cpu":
        return None
    if kind == "cuda":
        if torch.version.cuda is None and torch.version.hip is None:
            return f"this PyTorch ({torch.__version__}) is built without CUDA"
        return None if torch.cuda.is_available() else "no CUDA device was found (driver, CUDA_VISIBLE_DEVICES?)"
    if importlib.util.find_spec("torch_npu") is None:
        return "torch_npu is not installed (pip install './packages/npu-kernels[npu]')"
    return _npu_failure()


@functools.cache  # a process finds out once
def _npu_failure() -> str | None:
    """What importing an installed torch_npu and looking for its devices runs into."""
    problems = [] if "torch_npu" in sys.modules else installation.problems()
    for problem in (problem for problem in problems if problem.blocks):
        reason = f"{problem.what}: {problem.fix}"
        warnings.warn(reason, stacklevel=4)
        return reason
    try:
        importlib.import_module("torch_npu")
        found = torch.get_device_module("npu").is_available()
    except Exception as error:  # whatever a mismatch that is not known runs into first
        reason = f"torch_npu does not import: {type(error).__name__}: {error}"
        warnings.warn(reason, stacklevel=4)
        return reason
    return None if found else "torch_npu finds no NPU (driver, ASCEND_RT_VISIBLE_DEVICES?)"
