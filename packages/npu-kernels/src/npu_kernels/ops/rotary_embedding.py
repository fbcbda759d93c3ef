"""Rotary position embedding in the rotate-half form of Hugging Face and Megatron (not the interleaved one of Meta)."""

from typing import Any

import torch
from torch import Tensor

from npu_kernels.dispatch import Op
from npu_kernels.ops.ascend import check_dtype, npu
from npu_kernels.ops.common import wants_grad

PIECE = 2**19
"""Numbers that are turned at a time on a CPU: 2 MiB in fp32."""


def rotary_embedding(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys turned by their positions' angles: channel i pairs with channel i + d/2.

    Computed with the fp32 tables and rounded once at the end, also for bf16 and fp16 inputs: at position 4095 the only
    error is that of the result's own type. (Tables in bf16 would be off by 2^-9 before the first multiplication.)
    Ascend's fused op takes tables of the inputs' type: there each value is off by up to u (|x cos| + |y sin|) more, u
    being 2^-8 for bf16 and 2^-11 for fp16 and y the value's partner; the angles themselves were exact in fp32, so that
    the error does not grow with the position.

    Args:
        q: [b, s, n, d], any strides.
        k: [b, s, g, d], any strides, of the type of `q`.
        cos: fp32, [s, d] or, with positions of its own for each row, [b, s, d]; its two halves are equal.
        sin: Like `cos`. The tables get no gradient.

    Returns:
        The turned `q` and `k`, of their shapes and types.

    Raises:
        ValueError: The tables are not fp32, or the sizes do not fit.

    Source: Su et al., "RoFormer", https://arxiv.org/abs/2104.09864, equation 34; the pairing of channels is that of
        transformers' `rotate_half`, https://github.com/huggingface/transformers/blob/main/src/transformers/models/llama/modeling_llama.py
    """
    if q.dim() != 4 or k.dim() != 4 or k.shape[:2] != q.shape[:2]:
        raise ValueError(f"q is [b, s, n, d], k is [b, s, g, d]; here {list(q.shape)} and {list(k.shape)}")
    for name, table in (("cos", cos), ("sin", sin)):
        if table.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"{name} is {table.dtype}: rotary tables are kept in fp32")
        if table.shape not in {(q.shape[1], q.shape[3]), (1, q.shape[1], q.shape[3]), (q.shape[0], *q.shape[1::2])}:
            raise ValueError(f"{name} has shape {list(table.shape)}, q has {list(q.shape)}: give [s, d] or [b, s, d]")
    if q.shape[-1] % 2 or k.shape[-1] != q.shape[-1]:
        raise ValueError(f"q has {q.shape[-1]} channels a head and k {k.shape[-1]}: they must be equal and even")
    if not q.is_floating_point():
        raise ValueError(f"q is {q.dtype}: give floating point numbers")
    if k.dtype != q.dtype:
        raise ValueError(f"q is {q.dtype}, k is {k.dtype}: they must be of one type")
    cos, sin = cos.detach().unsqueeze(-2), sin.detach().unsqueeze(-2)  # [(b,) s, 1, d]
    return ROTARY_EMBEDDING.on(q)(q, k, cos, sin)


def _reference(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    def turned(x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return (x * cos + torch.cat((-second, first), -1) * sin).to(x.dtype)

    return turned(q), turned(k)


def _torch(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(q.dtype, cos.dtype)
    cos, sin = cos.to(wide), sin[..., : q.shape[-1] // 2].to(wide)
    if wants_grad(q, k):
        return _Turned.apply(q, cos, sin), _Turned.apply(k, cos, sin)  # type: ignore[no-untyped-call]
    return _turned(q, cos, sin), _turned(k, cos, sin)


class _Turned(torch.autograd.Function):
    """Nothing kept for the backward but the tables: a turn's gradient is the gradient turned back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """See `_turned`; the tables have no gradients."""
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        """The other way round."""
        cos, sin = ctx.saved_tensors
        return _Turned.apply(dy, cos, -sin), None, None  # type: ignore[no-untyped-call]


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """X [b, s, n, d] by cos [(b,) s, 1, d] and sin [(b,) s, 1, d / 2].

    One product over whole heads and one addition to each half: on a CPU five times as fast as turning halves apart.
    """
    out = torch.empty_like(x)  # its dimensions in the order in which they lie in x: neighbours stay neighbours
    for rows in _pieces(x):
        wide, c, s = x[:, rows].to(cos.dtype), cos[..., rows, :, :], sin[..., rows, :, :]
        piece = torch.mul(wide, c, out=out[:, rows] if x.dtype == cos.dtype else None)
        (first, second), (lower, upper) = wide.chunk(2, -1), piece.chunk(2, -1)
        lower.addcmul_(second, s, value=-1)
        upper.addcmul_(first, s)
        if x.dtype != cos.dtype:
            out[:, rows] = piece
    return out


def _pieces(x: Tensor) -> list[slice]:
    """The tokens; on a CPU so many at a time that they stay in its cache."""
    b, s, n, d = x.shape
    step = max(1, PIECE // max(1, b * n * d)) if x.device.type == "cpu" else max(1, s)
    return [slice(start, start + step) for start in range(0, s, step)]


def _ascend(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    check_dtype("rotary_embedding", q)
    if q.shape[-1] >= 896:
        raise ValueError(f"rotary_embedding on an NPU takes heads below 896 channels, not {q.shape[-1]}")
    cos, sin = cos.to(q.dtype), sin.to(q.dtype)  # the op would do it for q and again for k
    if cos.dim() == 3:
        cos, sin = cos.unsqueeze(0), sin.unsqueeze(0)  # [1 or b, s, 1, d]
    return npu().npu_rotary_mul(q, cos, sin, "half"), npu().npu_rotary_mul(k, cos, sin, "half")


ROTARY_EMBEDDING = Op("rotary_embedding", _reference, _torch, "mul and addcmul on halves", _ascend, ("npu_rotary_mul",))
