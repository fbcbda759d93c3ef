"""RMSNorm: x / sqrt(mean(x^2) + eps) * weight over the last dimension; and the same of a sum, with the sum."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from npu_kernels.dispatch import Op
from npu_kernels.ops.ascend import check_dtype, npu
from npu_kernels.ops.autograd import first_derivative_only
from npu_kernels.ops.common import is_small, wants_grad


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`x` scaled to a root mean square of 1 along the last dimension, times `weight`.

    Computed in fp32 for bf16 and fp16 inputs and rounded at the end (transformers rounds once more before the weight:
    the two differ by one unit in the last place).

    Args:
        x: [..., h], any leading dimensions, any strides.
        weight: [h], of the type of `x`.
        eps: Added to the mean square.

    Returns:
        [..., h], of the type of `x`.

    Raises:
        ValueError: The sizes or types do not fit.

    Source: Zhang and Sennrich, "Root Mean Square Layer Normalization", https://arxiv.org/abs/1910.07467, equation 4.
    """
    _check(x, weight)
    return RMS_NORM.on(x)(x, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`rms_norm(x + residual, weight, eps)`, and the sum itself, rounded to the inputs' type.

    Args:
        x: [..., h], any strides.
        residual: Of the shape and type of `x`.
        weight: [h], of the type of `x`.
        eps: Added to the mean square.

    Returns:
        The norm and the sum, both [..., h] of the type of `x`. (Ascend's fused op may take the norm of the sum before
        it is rounded: in bf16 the norm then differs by one unit in the last place.)

    Raises:
        ValueError: The sizes or types do not fit.
    """
    _check(x, weight)
    if residual.shape != x.shape or residual.dtype != x.dtype:
        raise ValueError(f"x is {_shown(x)}, the residual {_shown(residual)}")
    return ADD_RMS_NORM.on(x)(x, residual, weight, eps)


def _check(x: Tensor, weight: Tensor) -> None:
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"the weight has shape {list(weight.shape)}, the last dimension of x is {x.shape[-1]}")
    if weight.dtype != x.dtype:
        raise ValueError(f"the weight is {weight.dtype}, x is {x.dtype}: they must be of one type")


def _shown(x: Tensor) -> str:
    return f"{x.dtype} {list(x.shape)}"


def _reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    y = x.to(wide)
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
    return (y * weight.to(wide)).to(x.dtype)


def _torch(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    if x.device.type == "cuda" or (is_small(x) and not wants_grad(x, weight)):
        return F.rms_norm(x, weight.shape, weight, eps)
    y: Tensor = _Formula.apply(x, weight, eps)  # type: ignore[no-untyped-call]
    return y


class _Formula(torch.autograd.Function):
    """On a CPU two to four times as fast as training with F.rms_norm, which has no fused backward there.

    With r = 1 / rms(x), u = x r and t = dy weight, the gradients are dx = r (t - u mean(t u)) and dweight = sum(dy u).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Keeps x, weight and r [..., 1]."""
        wide = torch.promote_types(x.dtype, torch.float32)
        wide_x = x.to(wide)  # once: ops on mixed types are slow
        r = torch.linalg.vector_norm(wide_x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, r)
        y = wide_x * r if wide_x is x else wide_x.mul_(r)
        return y.mul_(weight.to(wide)).to(x.dtype)

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        """In one buffer of x's size."""
        x, weight, r = ctx.saved_tensors
        wide_x, wide_dy, wide_weight = (z.to(r.dtype) for z in (x, dy, weight))
        buffer = wide_dy * wide_x
        dweight = buffer.reshape(-1, x.shape[-1]).t() @ r.reshape(-1)  # [h]
        along = (buffer @ wide_weight).unsqueeze(-1) * r.pow(3) / x.shape[-1]  # [..., 1]
        dx = torch.mul(wide_dy, wide_weight, out=buffer).mul_(r).addcmul_(wide_x, along, value=-1)
        return dx.to(x.dtype), dweight.to(weight.dtype), None


def _ascend(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    # F.rms_norm would run as eight plain ops there.
    check_dtype("rms_norm", x)
    y: Tensor = npu().npu_rms_norm(x, weight, eps)[0]
    return y


def _reference_add(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    total = x + residual
    return _reference(total, weight, eps), total


def _torch_add(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    total = x + residual
    return _torch(total, weight, eps), total


def _ascend_add(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    check_dtype("add_rms_norm", x)
    if wants_grad(x, residual, weight):
        total = x + residual  # the fused op has no backward
        return _ascend(total, weight, eps), total
    y, _, total = npu().npu_add_rms_norm(x, residual, weight, eps)
    return y, total


RMS_NORM = Op("rms_norm", _reference, _torch, "F.rms_norm or its formula", _ascend, ("npu_rms_norm",))
ADD_RMS_NORM = Op(
    "add_rms_norm", _reference_add, _torch_add, "add, rms_norm", _ascend_add, ("npu_rms_norm", "npu_add_rms_norm")
)
