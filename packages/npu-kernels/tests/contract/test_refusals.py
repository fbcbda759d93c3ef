"""What torch_npu's front end lets through to CANN, our ops refuse: each case with the raw call that passes."""

import contextlib

import emulator
import pytest
import torch
from npu_kernels import attention, cross_entropy, decode_attention, rms_norm, rotary_embedding, swiglu

from contract.compare import randn

B, S, N, G, D = 2, 5, 6, 2, 16
TRAINS, INFERS = "aclnnFlashAttentionScore", "aclnnFusedInferAttentionScoreV2"


def npu(*shape, dtype=torch.float32):
    return randn(*shape).to("npu", dtype)


def heads(groups=G, dtype=torch.float32, kv_dtype=None, s=S, n=N, d=D):
    kv_dtype = kv_dtype or dtype
    kv = [npu(B, S, groups, d, dtype=kv_dtype) for _ in range(2)]
    return npu(B, s, n, d, dtype=dtype), *kv


def fusion(q, k, v, layout="BSND", **arguments):
    return torch.ops.npu.npu_fusion_attention(q, k, v, q.shape[-2], layout, scale=0.25, **arguments)[0]


def infer(q, k, v, lengths):
    heads_ = {"num_heads": q.shape[2], "num_key_value_heads": k.shape[2]}
    return torch.ops.npu.npu_fused_infer_attention_score(
        q, k, v, **heads_, scale=0.25, input_layout="BSND", actual_seq_lengths_kv=lengths
    )[0]


def bools(*shape):
    return torch.zeros(*shape, dtype=torch.bool, device="npu")


def bounds(*values):
    return torch.tensor(values, dtype=torch.int32, device="npu")


def packed():
    return [x[:1] for x in heads()]


def tables(d=D):
    return npu(S, d), npu(S, d)


def labels(dtype=torch.int64):
    return torch.tensor([1, 2, 3], dtype=dtype, device="npu")


HALF = torch.bfloat16
CASES = {
    "a mask of another size": (
        TRAINS,
        lambda: fusion(*heads(), atten_mask=bools(3, 3), sparse_mode=1),
        lambda: attention(*heads(), mask=~bools(3, 3)),
        r"the mask is \[3, 3\], which does not broadcast to .* = \[2, 6, 5, 5\]",
    ),
    "head counts that do not divide": (
        TRAINS,
        lambda: fusion(*heads(groups=4)),
        lambda: attention(*heads(groups=4)),
        "6 query heads do not divide among 4",
    ),
    "queries and keys of two types": (
        TRAINS,
        lambda: fusion(*heads(dtype=HALF, kv_dtype=torch.float16)),
        lambda: attention(*heads(dtype=HALF, kv_dtype=torch.float16)),
        "q, k and v are of one type",
    ),
    "attention in fp64": (
        TRAINS,
        lambda: fusion(*heads(dtype=torch.float64)),
        lambda: attention(*heads(dtype=torch.float64)),
        "attention on an NPU takes float16, bfloat16 and float32, not float64",
    ),
    "heads that are too large": (
        TRAINS,
        lambda: fusion(*heads(d=784)),
        lambda: attention(*heads(d=784)),
        "up to 256 heads of up to 768 channels, not 6 of 784",
    ),
    "too many heads": (
        TRAINS,
        lambda: fusion(*heads(n=258)),
        lambda: attention(*heads(n=258)),
        "up to 256 heads of up to 768 channels, not 258 of 16",
    ),
    "documents past the data": (
        "aclnnFlashAttentionVarLenScore",
        lambda: fusion(*(x[0] for x in packed()), layout="TND", actual_seq_qlen=[2, 9], actual_seq_kvlen=[2, 9]),
        lambda: attention(*packed(), cu_seqlens=bounds(0, 2, 9)),
        "cu_seqlens rises from 0 to the number of tokens, 5",
    ),
    "documents that overlap": (
        "aclnnFlashAttentionVarLenScore",
        lambda: fusion(*(x[0] for x in packed()), layout="TND", actual_seq_qlen=[4, 2, 5], actual_seq_kvlen=[4, 2, 5]),
        lambda: attention(*packed(), cu_seqlens=bounds(0, 4, 2, 5)),
        "cu_seqlens rises from 0",
    ),
    "a row longer than the cache": (
        INFERS,
        lambda: infer(*heads(dtype=HALF, s=1), [3, 9]),
        lambda: decode_attention(*heads(dtype=HALF, s=1), torch.tensor([3, 9]).npu()),
        r"2 lengths of 1 to 5, what the caches hold, are wanted; here \[3, 9\]",
    ),
    "a cache of another type": (
        INFERS,
        lambda: infer(*heads(dtype=HALF, kv_dtype=torch.float16, s=1), [3, 5]),
        lambda: decode_attention(*heads(dtype=HALF, kv_dtype=torch.float16, s=1), torch.tensor([3, 5]).npu()),
        "q and the caches are of one type",
    ),
    "halves of different sizes": (
        "aclnnSwiGlu",
        lambda: torch.ops.npu.npu_swiglu(npu(3, 7), -1),
        lambda: swiglu(npu(3, 7)),
        "the last dimension is 7: gate and up need halves of the same size",
    ),
    "swiglu in fp64": (
        "aclnnSwiGlu",
        lambda: torch.ops.npu.npu_swiglu(npu(3, 8, dtype=torch.float64), -1),
        lambda: swiglu(npu(3, 8, dtype=torch.float64)),
        "swiglu on an NPU takes",
    ),
    "a weight of another length": (
        "aclnnRmsNorm",
        lambda: torch.ops.npu.npu_rms_norm(npu(3, 8), npu(7), 1e-5),
        lambda: rms_norm(npu(3, 8), npu(7), 1e-5),
        r"the weight has shape \[7\], the last dimension of x is 8",
    ),
    "a weight of another type": (
        "aclnnRmsNorm",
        lambda: torch.ops.npu.npu_rms_norm(npu(3, 8, dtype=HALF), npu(8), 1e-5),
        lambda: rms_norm(npu(3, 8, dtype=HALF), npu(8), 1e-5),
        "the weight is torch.float32, x is torch.bfloat16",
    ),
    "rms_norm in fp64": (
        "aclnnRmsNorm",
        lambda: torch.ops.npu.npu_rms_norm(npu(3, 8, dtype=torch.float64), npu(8, dtype=torch.float64), 1e-5),
        lambda: rms_norm(npu(3, 8, dtype=torch.float64), npu(8, dtype=torch.float64), 1e-5),
        "rms_norm on an NPU takes",
    ),
    "heads too large to turn": (
        "aclnnRotaryPositionEmbeddingV2",
        lambda: torch.ops.npu.npu_rotary_mul(npu(B, S, N, 896), npu(1, S, 1, 896), npu(1, S, 1, 896)),
        lambda: rotary_embedding(npu(B, S, N, 896), npu(B, S, G, 896), *tables(896)),
        "heads below 896 channels, not 896",
    ),
    "labels that are no int64": (
        "aclnnCrossEntropyLoss",
        lambda: torch.ops.npu.npu_cross_entropy_loss(npu(3, 8), labels(torch.int32), reduction="none"),
        lambda: cross_entropy(npu(3, 8), labels(torch.int32)),
        "the labels are torch.int32: give int64",
    ),
    "a loss in fp64": (
        "aclnnCrossEntropyLoss",
        lambda: torch.ops.npu.npu_cross_entropy_loss(npu(3, 8, dtype=torch.float64), labels(), reduction="none"),
        lambda: cross_entropy(npu(3, 8, dtype=torch.float64), labels()),
        "cross_entropy on an NPU takes",
    ),
}


def reaches_cann(call, op):
    """Whether a call gets as far as `op`; what our stand-in for CANN then says to it does not matter."""
    with emulator.recording() as calls, contextlib.suppress(RuntimeError):
        call()
    return op in {made.op for made in calls}


@pytest.mark.parametrize("case", CASES)
def test_the_front_end_lets_it_through_and_we_do_not(case):
    op, raw, ours, message = CASES[case]
    assert reaches_cann(raw, op), "torch_npu refuses this itself now: the case can go"
    with emulator.recording() as calls, pytest.raises(ValueError, match=message):
        ours()
    assert op not in {made.op for made in calls}


def test_a_causal_mode_without_its_mask_sees_everything_and_we_never_send_one():
    q, k, v = (x.requires_grad_() for x in heads())
    leak = torch.autograd.grad(fusion(q, k, v, sparse_mode=2)[:, 0].sum(), [v])[0].cpu()
    assert leak[:, 1:].abs().sum() > 0, "torch_npu lets it through, and the first token sees the last"
    kept = torch.autograd.grad(attention(q, k, v)[:, 0].sum(), [v])[0].cpu()
    assert kept[:, 1:].eq(0).all()


def test_a_cache_that_is_not_contiguous_is_copied():
    q, k, v = heads(dtype=HALF, s=1)
    assert reaches_cann(lambda: infer(q, k[:, :3], v[:, :3], [3, 3]), INFERS)
    with emulator.recording() as calls:
        out = decode_attention(q, k[:, :3], v[:, :3], torch.tensor([2, 3]).npu())
    assert [x.shape for call in calls if call.op == INFERS for x in call["key"]] == [(B, 3, G, D)]
    assert torch.isfinite(out.cpu()).all()
