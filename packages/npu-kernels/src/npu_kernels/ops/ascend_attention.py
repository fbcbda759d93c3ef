"""Attention on Ascend: npu_fusion_attention, which trains, and npu_fused_infer_attention_score, which does not.

Both take a mask that is True where a key is *hidden*, and ignore the sparse mode without one: a causal call that forgot
its mask would attend to everything. Here the two always go together.

Source: torch_npu's documentation of both ops, https://gitcode.com/ascend/pytorch, and their schemas in the wheel.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from npu_kernels.ops.ascend import INFERENCE_DTYPES, causal_mask, check_dtype, npu
from npu_kernels.ops.common import wants_grad

FULL_MASK, RIGHT_DOWN_CAUSAL = 1, 3
"""Sparse modes: the mask as it is; the last query stands at the last key, whatever the lengths."""

MOST_DOCUMENTS = 1024
"""The longest list of lengths that fusion attention takes."""


def training(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> Tensor:
    """Attention with a backward: q [b, s, n, d], k and v [b, t, g, d]."""
    hides = causal and q.shape[1] > 1
    return _fusion(
        q,
        k,
        v,
        "BSND",
        scale=scale,
        atten_mask=causal_mask(q.device) if hides else None,
        sparse_mode=RIGHT_DOWN_CAUSAL if hides else 0,
    )


def masked(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float) -> Tensor:
    """The same with any mask: `seen` is boolean, broadcastable to [b, n, s, t], True where a query sees a key."""
    b, s, n, _ = q.shape
    heads = n if seen.dim() == 4 and seen.shape[1] > 1 else 1
    hidden = (~seen).expand(b, heads, s, k.shape[1]).contiguous()  # [b, 1 or n, s, t]
    return _fusion(q, k, v, "BSND", scale=scale, atten_mask=hidden, sparse_mode=FULL_MASK)


def packed(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float, bounds: Sequence[int]) -> Tensor:
    """Documents packed into one row, q [1, s, n, d]: as many in one call as the op takes."""
    parts = []
    for first in range(0, len(bounds) - 1, MOST_DOCUMENTS):
        start, *ends = bounds[first : first + MOST_DOCUMENTS + 1]
        tokens = slice(start, ends[-1])
        lengths = [end - start for end in ends]  # cumulative, without a leading 0
        out = _fusion(
            q[0, tokens],  # [tokens, n, d]
            k[0, tokens],
            v[0, tokens],
            "TND",
            scale=scale,
            atten_mask=causal_mask(q.device) if causal else None,
            sparse_mode=RIGHT_DOWN_CAUSAL if causal else 0,
            actual_seq_qlen=lengths,
            actual_seq_kvlen=lengths,
        )
        parts.append(out)
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).unsqueeze(0)


def _fusion(q: Tensor, k: Tensor, v: Tensor, layout: str, *, scale: float, **arguments: object) -> Tensor:
    """What the op's front end lets through is refused here; every other check is `attention`'s own."""
    check_dtype("attention", q)
    n, d = q.shape[-2:]
    if d > 768 or n > 256:
        raise ValueError(f"attention on an NPU takes up to 256 heads of up to 768 channels, not {n} of {d}")
    out: Tensor = npu().npu_fusion_attention(q, k, v, n, layout, scale=scale, **arguments)[0]
    return out


def infers(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether nothing asks for a backward and the inference op takes these."""
    n, d = q.shape[2:]
    return (
        not wants_grad(q, k, v) and q.dtype in INFERENCE_DTYPES and d % 16 == 0 and d <= 512 and n // k.shape[2] <= 64
    )


def inference(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float, kv_lengths: Sequence[int] | None = None
) -> Tensor:
    """Attention without a backward: q [b, s, n, d], k and v [b, t, g, d], of which row i holds `kv_lengths[i]`."""
    hides = causal and q.shape[1] > 1
    out: Tensor = npu().npu_fused_infer_attention_score(
        q.contiguous(),
        k.contiguous(),
        v.contiguous(),
        num_heads=q.shape[2],
        num_key_value_heads=k.shape[2],
        input_layout="BSND",
        scale=scale,
        atten_mask=causal_mask(q.device) if hides else None,
        sparse_mode=RIGHT_DOWN_CAUSAL if hides else 0,
        actual_seq_lengths_kv=None if kv_lengths is None else list(kv_lengths),
    )[0]
    return out
