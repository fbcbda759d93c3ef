"""Every op and backend against independent code, forward and backward."""

import math

import pytest
import torch
from npu_kernels import attention, cross_entropy, decode_attention, dispatch, rms_norm, rotary_embedding, swiglu
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb, repeat_kv

B, S, N, G, D = 2, 7, 6, 2, 8


@pytest.fixture(params=["reference", "torch"], autouse=True)
def backend(request, monkeypatch):
    """Runs each test with each backend."""
    monkeypatch.setenv(dispatch.VARIABLE, "reference" if request.param == "reference" else "")
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


def tables(positions, d=D, dtype=torch.float32):
    inverse = 10000.0 ** (-torch.arange(0, d, 2, dtype=torch.float64) / d)
    angles = positions.double()[..., None] * inverse
    angles = torch.cat((angles, angles), -1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def assert_same(ours, theirs, inputs, *, atol=2e-6):
    """Outputs, and gradients of a random weighting of them, are equal."""
    pairs = list(zip(ours, theirs, strict=True)) if isinstance(ours, tuple) else [(ours, theirs)]
    grads = []
    for side in zip(*pairs, strict=True):
        loss = sum((x * randn(*x.shape, seed=9).detach()).sum() for x in side)
        grads.append(torch.autograd.grad(loss, inputs))
    for mine, other in [*pairs, *zip(*grads, strict=True)]:
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=atol)


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


@pytest.mark.parametrize("make", [randn, strided])
def test_rotary_embedding_is_hugging_faces(make):
    q, k = make(B, S, N, D), make(B, S, G, D, seed=1)
    cos, sin = tables(torch.arange(S))
    theirs = apply_rotary_pos_emb(q, k, cos[None], sin[None], unsqueeze_dim=2)
    assert_same(rotary_embedding(q, k, cos, sin), theirs, [q, k])


def test_rotary_embedding_takes_positions_of_each_row():
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
def test_swiglu_is_silu_of_the_first_half_times_the_second(make):
    x = make(B, S, 10)
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
        scores = scores + torch.where(allowed, 0.0, torch.finfo(scores.dtype).min).to(scores.dtype)
    return (scores.softmax(-1) @ v).transpose(1, 2)


@pytest.mark.parametrize("make", [randn, strided])
@pytest.mark.parametrize("groups", [1, 2, 6])
def test_attention_is_hugging_faces(make, groups):
    q, k, v = make(B, S, N, D), make(B, S, groups, D, seed=1), make(B, S, groups, D, seed=2)
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


def test_cross_entropy_is_pytorchs_and_zero_where_ignored():
    logits = randn(B, S, 11)
    labels = torch.randint(0, 11, (B, S), generator=torch.Generator().manual_seed(0))
    labels[0, 2] = labels[1] = -100
    theirs = -logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0] * (labels != -100)
    assert_same(cross_entropy(logits, labels), theirs, [logits])
    ours = cross_entropy(logits.bfloat16(), labels)
    assert ours.dtype == torch.float32
    assert ours[1].eq(0).all()


GRADCHECKS = {
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


@pytest.mark.parametrize("op", ["rms_norm", "swiglu", "attention"])
def test_bfloat16_stays_within_its_rounding(op):
    x = randn(2, 3, 4, D).detach()
    call = {
        "rms_norm": lambda x: rms_norm(x, torch.linspace(0.5, 2, D).to(x.dtype), 1e-5),
        "swiglu": swiglu,
        "attention": lambda x: attention(x, x[:, :, :2], x[:, :, 2:]),
    }[op]
    half = call(x.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), call(x.bfloat16().float()), rtol=2**-7, atol=2**-7)


def test_what_does_not_fit_is_refused():
    q, k = randn(1, S, N, D), randn(1, S, 4, D)
    with pytest.raises(ValueError, match="6 query heads do not divide among 4"):
        attention(q, k, k)
    with pytest.raises(ValueError, match="kept in fp32"):
        rotary_embedding(q, k, *tables(torch.arange(S), dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="gate and up"):
        swiglu(randn(2, 3))
    with pytest.raises(ValueError, match="more queries than keys"):
        attention(q, q[:, :3], q[:, :3])
