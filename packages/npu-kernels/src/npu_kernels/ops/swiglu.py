"""SwiGLU: silu(gate) * up, of the two halves of one fused projection."""

import torch
from torch import Tensor
from torch.nn import functional as F

from npu_kernels.dispatch import Op
from npu_kernels.ops.ascend import check_dtype, npu


def swiglu(x: Tensor) -> Tensor:
    """The first half of the last dimension through SiLU, times the second half.

    The reference computes bf16 and fp16 in fp32 and rounds at the end; PyTorch's ops round after SiLU too, as
    transformers does.

    Args:
        x: [..., 2f]: all gate channels, then all up channels; any strides.

    Returns:
        [..., f], of the type of `x`.

    Raises:
        ValueError: The last dimension is odd.

    Source: Shazeer, "GLU Variants Improve Transformer", https://arxiv.org/abs/2002.05202, equation 5, without biases.
    """
    if x.shape[-1] % 2:
        raise ValueError(f"the last dimension is {x.shape[-1]}: gate and up need halves of the same size")
    return SWIGLU.on(x)(x)


def _reference(x: Tensor) -> Tensor:
    gate, up = x.to(torch.promote_types(x.dtype, torch.float32)).chunk(2, -1)  # [..., f] each
    return (gate * torch.sigmoid(gate) * up).to(x.dtype)


def _torch(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, -1)  # [..., f] each
    return F.silu(gate) * up


def _ascend(x: Tensor) -> Tensor:
    check_dtype("swiglu", x)
    y: Tensor = npu().npu_swiglu(x, -1)
    return y


SWIGLU = Op("swiglu", _reference, _torch, "F.silu, mul", _ascend, ("npu_swiglu",))
