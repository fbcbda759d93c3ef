"""SwiGLU: silu(gate) * up, of the two halves of one fused projection."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from npu_kernels.dispatch import Op
from npu_kernels.ops.ascend import check_dtype, npu
from npu_kernels.ops.autograd import first_derivative_only
from npu_kernels.ops.common import is_small


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
    if is_small(x):
        gate, up = x.chunk(2, -1)  # [..., f] each
        return F.silu(gate) * up
    y: Tensor = _SwiGLU.apply(x)  # type: ignore[no-untyped-call]
    return y


class _SwiGLU(torch.autograd.Function):
    """F.silu and a product, with nothing kept for the backward but x: composed ops keep silu(gate) too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """[..., 2f] to [..., f]."""
        ctx.save_for_backward(x)
        gate, up = x.chunk(2, -1)
        return F.silu(gate).mul_(up)

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        """Written into the two halves of dx."""
        (x,) = ctx.saved_tensors
        gate, up = x.chunk(2, -1)
        dx = torch.empty_like(x)
        dgate, dup = dx.chunk(2, -1)
        torch.mul(F.silu(gate), dy, out=dup)
        torch.ops.aten.silu_backward.grad_input(dy * up, gate, grad_input=dgate)
        return dx


def _ascend(x: Tensor) -> Tensor:
    check_dtype("swiglu", x)
    y: Tensor = npu().npu_swiglu(x, -1)
    return y


SWIGLU = Op("swiglu", _reference, _torch, "F.silu, mul", _ascend, ("npu_swiglu",))
