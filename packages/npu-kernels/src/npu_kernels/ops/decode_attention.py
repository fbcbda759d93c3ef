"""Attention of one new token a row over a key-value cache, each row with a length of its own."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from npu_kernels.dispatch import select
from npu_kernels.ops.attention import attention


def decode_attention(q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor) -> Tensor:
    """Softmax(q k^T / sqrt(d)) v over the first `lengths[i]` entries of row i's cache, the new token's own among them.

    Args:
        q: [b, 1, n, d].
        k_cache: [b, S, g, d], n a multiple of g; entries from `lengths[i]` on may hold any finite numbers.
        v_cache: [b, S, g, d].
        lengths: Integers [b], 1 to S; not checked, which would make the host wait for the device.

    Returns:
        [b, 1, n, d], of the type of `q`.

    Raises:
        ValueError: The sizes do not fit.
    """
    if q.dim() != 4 or q.shape[1] != 1 or k_cache.shape != v_cache.shape or k_cache.shape[0] != q.shape[0]:
        shapes = f"q {list(q.shape)}, k {list(k_cache.shape)}, v {list(v_cache.shape)}"
        raise ValueError(f"q is [b, 1, n, d], the caches are [b, S, g, d]; here {shapes}")
    if q.shape[2] % k_cache.shape[2] or q.shape[3] != k_cache.shape[3]:
        raise ValueError(f"q has heads {list(q.shape[2:])}, the caches {list(k_cache.shape[2:])}")
    if lengths.shape != q.shape[:1]:
        raise ValueError(f"lengths has shape {list(lengths.shape)} for {q.shape[0]} rows")
    filled = torch.arange(k_cache.shape[1], device=q.device) < lengths[:, None]  # [b, S]
    return select(BACKENDS)(q, k_cache, v_cache, filled[:, None, None])


def _reference(q: Tensor, k_cache: Tensor, v_cache: Tensor, filled: Tensor) -> Tensor:
    return attention(q, k_cache, v_cache, causal=False, mask=filled)


def _torch(q: Tensor, k_cache: Tensor, v_cache: Tensor, filled: Tensor) -> Tensor:
    """The r query heads of a group stand as r queries over its one key head: the cache is never repeated."""
    b, _, n, d = q.shape
    g = k_cache.shape[2]
    out = F.scaled_dot_product_attention(
        q.reshape(b, g, n // g, d),
        k_cache.transpose(1, 2),  # [b, g, S, d]
        v_cache.transpose(1, 2),
        attn_mask=filled,  # [b, 1, 1, S]
        scale=1 / math.sqrt(d),
    )
    return out.reshape(b, 1, n, d)


BACKENDS = {"reference": _reference, "torch": _torch}
