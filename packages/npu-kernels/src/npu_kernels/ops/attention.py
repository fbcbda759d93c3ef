"""Attention over whole sequences: grouped queries, causal or not, packed documents, an optional mask."""

import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from npu_kernels.dispatch import Op
from npu_kernels.ops import ascend_attention
from npu_kernels.ops.ascend import on_host


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    cu_seqlens: Tensor | None = None,
    mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Softmax(q k^T * scale) v for every query head, query head i with key and value head i // (n / g).

    The softmax is computed in fp32 at least.

    Args:
        q: [b, s, n, d], any strides.
        k: [b, t, g, d], n a multiple of g.
        v: [b, t, g, d].
        causal: Query i sees the keys up to its own: the last query stands at the last key, so key j <= i + t - s.
        cu_seqlens: Documents packed into one row (b = 1, s = t): int32, from 0 to s, where each begins and the last
            ends. No token sees another document. Read on the host: on an accelerator the first call with a tensor
            waits for it, later ones with the same tensor do not.
        mask: Boolean, broadcastable to [b, n, s, t], True where a query may see a key; together with `causal` both
            must allow it. Every query must see one key at least. Not together with `cu_seqlens`.
        scale: Default 1 / sqrt(d).

    Returns:
        [b, s, n, d], of the type of `q`.

    Raises:
        ValueError: The sizes, types or arguments do not fit together.

    Source: Vaswani et al., "Attention Is All You Need", https://arxiv.org/abs/1706.03762, equation 1; grouped queries:
        Ainslie et al., "GQA", https://arxiv.org/abs/2305.13245.
    """
    _check(q, k, v, causal)
    _check_mask(q, k, mask)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    if not 0 < scale < math.inf:  # so that not-a-number fails too
        raise ValueError(f"the scale is {scale}: give a positive, finite number")
    bounds = None if cu_seqlens is None else _bounds(cu_seqlens, q, k, mask)
    if bounds == [0]:
        return torch.empty_like(q)
    return ATTENTION.on(q)(q, k, v, causal, mask, scale, bounds)


Bounds = Sequence[int] | None
"""Where packed documents begin and the last one ends; none is empty. None: the rows are not packed."""


def _reference(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, mask: Tensor | None, scale: float, bounds: Bounds
) -> Tensor:
    if bounds is not None:
        return _document_by_document(_reference, q, k, v, causal, scale, bounds)
    repeats = q.shape[2] // k.shape[2]
    wide = torch.promote_types(q.dtype, torch.float32)
    q32, k32, v32 = (x.to(wide).transpose(1, 2) for x in (q, k, v))  # [b, heads, s or t, d]
    k32, v32 = (x.repeat_interleave(repeats, 1) for x in (k32, v32))  # [b, n, t, d]
    scores = q32 @ k32.transpose(2, 3) * scale  # [b, n, s, t]
    allowed = visible(q.shape[1], k.shape[1], causal, mask, q.device)
    if allowed is not None:
        scores = scores.masked_fill(~allowed, -math.inf)
    return (scores.softmax(-1) @ v32).transpose(1, 2).to(q.dtype)  # [b, s, n, d]


def _torch(q: Tensor, k: Tensor, v: Tensor, causal: bool, mask: Tensor | None, scale: float, bounds: Bounds) -> Tensor:
    if bounds is not None:
        return _document_by_document(_torch, q, k, v, causal, scale, bounds)
    # PyTorch's is_causal puts the first query at the first key: the same where there are as many of both.
    square = causal and mask is None and q.shape[1] == k.shape[1]
    return F.scaled_dot_product_attention(
        q.transpose(1, 2),  # [b, n, s, d]
        k.transpose(1, 2),  # [b, g, t, d]
        v.transpose(1, 2),
        attn_mask=None if square else visible(q.shape[1], k.shape[1], causal, mask, q.device),
        is_causal=square,
        scale=scale,
        enable_gqa=q.shape[2] != k.shape[2],
    ).transpose(1, 2)  # [b, s, n, d]


def _ascend(q: Tensor, k: Tensor, v: Tensor, causal: bool, mask: Tensor | None, scale: float, bounds: Bounds) -> Tensor:
    if bounds is not None:
        return ascend_attention.packed(q, k, v, causal, scale, bounds)
    if mask is None and ascend_attention.infers(q, k, v):
        return ascend_attention.inference(q, k, v, causal, scale)
    if mask is None:
        return ascend_attention.training(q, k, v, causal, scale)
    seen = visible(q.shape[1], k.shape[1], causal, mask, q.device)
    assert seen is not None
    return ascend_attention.masked(q, k, v, seen, scale)


def _document_by_document(
    attend: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float, bounds: Sequence[int]
) -> Tensor:
    documents = itertools.starmap(slice, itertools.pairwise(bounds))
    return torch.cat([attend(q[:, at], k[:, at], v[:, at], causal, None, scale, None) for at in documents], 1)


def visible(s: int, t: int, causal: bool, mask: Tensor | None, device: torch.device) -> Tensor | None:
    """Which keys each query sees, broadcastable to [b, n, s, t]; None for all."""
    if not causal or s == 1:
        return mask
    below = torch.ones(s, t, dtype=torch.bool, device=device).tril(t - s)  # [s, t]
    return below if mask is None else mask & below


ATTENTION = Op(
    "attention",
    _reference,
    _torch,
    "F.scaled_dot_product_attention",
    _ascend,
    ("npu_fusion_attention", "npu_fused_infer_attention_score"),
)


def _check(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> None:
    shapes = f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
    if q.dim() != 4 or k.shape != v.shape or k.dim() != 4 or k.shape[0] != q.shape[0] or k.shape[3] != q.shape[3]:
        raise ValueError(f"q is [b, s, n, d], k and v are [b, t, g, d]; here {shapes}")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k and v are of one type; here {q.dtype}, {k.dtype}, {v.dtype}")
    if not (q.shape[3] and k.shape[2]):
        raise ValueError(f"heads and their channels are one at least; here {shapes}")
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"{q.shape[2]} query heads do not divide among {k.shape[2]} key and value heads")
    if causal and q.shape[1] > k.shape[1]:
        raise ValueError(f"causal attention of more queries than keys leaves some with nothing to see: {shapes}")


def _check_mask(q: Tensor, k: Tensor, mask: Tensor | None) -> None:
    if mask is None:
        return
    if mask.dtype != torch.bool:
        raise ValueError(f"the mask is {mask.dtype}: give booleans, True where a query may see a key")
    full = (q.shape[0], q.shape[2], q.shape[1], k.shape[1])  # [b, n, s, t]
    pairs = zip(reversed(mask.shape), reversed(full), strict=False)
    if mask.dim() > 4 or any(size not in (1, whole) for size, whole in pairs):
        raise ValueError(f"the mask is {list(mask.shape)}, which does not broadcast to [b, n, s, t] = {list(full)}")


def _bounds(cu_seqlens: Tensor, q: Tensor, k: Tensor, mask: Tensor | None) -> list[int]:
    """Where documents begin and the last one ends, checked."""
    if mask is not None:
        raise ValueError("a mask and cu_seqlens exclude each other")
    if q.shape[0] != 1 or q.shape[1] != k.shape[1]:
        raise ValueError(f"packed documents stand in one row (b = 1, s = t); here q {list(q.shape)}, k {list(k.shape)}")
    if cu_seqlens.dtype != torch.int32 or cu_seqlens.dim() != 1:
        raise ValueError(f"cu_seqlens is {cu_seqlens.dtype} {list(cu_seqlens.shape)}: give a vector of int32")
    bounds = list(on_host(cu_seqlens))
    if len(bounds) < 2 or bounds[0] != 0 or bounds[-1] != q.shape[1] or bounds != sorted(bounds):
        raise ValueError(f"cu_seqlens rises from 0 to the number of tokens, {q.shape[1]}; here {bounds[:8]}")
    return sorted(set(bounds))  # an empty document has nothing to compute
