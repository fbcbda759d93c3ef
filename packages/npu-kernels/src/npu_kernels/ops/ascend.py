"""What the Ascend backends share: what CANN's fused ops take, and values that they want on the host."""

import functools
from collections.abc import MutableMapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

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


_READ: MutableMapping[Tensor, tuple[int, int, tuple[int, ...]]] = WeakIdKeyDictionary()
"""Values that were read from an accelerator: tensor to (version, address, values). Copies of a tensor have none."""


def on_host(x: Tensor) -> tuple[int, ...]:
    """The values of a short vector of integers. On an accelerator the first call waits for it; later ones, for the same
    unchanged tensor, do not: the layers of a network ask for the same lengths one after another. Changes through
    `.data` are not noticed there.
    """
    if x.device.type == "cpu" or x.is_inference():  # inference tensors do not tell when they are changed
        return tuple(x.tolist())
    known = _READ.get(x)
    if known is None or known[:2] != (x._version, x.data_ptr()):
        known = _READ[x] = (x._version, x.data_ptr(), tuple(x.tolist()))
    return known[2]
