"""What the Ascend backends share: what CANN's fused ops take, and values that they want on the host."""

import functools
from typing import Any

import torch
from torch import Tensor

TRAINING_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
INFERENCE_DTYPES = (torch.float16, torch.bfloat16)


def npu() -> Any:
    """`torch.ops.npu`, which importing torch_npu fills."""
    return torch.ops.npu


def check_dtype(op: str, x: Tensor) -> None:
    """Refuses what CANN's kernel does not take and torch_npu's front end lets through.

    Raises:
        ValueError: `x` is of another type than float16, bfloat16 and float32.
    """
    if x.dtype not in TRAINING_DTYPES:
        raise ValueError(
            f"{op} on an NPU takes float16, bfloat16 and float32, not {str(x.dtype).removeprefix('torch.')}"
        )


@functools.cache
def causal_mask(device: torch.device) -> Tensor:
    """The triangle [2048, 2048], True where a key is hidden, that CANN's sparse modes 2 to 4 take for any lengths."""
    return torch.ones(2048, 2048, dtype=torch.bool).triu(1).to(device)


def on_host(x: Tensor) -> tuple[int, ...]:
    """The values of a short vector of integers. On an accelerator the first call waits for it; later ones, for the same
    unchanged tensor, do not: the layers of a network ask for the same lengths one after another.
    """
    if x.is_inference():  # such tensors do not tell when they are changed
        return tuple(x.tolist())
    known = vars(x).get("_npu_kernels_values")
    if known is None or known[0] != x._version:
        known = vars(x)["_npu_kernels_values"] = (x._version, tuple(x.tolist()))
    values: tuple[int, ...] = known[1]
    return values
