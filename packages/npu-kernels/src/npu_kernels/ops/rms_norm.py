"""RMSNorm: x / sqrt(mean(x^2) + eps) * weight over the last dimension."""

import torch
from torch import Tensor
from torch.nn import functional as F

from npu_kernels.dispatch import select


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
        ValueError: The sizes do not fit.

    Source: Zhang and Sennrich, "Root Mean Square Layer Normalization", https://arxiv.org/abs/1910.07467, equation 4.
    """
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"the weight has shape {list(weight.shape)}, the last dimension of x is {x.shape[-1]}")
    return select(BACKENDS)(x, weight, eps)


def _reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    y = x.to(wide)
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
    return (y * weight.to(wide)).to(x.dtype)


def _torch(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, eps)


BACKENDS = {"reference": _reference, "torch": _torch}
