"""Attention of one new token a row over a key-value cache, each row with a length of its own."""

import math
import operator
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from npu_kernels.dispatch import Op
from npu_kernels.ops import ascend_attention
from npu_kernels.ops.ascend import INFERENCE_DTYPES, on_host
from npu_kernels.ops.attention import ATTENTION

Known = tuple[int, ...]
"""The rows' lengths on the host."""


def decode_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, *, host_lengths: Sequence[int] | None = None
) -> Tensor:
    """Softmax(q k^T / sqrt(d)) v over the first `lengths[i]` entries of row i's cache, the new token's own among them.

    Args:
        q: [b, 1, n, d].
        k_cache: [b, S, g, d], n a multiple of g; entries from `lengths[i]` on may hold any finite numbers. Give the
            whole cache: what no row has reached is not read anyway, and an NPU copies a slice.
        v_cache: [b, S, g, d].
        lengths: int32 or int64 [b], 1 to S.
        host_lengths: The same numbers where the caller has them; compared on a CPU, trusted elsewhere. Without them
            they are read, for which a host waits on an NPU, or, on CUDA, not read and not checked, and the whole cache
            is gone through.

    Returns:
        [b, 1, n, d], of the type of `q`.

    Raises:
        ValueError: The sizes, types or lengths do not fit.
    """
    _check(q, k_cache, v_cache, lengths)
    known = tuple(map(operator.index, host_lengths)) if host_lengths is not None else _read(lengths)
    if known is not None:
        _check_lengths(known, q.shape[0], k_cache.shape[1])
    if host_lengths is not None and lengths.device.type == "cpu" and known != on_host(lengths):
        raise ValueError(f"host_lengths are {list(known or ())[:8]}, lengths {lengths.tolist()[:8]}")
    if not q.shape[0]:
        return torch.empty_like(q)
    return DECODE_ATTENTION.on(q)(q, k_cache, v_cache, lengths, known)


def _check(q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor) -> None:
    fits = q.dim() == k_cache.dim() == 4 and k_cache.shape == v_cache.shape and k_cache.shape[0] == q.shape[0]
    if not fits or q.shape[1] != 1 or not (q.shape[3] and k_cache.shape[2]):
        shapes = f"q {list(q.shape)}, k {list(k_cache.shape)}, v {list(v_cache.shape)}"
        raise ValueError(f"q is [b, 1, n, d], the caches are [b, S, g, d]; here {shapes}")
    if q.shape[2] % k_cache.shape[2] or q.shape[3] != k_cache.shape[3]:
        raise ValueError(f"q has heads {list(q.shape[2:])}, the caches {list(k_cache.shape[2:])}")
    if not q.dtype == k_cache.dtype == v_cache.dtype:
        raise ValueError(f"q and the caches are of one type; here {q.dtype}, {k_cache.dtype}, {v_cache.dtype}")
    if lengths.shape != q.shape[:1] or lengths.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"lengths is {lengths.dtype} {list(lengths.shape)} for {q.shape[0]} rows: give int32 or int64")


def _check_lengths(known: Known, rows: int, slots: int) -> None:
    if len(known) != rows or min(known, default=1) < 1 or max(known, default=1) > slots:
        raise ValueError(f"{rows} lengths of 1 to {slots}, what the caches hold, are wanted; here {list(known)[:8]}")


def _read(lengths: Tensor) -> Known | None:
    return None if lengths.device.type == "cuda" else on_host(lengths)


def _reference(q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, known: Known | None) -> Tensor:
    filled = _filled(lengths, k_cache.shape[1])
    return ATTENTION.reference(q, k_cache, v_cache, False, filled, 1 / math.sqrt(q.shape[-1]), None)


def _torch(q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, known: Known | None) -> Tensor:
    """The r query heads of a group stand as r queries over its one key head: the cache is never repeated."""
    b, _, n, d = q.shape
    g = k_cache.shape[2]
    slots = k_cache.shape[1] if known is None else max(known)
    full = known is not None and min(known) == slots
    queries = q.reshape(b, g, n // g, d)
    if n == g and q.device.type == "cpu" and q.dtype in INFERENCE_DTYPES:
        queries = queries.expand(b, g, 2, d)  # two equal queries take a quarter of the time of one, in half types
    out = F.scaled_dot_product_attention(
        queries,
        k_cache[:, :slots].transpose(1, 2),  # [b, g, S, d]
        v_cache[:, :slots].transpose(1, 2),
        attn_mask=None if full else _filled(lengths, slots),
        scale=1 / math.sqrt(d),
    )
    return out[:, :, : n // g].reshape(b, 1, n, d)


def _ascend(q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, known: Known | None) -> Tensor:
    assert known is not None, "an NPU's op takes the lengths as numbers"
    scale = 1 / math.sqrt(q.shape[-1])
    if ascend_attention.infers(q, k_cache, v_cache):
        return ascend_attention.inference(q, k_cache, v_cache, False, scale, known)
    # The inference op takes half types only: fp32 goes through the training one.
    slots = max(known)
    return ascend_attention.masked(q, k_cache[:, :slots], v_cache[:, :slots], _filled(lengths, slots), scale)


def _filled(lengths: Tensor, slots: int) -> Tensor:
    """[b, 1, 1, S], True where row i of the cache holds an entry."""
    return (torch.arange(slots, device=lengths.device) < lengths[:, None])[:, None, None]


DECODE_ATTENTION = Op(
    "decode_attention",
    _reference,
    _torch,
    "F.scaled_dot_product_attention",
    _ascend,
    ("npu_fused_infer_attention_score", "npu_fusion_attention"),
)
