"""Which backend of an op runs: chosen by the tensor's device, overridden by PUNA_KERNELS or `require_fused`."""

import functools
import os
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, ParamSpec, TypeVar

import torch
from torch import Tensor

from npu_kernels import ops
from npu_kernels.errors import KernelError

VARIABLE = "PUNA_KERNELS"
CHOICES = ("reference", "require-fused")

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True, slots=True, eq=False)
class Op(Generic[P, R]):
    """One op's backends, all of one signature. `OPS` has every one that was imported."""

    name: str
    reference: Callable[P, R]
    """Plain PyTorch: the semantics."""
    torch: Callable[P, R]
    """The fastest of PyTorch's own ways, on CPU and CUDA; the way out where torch_npu lacks the fused op."""
    torch_name: str
    """What that is, for people."""
    ascend: Callable[P, R]
    """On torch_npu's fused ops."""
    ascend_ops: tuple[str, ...]
    """Those that it calls, of `torch.ops.npu`."""

    def __post_init__(self) -> None:
        OPS[self.name] = self

    def on(self, tensor: Tensor) -> Callable[P, R]:
        """The backend that runs where `tensor` is.

        Raises:
            KernelError: A fused one is required and there is none.
        """
        backend: Callable[P, R] = getattr(self, _choose(self.name, tensor.device.type))
        return backend

    def described(self, kind: str) -> str:
        """What runs on a kind of device, for people: as `on` would choose, without a complaint. Where torch_npu is not
        imported, the one that has all the ops is meant.
        """
        backend = "reference" if _choice() == "reference" else _best(self, kind)
        if kind == "npu" and "torch_npu" not in sys.modules and backend == "torch":
            backend = "ascend"
        return {"reference": "reference", "torch": self.torch_name, "ascend": ", ".join(self.ascend_ops)}[backend]


OPS: dict[str, Op[..., Any]] = {}
"""Every op by name, once its module is imported: `ops.load_all` does it."""


def backends(kind: str) -> dict[str, str]:
    """What each op runs as on a kind of device ("npu", "cuda" or "cpu"), for people: a run prints it when it starts."""
    ops.load_all()
    return {name: op.described(kind) for name, op in OPS.items()}


def require_fused(required: bool = True) -> None:
    """From now on, an op on an accelerator that cannot run fused raises instead of falling back.

    `PUNA_KERNELS=require-fused` does the same from outside.
    """
    global _required
    _required = required
    _choose.cache_clear()


def is_fused_required() -> bool:
    """Whether a fallback on an accelerator is an error."""
    return _required or _choice() == "require-fused"


_required = False


@functools.cache  # an op is called hundreds of times a step
def _choose(name: str, kind: str) -> str:
    op = OPS[name]
    backend = "reference" if _choice() == "reference" else _best(op, kind)
    if kind != "cpu" and backend != ("ascend" if kind == "npu" else "torch"):
        why = "PUNA_KERNELS=reference" if backend == "reference" else f"this torch_npu lacks {_lacking(op)}"
        if is_fused_required():
            raise KernelError(f"{name} on {kind} would run unfused ({why}), and fused kernels are required")
        warnings.warn(f"{name} on {kind} runs unfused: {why}", stacklevel=3)
    return backend


def _best(op: Op[..., Any], kind: str) -> str:
    return "ascend" if kind == "npu" and not _lacking(op) else "torch"


def _lacking(op: Op[..., Any]) -> str:
    """The fused ops that the imported torch_npu has not, if any."""
    missing = [name for name in op.ascend_ops if not hasattr(torch.ops.npu, name)]
    return ", ".join(missing)


@functools.cache
def _choice() -> str:
    value = os.environ.get(VARIABLE, "")
    if value not in ("", *CHOICES):
        meant = '"reference" (plain PyTorch), "require-fused" (no fallback on an accelerator), or nothing'
        raise KernelError(f"{VARIABLE} is {value!r}: give {meant}")
    return value


def forget_choice() -> None:
    """Reads `PUNA_KERNELS` anew: for tests, which change it."""
    _choice.cache_clear()
    _choose.cache_clear()
