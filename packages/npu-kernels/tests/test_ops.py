"""Every op and backend against independent code, forward and backward."""

import copy
import math
import subprocess
import sys

import pytest
import torch
from npu_kernels import (
    KernelError,
    add_rms_norm,
    attention,
    cross_entropy,
    decode_attention,
    dispatch,
    rms_norm,
    rotary_embedding,
    swiglu,
)
from npu_kernels.ops import common
from npu_kernels.ops import cross_entropy as cross_entropy_module
from npu_kernels.ops import rotary_embedding as rotary_module
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb, repeat_kv

B, S, N, G, D = 2, 7, 6, 2, 8


@pytest.fixture(params=["reference", "torch", "torch, large"], autouse=True)
def backend(request, monkeypatch):
    """Runs each test with each backend, and with the way that PyTorch's takes for large tensors."""
    monkeypatch.setenv(dispatch.VARIABLE, "reference" if request.param == "reference" else "")
    if request.param == "torch, large":
        monkeypatch.setattr(common, "SMALL", 0)
    dispatch.forget_choice()
    yield request.param
    monkeypatch.undo()
    dispatch.forget_choice()


def randn(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed + math.prod(shape))
    return torch.randn(shape, generator=generator, dtype=dtype).requires_grad_()


def strided(*shape, dtype=torch.float32, seed=0):
    """The same kind of values, every dimension in another order in memory."""
    flipped = randn(*reversed(shape), dtype=dtype, seed=seed).detach()
    return flipped.permute(*reversed(range(len(shape)))).requires_grad_()


def weighted_sum(x):
    return (x * randn(*x.shape, seed=9).detach()).sum()


def tables(positions, d=D, dtype=torch.float32):
    inverse = 10000.0 ** (-torch.arange(0, d, 2, dtype=torch.float64) / d)
    angles = positions.double()[..., None] * inverse
    angles = torch.cat((angles, angles), -1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def assert_same(ours, theirs, inputs):
    """Outputs, and gradients of a random weighting of them, are equal to rounding."""
    rtol, atol = (1e-5, 2e-6) if inputs[0].dtype == torch.float32 else (1e-12, 1e-13)
    pairs = list(zip(ours, theirs, strict=True)) if isinstance(ours, tuple) else [(ours, theirs)]
    grads = []
    for side in zip(*pairs, strict=True):
        loss = sum((x * randn(*x.shape, seed=9).detach()).sum() for x in side)
        grads.append(torch.autograd.grad(loss, inputs))
    for mine, other in [*pairs, *zip(*grads, strict=True)]:
        torch.testing.assert_close(mine, other, rtol=rtol, atol=atol)


@pytest.mark.parametrize("make", [randn, strided])
def test_rms_norm_is_hugging_faces(make):
    x, weight = make(B, S, 16), randn(16, seed=1)
    norm = LlamaRMSNorm(16, eps=1e-5)
    norm.weight = torch.nn.Parameter(weight.detach().clone())
    theirs = norm(x)
    loss = (theirs * randn(*theirs.shape, seed=9).detach()).sum()
    expected = torch.autograd.grad(loss, [x, norm.weight])
    ours = rms_norm(x, weight, 1e-5)
    torch.testing.assert_close(ours, theirs)
    got = torch.autograd.grad((ours * randn(*ours.shape, seed=9).detach()).sum(), [x, weight])
    for mine, other in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=2e-6)


def test_rms_norm_of_a_sum_is_a_sum_and_its_norm():
    x, residual, weight = randn(B, S, 16), randn(B, S, 16, seed=1), randn(16, seed=2)
    norm = LlamaRMSNorm(16, eps=1e-5)
    norm.weight = torch.nn.Parameter(weight.detach().clone())
    total = x + residual
    expected = torch.autograd.grad(weighted_sum(norm(total)) + total.sum(), [x, residual, norm.weight])
    ours, ours_total = add_rms_norm(x, residual, weight, 1e-5)
    torch.testing.assert_close(ours, norm(total))
    assert torch.equal(ours_total, total)
    got = torch.autograd.grad(weighted_sum(ours) + ours_total.sum(), [x, residual, weight])
    for mine, other in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=5e-6)
    assert not torch.allclose(ours, norm(x), atol=1e-2), "the control: without the residual"


@pytest.mark.parametrize("make", [randn, strided])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("piece", [2**17, 3 * N * D * B, 1])
def test_rotary_embedding_is_hugging_faces(make, dtype, piece, monkeypatch):
    monkeypatch.setattr(rotary_module, "PIECE", piece)
    q, k = make(B, S, N, D, dtype=dtype), make(B, S, G, D, dtype=dtype, seed=1)
    cos, sin = tables(torch.arange(S), dtype=dtype)
    theirs = apply_rotary_pos_emb(q, k, cos[None], sin[None], unsqueeze_dim=2)
    assert_same(rotary_embedding(q, k, cos, sin), theirs, [q, k])


def test_rotary_embedding_takes_positions_of_each_row(monkeypatch):
    monkeypatch.setattr(rotary_module, "PIECE", 3 * N * D * B)
    q, k = randn(B, S, N, D), randn(B, S, G, D, seed=1)
    positions = torch.stack((torch.arange(S), torch.arange(S) * 3 + 5))
    cos, sin = tables(positions)
    theirs = apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=2)
    assert_same(rotary_embedding(q, k, cos, sin), theirs, [q, k])
    moved = rotary_embedding(q[1:], k[1:], *tables(positions[1]))
    torch.testing.assert_close(rotary_embedding(q, k, cos, sin)[0][1:], moved[0])


def test_rotary_embedding_at_position_4095_is_as_exact_as_bfloat16_can_be():
    q, k = (x.detach().to(torch.bfloat16) for x in (randn(1, 1, N, 128), randn(1, 1, G, 128, seed=1)))
    cos, sin = tables(torch.tensor([4095]), 128)
    exact = apply_rotary_pos_emb(q.double(), k.double(), *tables(torch.tensor([[4095]]), 128, torch.float64), 2)
    for ours, true in zip(rotary_embedding(q, k, cos, sin), exact, strict=True):
        assert ours.dtype == torch.bfloat16
        assert (ours.double() - true).abs().max() <= (true.abs() * 2**-8 + 1e-5).max()
        assert ((ours.double() - true).abs() <= true.abs() * 2**-8 + 1e-5).all()
    # The control: tables in bfloat16 miss that bound.
    worse = apply_rotary_pos_emb(q, k, cos[None].bfloat16(), sin[None].bfloat16(), 2)[0]
    assert not ((worse.double() - exact[0]).abs() <= exact[0].abs() * 2**-8 + 1e-5).all()


@pytest.mark.parametrize("make", [randn, strided])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_swiglu_is_silu_of_the_first_half_times_the_second(make, dtype):
    x = make(B, S, 10, dtype=dtype)
    theirs = F.silu(x[..., :5]) * x[..., 5:]
    assert_same(swiglu(x), theirs, [x])
    swapped = F.silu(x[..., 5:]) * x[..., :5]
    assert not torch.allclose(swiglu(x), swapped, atol=1e-2)


def eager(q, k, v, allowed=None):
    """transformers' eager attention, in its own layout."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    k, v = (repeat_kv(x, q.shape[1] // k.shape[1]) for x in (k, v))
    scores = q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])
    if allowed is not None:
        scores = scores + torch.zeros_like(scores).masked_fill(~allowed, torch.finfo(scores.dtype).min)
    return (scores.softmax(-1) @ v).transpose(1, 2)


@pytest.mark.parametrize("make", [randn, strided])
@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_attention_is_hugging_faces(make, groups, dtype):
    q = make(B, S, N, D, dtype=dtype)
    k, v = (make(B, S, groups, D, dtype=dtype, seed=seed) for seed in (1, 2))
    below = torch.ones(S, S, dtype=torch.bool).tril()
    assert_same(attention(q, k, v), eager(q, k, v, below), [q, k, v])
    assert_same(attention(q, k, v, causal=False), eager(q, k, v), [q, k, v])


def test_fewer_queries_than_keys_stand_at_the_end():
    q, k, v = randn(B, S, N, D), randn(B, S, G, D, seed=1), randn(B, S, G, D, seed=2)
    whole = attention(q, k, v)
    for count in (1, 3):
        torch.testing.assert_close(attention(q[:, -count:], k, v), whole[:, -count:])


def test_mask_and_causality_both_hold():
    q, k, v = randn(B, S, N, D), randn(B, S, G, D, seed=1), randn(B, S, G, D, seed=2)
    mask = torch.rand(B, 1, S, S, generator=torch.Generator().manual_seed(0)) < 0.5
    mask |= torch.eye(S, dtype=torch.bool)
    below = torch.ones(S, S, dtype=torch.bool).tril()
    assert_same(attention(q, k, v, mask=mask), eager(q, k, v, mask & below), [q, k, v])
    assert_same(attention(q, k, v, mask=mask, causal=False), eager(q, k, v, mask), [q, k, v])


def test_no_token_sees_a_future_one():
    q, k, v = randn(1, S, N, D), randn(1, S, G, D, seed=1), randn(1, S, G, D, seed=2)
    for at in range(S):
        grads = torch.autograd.grad(attention(q, k, v)[:, at].sum(), [k, v])
        assert all(grad[:, at + 1 :].eq(0).all() for grad in grads)
        assert grads[1][:, : at + 1].abs().sum() > 0
    leaked = torch.autograd.grad(attention(q, k, v, causal=False)[:, 0].sum(), [v])[0]
    assert leaked[:, 1:].abs().sum() > 0, "the control must leak"


def test_no_token_sees_another_document():
    q, k, v = randn(1, S, N, D), randn(1, S, G, D, seed=1), randn(1, S, G, D, seed=2)
    bounds = torch.tensor([0, 3, 3, 4, S], dtype=torch.int32)
    packed = attention(q, k, v, cu_seqlens=bounds)
    alone = [attention(q[:, a:b], k[:, a:b], v[:, a:b]) for a, b in ((0, 3), (3, 4), (4, S))]
    assert_same(packed, torch.cat(alone, 1), [q, k, v])
    grad = torch.autograd.grad(attention(q, k, v, cu_seqlens=bounds)[:, 4:].sum(), [v])[0]
    assert grad[:, :4].eq(0).all()
    leaked = torch.autograd.grad(attention(q, k, v)[:, 4:].sum(), [v])[0]
    assert leaked[:, :4].abs().sum() > 0, "the control must leak"


@pytest.mark.parametrize("bounds", [[0, 3], [1, S], [0, 5, 3, S]])
def test_boundaries_that_are_no_cover_are_refused(bounds):
    q, k = randn(1, S, N, D), randn(1, S, G, D)
    with pytest.raises(ValueError, match="cu_seqlens rises from 0"):
        attention(q, k, k, cu_seqlens=torch.tensor(bounds, dtype=torch.int32))


def test_decoding_sees_each_rows_own_length_and_no_more():
    q, k, v = randn(3, 1, N, D), randn(3, S, G, D, seed=1), randn(3, S, G, D, seed=2)
    lengths = torch.tensor([1, 4, S])
    out = decode_attention(q, k, v, lengths)
    assert out.shape == q.shape
    for row, length in enumerate(lengths.tolist()):
        alone = eager(*(x[row : row + 1] for x in (q, k[:, :length], v[:, :length])))
        torch.testing.assert_close(out[row : row + 1], alone)
    grad = torch.autograd.grad(out.sum(), [v])[0]
    assert grad[1, 4:].eq(0).all()
    assert grad[1, 3].abs().sum() > 0
    assert torch.equal(decode_attention(q, k, v, lengths, host_lengths=lengths.tolist()), out)


@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_decoding_is_the_same_in_every_type(dtype, groups):
    q, k, v = randn(2, 1, N, D), randn(2, S, groups, D, seed=1), randn(2, S, groups, D, seed=2)
    q, k, v = (x.detach().to(dtype) for x in (q, k, v))
    lengths = torch.tensor([4, S])
    out = decode_attention(q, k, v, lengths)
    assert out.dtype == dtype
    exact = decode_attention(q.double(), k.double(), v.double(), lengths)
    bound = {torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-9}[dtype]
    torch.testing.assert_close(out.double(), exact, rtol=bound, atol=bound)


def test_a_cache_is_read_as_far_as_its_longest_row():
    q, k, v = randn(2, 1, N, D), randn(2, S, G, D, seed=1), randn(2, S, G, D, seed=2)
    k, v = k.detach(), v.detach()
    lengths = torch.tensor([3, 3])
    out = decode_attention(q, k, v, lengths)
    k[:, 3:], v[:, 3:] = 1e30, -1e30
    torch.testing.assert_close(decode_attention(q, k, v, lengths), out)
    k[:, 2], v[:, 2] = 0, 0
    assert not torch.allclose(decode_attention(q, k, v, lengths), out, atol=1e-3), "the control"


@pytest.mark.parametrize("chunk", [2**21, 11 * 4, 1])
def test_cross_entropy_is_pytorchs_and_zero_where_ignored(chunk, monkeypatch):
    monkeypatch.setitem(cross_entropy_module.CHUNK_ELEMENTS, "cpu", chunk)
    logits = randn(B, S, 11)
    labels = torch.randint(0, 11, (B, S), generator=torch.Generator().manual_seed(0))
    labels[0, 2] = labels[1] = -100
    theirs = -logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0] * (labels != -100)
    assert_same(cross_entropy(logits, labels), theirs, [logits])
    ours = cross_entropy(logits.bfloat16(), labels)
    assert ours.dtype == torch.float32
    assert ours[1].eq(0).all()
    half = logits.detach().bfloat16().requires_grad_()
    grad = torch.autograd.grad(cross_entropy(half, labels).sum(), half)[0]
    exact = torch.autograd.grad(cross_entropy(half.float(), labels).sum(), half)[0]
    assert grad.dtype == torch.bfloat16
    torch.testing.assert_close(grad, exact, rtol=2**-7, atol=2**-9)


def test_a_small_loss_of_large_logits_keeps_its_digits(backend):
    if backend == "reference":
        return
    logits = torch.tensor([[1000.0, 990.0, 985.0, 0.0]])
    exact = F.cross_entropy(logits.double(), torch.tensor([0]))
    torch.testing.assert_close(cross_entropy(logits, torch.tensor([0]))[0].double(), exact, rtol=5e-3, atol=0)
    assert abs(logits.logsumexp(-1)[0] - 1000 - exact) > 0.1 * exact, "the control: as a difference"


MEASURE = """
import resource, sys, torch
from npu_kernels import cross_entropy
tokens, v = 2048, 32000
logits = torch.empty(tokens, v, dtype=torch.bfloat16).normal_().requires_grad_()
labels = torch.randint(0, v, (tokens,))
ours = lambda: cross_entropy(logits, labels)
pytorchs = lambda: torch.nn.functional.cross_entropy(logits.float(), labels, reduction="none")
small = torch.randn(8, v, requires_grad=True)
torch.nn.functional.cross_entropy(small, labels[:8]).backward()  # libraries load
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
{"ours": ours, "pytorchs": pytorchs}[sys.argv[1]]().sum().backward()
print((peak() - before) / (logits.numel() * logits.element_size()))
"""


def test_cross_entropy_holds_little_more_than_the_gradient(backend):
    if backend != "torch":
        return

    def peak(name):  # in units of the logits, beside them
        return float(subprocess.run([sys.executable, "-c", MEASURE, name], capture_output=True, check=True).stdout)

    assert peak("ours") < 2, "the gradient, and a chunk"
    assert peak("pytorchs") > 4, "the control: logits and log-softmax in fp32, and a gradient of each type"


GRADCHECKS = {
    "add_rms_norm": lambda x: add_rms_norm(x, x[:, :1].expand_as(x), torch.linspace(0.5, 2, D).double(), 1e-5),
    "rms_norm": lambda x: rms_norm(x, torch.linspace(0.5, 2, D, dtype=torch.float64), 1e-5),
    "rms_norm weight": lambda x: rms_norm(randn(3, D, dtype=torch.float64).detach(), x[0, 0, 0], 1e-5),
    "rotary": lambda x: rotary_embedding(x, x[:, :, :2], *tables(torch.arange(3), dtype=torch.float64)),
    "swiglu": swiglu,
    "attention": lambda x: attention(x, x[:, :, :2], x[:, :, 2:]),
    "packed": lambda x: attention(
        x[:1], x[:1, :, :2], x[:1, :, 2:], cu_seqlens=torch.tensor([0, 1, 3], dtype=torch.int32)
    ),
    "decode": lambda x: decode_attention(x[:, :1], x[:, :, :2], x[:, :, 2:], torch.tensor([1, 3])),
    "cross_entropy": lambda x: cross_entropy(x, torch.tensor([[[0, 1, 2, -100]] * 3] * 2)),
}


@pytest.mark.parametrize("op", GRADCHECKS)
def test_gradients_are_those_of_finite_differences(op):
    x = randn(2, 3, 4, D, dtype=torch.float64)
    assert torch.autograd.gradcheck(GRADCHECKS[op], x)


@pytest.mark.parametrize("op", ["rms_norm", "add_rms_norm", "swiglu", "attention", "decode_attention"])
def test_bfloat16_stays_within_its_rounding(op):
    x = randn(2, 3, 4, D).detach()
    call = {
        "rms_norm": lambda x: rms_norm(x, torch.linspace(0.5, 2, D).to(x.dtype), 1e-5),
        "swiglu": swiglu,
        "add_rms_norm": lambda x: add_rms_norm(x, x, torch.linspace(0.5, 2, D).to(x.dtype), 1e-5)[0],
        "attention": lambda x: attention(x, x[:, :, :2], x[:, :, 2:]),
        "decode_attention": lambda x: decode_attention(x[:, :1], x[:, :, :2], x[:, :, 2:], torch.tensor([1, 3])),
    }[op]
    half = call(x.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), call(x.bfloat16().float()), rtol=2**-7, atol=2**-7)


HALF = torch.bfloat16
Q, K4, K = randn(1, S, N, D).detach(), randn(1, S, 4, D).detach(), randn(1, S, G, D).detach()
MASK = torch.ones(S, S, dtype=torch.bool)
BOUNDS = torch.tensor([0, S], dtype=torch.int32)
REFUSED = {
    "6 query heads do not divide among 4": lambda: attention(Q, K4, K4),
    "more queries than keys": lambda: attention(Q, Q[:, :3], Q[:, :3]),
    r"q is \[b, s, n, d\]": lambda: attention(Q[0], K, K),
    "q, k and v are of one type": lambda: attention(Q, K, K.to(HALF)),
    r"the mask is torch.float32: give booleans": lambda: attention(Q, K, K, mask=MASK.float()),
    r"the mask is \[3, 7\], which does not broadcast": lambda: attention(Q, K, K, mask=MASK[:3]),
    r"the mask is \[1, 1, 1, 7, 7\]": lambda: attention(Q, K, K, mask=MASK[None, None, None]),
    "a mask and cu_seqlens exclude each other": lambda: attention(Q, K, K, mask=MASK, cu_seqlens=BOUNDS),
    "give a vector of int32": lambda: attention(Q, K, K, cu_seqlens=BOUNDS.long()),
    r"stand in one row \(b = 1, s = t\)": lambda: attention(Q, K[:, :3], K[:, :3], causal=False, cu_seqlens=BOUNDS),
    "kept in fp32": lambda: rotary_embedding(Q, K, *tables(torch.arange(S), dtype=HALF)),
    r"cos has shape \[6, 8\].*give \[s, d\]": lambda: rotary_embedding(Q, K, *tables(torch.arange(S - 1))),
    r"cos has shape \[2, 7, 8\]": lambda: rotary_embedding(Q, K, *tables(torch.arange(2 * S).view(2, S))),
    "q has 7 channels a head and k 7: they must be equal and even": lambda: rotary_embedding(
        Q[..., :7], K[..., :7], *(x[..., :7] for x in tables(torch.arange(S)))
    ),
    "q is torch.float32, k is torch.bfloat16": lambda: rotary_embedding(Q, K.to(HALF), *tables(torch.arange(S))),
    "gate and up": lambda: swiglu(randn(2, 3)),
    "the weight has shape": lambda: rms_norm(Q, torch.ones(3), 1e-5),
    "the weight is torch.bfloat16, x is torch.float32": lambda: rms_norm(Q, torch.ones(D, dtype=HALF), 1e-5),
    "the residual torch.float32": lambda: add_rms_norm(Q, Q[:, :1], torch.ones(D), 1e-5),
    r"the caches are \[b, S, g, d\]": lambda: decode_attention(Q, K, K, torch.tensor([1])),
    "q has heads": lambda: decode_attention(Q[:, :1], K4, K4, torch.tensor([1])),
    "q and the caches are of one type": lambda: decode_attention(Q[:, :1].to(HALF), K, K, torch.tensor([1])),
    "lengths is torch.int64": lambda: decode_attention(Q[:, :1], K, K, torch.tensor([1, 2])),
    r"1 lengths of 1 to 7.*here \[0\]": lambda: decode_attention(Q[:, :1], K, K, torch.tensor([0])),
    r"1 lengths of 1 to 7.*here \[8\]": lambda: decode_attention(Q[:, :1], K, K, torch.tensor([8])),
    r"1 lengths of 1 to 7.*here \[3, 3\]": lambda: decode_attention(
        Q[:, :1], K, K, torch.tensor([3]), host_lengths=[3, 3]
    ),
    "host_lengths are": lambda: decode_attention(Q[:, :1], K, K, torch.tensor([3]), host_lengths=[4]),
    "lengths is torch.float32": lambda: decode_attention(Q[:, :1], K, K, torch.ones(1)),
    "the scale is nan": lambda: attention(Q, K, K, scale=math.nan),
    "the scale is 0.0": lambda: attention(Q, K, K, scale=0.0),
    "heads and their channels are one at least": lambda: attention(Q, K[:, :, :0], K[:, :, :0]),
    "q is torch.int64": lambda: rotary_embedding(Q.long(), K.long(), *tables(torch.arange(S))),
    "the logits are torch.int64": lambda: cross_entropy(Q.long(), torch.zeros(1, S, N, dtype=torch.int64)),
    "labels": lambda: cross_entropy(Q, torch.zeros(1, S, dtype=torch.int64)),
    "the labels are torch.int32": lambda: cross_entropy(Q, torch.zeros(1, S, N, dtype=torch.int32)),
}


def test_attention_takes_any_positive_scale():
    q, k, v = randn(B, S, N, D), randn(B, S, G, D, seed=1), randn(B, S, G, D, seed=2)
    repeated = (x.repeat_interleave(N // G, 2).transpose(1, 2) for x in (k, v))
    theirs = F.scaled_dot_product_attention(q.transpose(1, 2), *repeated, is_causal=True, scale=0.7).transpose(1, 2)
    assert_same(attention(q, k, v, scale=0.7), theirs, (q, k, v))
    assert not torch.allclose(attention(q, k, v), theirs, atol=1e-3), "the control"


def test_cross_entropy_ignores_whatever_label_it_is_told():
    logits, labels = randn(5, 11), torch.tensor([0, 3, 7, 3, 10])
    theirs = F.cross_entropy(logits, labels, ignore_index=3, reduction="none")
    assert_same(cross_entropy(logits, labels, 3), theirs, (logits,))


def test_bounds_and_lengths_are_read_as_they_are():
    """Changed through numpy's view of the same memory, or in a copy of a tensor that was read before."""
    q, k, v = randn(1, S, N, D).detach(), randn(1, S, G, D, seed=1).detach(), randn(1, S, G, D, seed=2).detach()
    bounds = torch.tensor([0, 3, S], dtype=torch.int32)
    attention(q, k, v, cu_seqlens=bounds)
    expected = attention(q, k, v, cu_seqlens=torch.tensor([0, 5, S], dtype=torch.int32))
    bounds.numpy()[1] = 5
    assert torch.equal(attention(q, k, v, cu_seqlens=bounds), expected)
    assert torch.equal(attention(q, k, v, cu_seqlens=copy.deepcopy(bounds)), expected)
    lengths = torch.tensor([2])
    decode_attention(q[:, :1], k, v, lengths)
    lengths.numpy()[0] = S
    assert torch.equal(decode_attention(q[:, :1], k, v, lengths), decode_attention(q[:, :1], k, v, torch.tensor([S])))


def test_a_second_derivative_is_right_or_refused(backend, monkeypatch):
    """Never silently without a part of it."""
    monkeypatch.setattr(cross_entropy_module, "CHUNK_ELEMENTS", {"cpu": D})
    ops = [
        (lambda x: rms_norm(x, torch.ones(D), 1e-5), randn(3, D)),
        (swiglu, randn(3, 2 * D)),
        (lambda x: cross_entropy(x, torch.tensor([1, 2, 3])), randn(3, D)),
    ]
    for op, x in ops:
        if backend == "reference":
            (grad,) = torch.autograd.grad(op(x).sum(), x, create_graph=True)
            assert torch.autograd.grad(grad.pow(2).sum(), x)[0].abs().max() > 0
        elif backend == "torch, large":
            with pytest.raises(KernelError, match="no second derivative"):
                torch.autograd.grad(op(x).sum(), x, create_graph=True)


def test_nothing_in_nothing_out():
    none = torch.empty(1, 0, N, D)
    assert attention(none, none, none, cu_seqlens=torch.tensor([0, 0], dtype=torch.int32)).shape == none.shape
    rows = torch.empty(0, 1, N, D)
    assert decode_attention(rows, rows, rows, torch.empty(0, dtype=torch.int64)).shape == rows.shape
    single = torch.tensor([0.5, 1.5])
    torch.testing.assert_close(cross_entropy(single, torch.tensor(1)), F.cross_entropy(single, torch.tensor(1)))


@pytest.mark.parametrize("message", REFUSED)
def test_what_does_not_fit_is_refused_in_one_line(message):
    with pytest.raises(ValueError, match=message) as caught:
        REFUSED[message]()
    assert "\n" not in str(caught.value)
