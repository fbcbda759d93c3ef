"""The one place that knows the accelerators: Ascend NPU, CUDA GPU and plain CPU.

`torch_npu` is imported here only: when an NPU is asked for by name, or when nothing is named and it is installed.
"""

import importlib.util
import platform
import warnings
from dataclasses import dataclass
from types import ModuleType

import torch

from npu_kernels.errors import KernelError

BACKENDS = {"npu": "hccl", "cuda": "nccl", "cpu": "gloo"}
"""Device type to its collective backend, in the order in which a device is looked for."""

_SXM_H = {torch.bfloat16: 989.4e12, torch.float16: 989.4e12, torch.float32: 66.9e12}
PEAK_FLOPS: dict[str, dict[torch.dtype, float]] = {
    # Dense tensor-core figures, never the doubled ones of structured sparsity; fp32 without TF32.
    # https://www.nvidia.com/content/dam/en-zz/Solutions/Data-Center/a100/pdf/nvidia-a100-datasheet-us-nvidia-1758950-r4-web.pdf
    "NVIDIA A100": {torch.bfloat16: 312e12, torch.float16: 312e12, torch.float32: 19.5e12},
    # https://resources.nvidia.com/en-us-tensor-core/gtc22-whitepaper-hopper, table 2
    "NVIDIA H100 PCIe": {torch.bfloat16: 756e12, torch.float16: 756e12, torch.float32: 51.2e12},
    "NVIDIA H100 80GB HBM3": _SXM_H,
    # https://www.nvidia.com/en-us/data-center/h200/: the compute of an H100 SXM, with more memory
    "NVIDIA H200": _SXM_H,
}
"""Name of a device, as its driver spells the beginning of it, to peak FLOP/s by dtype. What is not here is unknown."""


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
        name = "" if self.type == "cpu" else self.name
        known = max((start for start in PEAK_FLOPS if name.startswith(start)), key=len, default=None)
        return None if known is None else PEAK_FLOPS[known].get(dtype)

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


def _npu_failure() -> str | None:
    """What importing an installed torch_npu and looking for its devices runs into."""
    try:
        importlib.import_module("torch_npu")
        found = torch.get_device_module("npu").is_available()
    except Exception as error:  # a missing CANN library is an OSError, a mismatch of versions whatever came first
        reason = f"torch_npu does not import: {type(error).__name__}: {error}"
        warnings.warn(reason, stacklevel=3)
        return reason
    return None if found else "torch_npu finds no NPU (driver, ASCEND_RT_VISIBLE_DEVICES?)"
