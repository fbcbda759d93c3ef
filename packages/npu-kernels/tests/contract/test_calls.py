"""Every op on the emulated NPU through the real torch_npu: numbers, gradients, and what reaches CANN."""

import copy
import math

import pytest
import torch
from npu_kernels import (
    add_rms_norm,
    attention,
    cross_entropy,
    decode_attention,
    rms_norm,
    rotary_embedding,
    swiglu,
)
from npu_kernels.ops import ascend, ascend_attention
from npu_kernels.ops import cross_entropy as cross_entropy_module

from contract.compare import calls_of, randn, reference, results, same

B, S, T, N, G, D = 2, 5, 9, 6, 2, 16
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TRAINS, TRAINS_BACK = "aclnnFlashAttentionScore", "aclnnFlashAttentionScoreGrad"
PACKS, PACKS_BACK = "aclnnFlashAttentionVarLenScore", "aclnnFlashAttentionUnpaddingScoreGrad"
INFERS = "aclnnFusedInferAttentionScoreV2"
TRIANGLE = torch.ones(2048, 2048, dtype=torch.bool).triu(1)


def heads(s=S, t=S, dtype=torch.float32, groups=G, b=B):
    return (
        randn(b, s, N, D, dtype=dtype),
        randn(b, t, groups, D, dtype=dtype, seed=1),
        randn(b, t, groups, D, dtype=dtype, seed=2),
    )


def tables(*shape):
    angles = randn(*shape, D // 2).repeat_interleave(1, -1)
    angles = torch.cat((angles, angles), -1)
    return angles.cos(), angles.sin()


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm(dtype):
    calls = calls_of(
        lambda x, w: rms_norm(x, w, 1e-5), [randn(B, S, 32, dtype=dtype), randn(32, dtype=dtype)], bound=None
    )
    assert calls["aclnnRmsNorm"]["epsilon"] == 1e-5
    assert calls["aclnnRmsNorm"]["x"].shape == (B, S, 32)
    assert calls["aclnnRmsNormGrad"]["dgamma"].shape == (32,)
    assert set(calls) <= {"aclnnRmsNorm", "aclnnRmsNormGrad", "aclnnInplaceCopy"}, "one op, not eight"


def test_rms_norm_of_a_sum_is_one_op_where_nothing_is_trained():
    inputs = [randn(B, S, 32), randn(B, S, 32, seed=1), randn(32)]
    calls = calls_of(lambda x, r, w: add_rms_norm(x, r, w, 1e-5), inputs, with_grads=False)
    assert set(calls) == {"aclnnAddRmsNorm"}
    assert calls["aclnnAddRmsNorm"]["epsilon"] == 1e-5
    trained = calls_of(lambda x, r, w: add_rms_norm(x, r, w, 1e-5), inputs)
    assert {"aclnnAdd", "aclnnRmsNorm", "aclnnRmsNormGrad"} <= set(trained), "the fused op has no backward"


@pytest.mark.parametrize("shape", [(S,), (B, S)])
def test_rotary_embedding_in_fp32(shape):
    cos, sin = tables(*shape)
    q, k, _ = heads()
    calls = calls_of(lambda q, k: rotary_embedding(q, k, cos.to(q.device), sin.to(q.device)), [q, k])
    call = calls["aclnnRotaryPositionEmbeddingV2"]
    assert call["cos"].shape == ((len(shape) == 2 and B) or 1, S, 1, D)
    assert call["mode"] == 0
    assert "aclnnRotaryPositionEmbeddingGrad" in calls


@pytest.mark.parametrize(("dtype", "unit"), [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
def test_rotary_embedding_in_half_types_stays_within_the_bound_of_its_cast(dtype, unit):
    angles = 4095 * 10000.0 ** (-torch.arange(0, D, 2, dtype=torch.float64) / D)
    cos, sin = (torch.cat((x, x))[None] for x in (angles.cos(), angles.sin()))
    q, k = randn(1, 1, N, D, dtype=dtype), randn(1, 1, G, D, dtype=dtype, seed=1)
    got = results(
        lambda q, k: rotary_embedding(q, k, cos.float().to(q.device), sin.float().to(q.device)), [q, k], "npu"
    )
    for ours, x in zip(got[:2], (q, k), strict=True):
        first, second = x.double().chunk(2, -1)
        partner = torch.cat((-second, first), -1)
        exact = x.double() * cos + partner * sin
        cast = unit * (x.double() * cos).abs() + unit * (partner * sin).abs()
        error = (ours.double() - exact).abs()
        assert (error <= cast + unit * (exact.abs() + cast) + 1e-7).all()
        assert (error > unit * exact.abs() / 2 + 1e-7).any(), "the control: closer than the result's own rounding"


@pytest.mark.parametrize("dtype", DTYPES)
def test_swiglu(dtype):
    calls = calls_of(swiglu, [randn(B, S, 24, dtype=dtype)])
    assert calls["aclnnSwiGlu"]["dim"] in (-1, 2)
    assert calls["aclnnSwiGlu"]["out"].shape == (B, S, 12)
    assert "aclnnSwiGluGrad" in calls


@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("dtype", DTYPES)
def test_causal_attention_carries_its_mask(dtype, groups):
    calls = calls_of(attention, heads(dtype=dtype, groups=groups), bound=3 * 2**-8 if dtype != torch.float32 else None)
    for call in (calls[TRAINS], calls[TRAINS_BACK]):
        assert call["query"].shape == (B, S, N, D)
        assert call["key"].shape == (B, S, groups, D)
        assert torch.equal(call["atten_mask"], TRIANGLE)
        assert call["sparse_mode"] == 3
        assert call["head_num"] == N
        assert call["input_layout"] == "BSND"
        assert call["scale"] == 1 / math.sqrt(D)
        assert call["keep_prob"] == 1


def test_fewer_queries_than_keys_stand_at_the_end():
    calls = calls_of(attention, heads(S, T))
    assert calls[TRAINS]["sparse_mode"] == 3
    wrong = results(lambda q, k, v: attention(q, k[:, :S], v[:, :S]), heads(S, T), "npu")
    assert not same(wrong[:1], reference(attention, heads(S, T))[:1]), "the control: mode 2's corner"


def test_two_tokens_are_causal_too():
    for with_grads in (True, False):
        kind = TRAINS if with_grads else INFERS
        inputs = heads(2, 2, dtype=torch.bfloat16)
        calls = calls_of(attention, inputs, bound=3 * 2**-8, with_grads=with_grads)
        assert torch.equal(calls[kind]["atten_mask"], TRIANGLE)
        assert calls[kind]["sparse_mode"] == 3


def test_attention_to_everything_carries_no_mask():
    calls = calls_of(lambda q, k, v: attention(q, k, v, causal=False, scale=0.3), heads(S, T))
    assert calls[TRAINS]["atten_mask"] is None
    assert calls[TRAINS]["sparse_mode"] == 0
    assert calls[TRAINS]["scale"] == 0.3
    one = calls_of(attention, heads(1, T))
    assert one[TRAINS]["atten_mask"] is None, "the last token sees every key"


@pytest.mark.parametrize("shape", [(S, T), (1, 1, S, T), (B, 1, S, T), (B, N, S, T), (B, 1, 1, T), (1, N, S, T)])
@pytest.mark.parametrize("causal", [False, True])
def test_a_mask_reaches_cann_turned_round_and_in_full(shape, causal):
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.6
    mask[..., 0] = True
    calls = calls_of(lambda q, k, v: attention(q, k, v, mask=mask.to(q.device), causal=causal), heads(S, T))
    seen = mask & torch.ones(S, T, dtype=torch.bool).tril(T - S) if causal else mask
    sent = calls[TRAINS]["atten_mask"]
    assert sent.shape in ((B, 1, S, T), (B, N, S, T))
    assert torch.equal(sent, ~seen.expand(sent.shape))
    assert calls[TRAINS]["sparse_mode"] == 1


def test_packed_documents_are_lengths():
    q, k, v = heads(b=1, s=11, t=11)
    bounds = torch.tensor([0, 4, 4, 5, 11], dtype=torch.int32)
    calls = calls_of(lambda q, k, v: attention(q, k, v, cu_seqlens=bounds.to(q.device)), [q, k, v])
    for call in (calls[PACKS], calls[PACKS_BACK]):
        assert call["query"].shape == (11, N, D)
        assert call["actual_seq_qlen"] == call["actual_seq_kvlen"] == [4, 5, 11]
        assert call["input_layout"] == "TND"
        assert call["sparse_mode"] == 3
        assert torch.equal(call["atten_mask"], TRIANGLE)
        assert call["scale"] == 1 / math.sqrt(D)
    whole = results(attention, [q, k, v], "npu")
    assert not same(whole[:1], reference(lambda *x: attention(*x, cu_seqlens=bounds), [q, k, v])[:1]), "the control"


def test_packed_documents_without_causality():
    bounds = torch.tensor([0, 4, 11], dtype=torch.int32)
    packed = lambda q, k, v: attention(q, k, v, cu_seqlens=bounds.to(q.device), causal=False)  # noqa: E731
    calls = calls_of(packed, heads(b=1, s=11, t=11))
    assert calls[PACKS]["atten_mask"] is None


def test_more_documents_than_one_call_takes_are_several_calls(monkeypatch):
    monkeypatch.setattr(ascend_attention, "MOST_DOCUMENTS", 2)
    bounds = torch.tensor([0, 4, 5, 7, 8, 11], dtype=torch.int32)
    packed = lambda q, k, v: attention(q, k, v, cu_seqlens=bounds.to(q.device))  # noqa: E731
    calls = calls_of(packed, heads(b=1, s=11, t=11))
    assert calls[PACKS]["actual_seq_qlen"] == [3], "the last call's one document"


def test_no_call_gets_more_documents_than_it_takes():
    """The emulated op refuses more than 1,024, as CANN's does."""
    bounds = torch.arange(1101, dtype=torch.int32)
    packed = lambda q, k, v: attention(q, k, v, cu_seqlens=bounds.to(q.device))  # noqa: E731
    calls = calls_of(packed, heads(b=1, s=1100, t=1100), with_grads=False)
    assert len(calls[PACKS]["actual_seq_qlen"]) == 1100 - 1024


def test_channels_that_the_inference_op_does_not_take_go_through_the_other():
    q, k, v = (torch.cat((x, x[..., :4]), -1).detach() for x in heads(dtype=torch.bfloat16))  # 20 channels
    calls = calls_of(attention, [q, k, v], with_grads=False, bound=3 * 2**-8)
    assert TRAINS in calls
    assert INFERS not in calls


def test_no_token_sees_a_future_one_or_another_document():
    q, k, v = (x.npu().requires_grad_() for x in heads(b=1))
    grad = torch.autograd.grad(attention(q, k, v)[:, 2].sum(), [v])[0].cpu()
    assert grad[:, 3:].eq(0).all()
    assert grad[:, :3].abs().sum() > 0
    bounds = torch.tensor([0, 2, S], dtype=torch.int32).npu()
    grad = torch.autograd.grad(attention(q, k, v, cu_seqlens=bounds)[:, 2:].sum(), [v])[0].cpu()
    assert grad[:, :2].eq(0).all()
    leaked = torch.autograd.grad(attention(q, k, v, causal=False)[:, 2].sum(), [v])[0].cpu()
    assert leaked[:, 3:].abs().sum() > 0, "the control must leak"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_attention_without_a_backward_is_the_inference_op(dtype):
    calls = calls_of(attention, heads(S, T, dtype=dtype), with_grads=False)
    assert TRAINS not in calls
    call = calls[INFERS]
    assert call["query"].shape == (B, S, N, D)
    assert [x.shape for x in call["key"]] == [(B, T, G, D)]
    assert (call["num_heads"], call["num_key_value_heads"]) == (N, G)
    assert call["sparse_mode"] == 3
    assert torch.equal(call["atten_mask"], TRIANGLE)
    assert call["actual_seq_lengths_kv"] in (None, [])
    assert call["scale"] == 1 / math.sqrt(D)


def test_attention_in_fp32_without_a_backward_is_the_training_op():
    assert TRAINS in calls_of(attention, heads(), with_grads=False), "the inference op takes half types only"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_decoding_sends_each_rows_length_and_the_whole_cache(dtype):
    lengths = torch.tensor([3, 7])
    decode = lambda q, k, v: decode_attention(q, k, v, lengths.to(q.device))  # noqa: E731
    calls = calls_of(decode, heads(1, T, dtype=dtype), with_grads=False)
    assert set(calls) <= {INFERS, "aclnnInplaceCopy"}
    call = calls[INFERS]
    assert call["actual_seq_lengths_kv"] == [3, 7]
    assert call["key"][0].shape == (B, T, G, D), "a slice would be copied"
    assert call["atten_mask"] is None
    shorter = results(lambda q, k, v: decode_attention(q, k, v, torch.tensor([3, 6]).npu()), heads(1, T), "npu", False)
    assert not same(shorter, reference(decode, heads(1, T), with_grads=False)), "the control"


def test_decoding_in_fp32_is_the_training_op_with_a_mask():
    lengths = torch.tensor([3, 7])
    calls = calls_of(lambda q, k, v: decode_attention(q, k, v, lengths.to(q.device)), heads(1, T))
    assert calls[TRAINS]["atten_mask"].shape == (B, 1, 1, 7)
    assert torch.equal(calls[TRAINS]["atten_mask"][:, 0, 0], torch.arange(7) >= lengths[:, None])


def test_decoding_does_not_read_lengths_that_the_host_knows():
    lengths = torch.tensor([3, 7]).npu()
    decode_attention(*(x.npu() for x in heads(1, T)), lengths, host_lengths=[3, 7])
    assert lengths not in ascend._READ


def test_lengths_are_read_from_the_device_once():
    lengths = torch.tensor([3, 7]).npu()
    assert ascend.on_host(lengths) == (3, 7)
    known = ascend._READ[lengths]
    assert ascend.on_host(lengths) == (3, 7)
    assert ascend._READ[lengths] is known
    assert copy.deepcopy(lengths) not in ascend._READ
    lengths += 1
    assert ascend.on_host(lengths) == (4, 8), "a change is noticed"


def test_the_loss_of_a_chunk_at_a_time_takes_little_memory(monkeypatch):
    logits, labels = randn(256, 512, dtype=torch.bfloat16).npu().requires_grad_(), torch.arange(256).npu()

    def peak(chunk):  # in units of the logits, beside them
        monkeypatch.setattr(cross_entropy_module, "OTHERWISE", chunk)
        torch.npu.reset_peak_memory_stats()
        before = torch.npu.memory_allocated()
        torch.autograd.grad(cross_entropy(logits, labels).sum(), logits)
        return (torch.npu.max_memory_allocated() - before) / (logits.numel() * 2)

    assert peak(4096) < 1.5, "the gradient, and a chunk"
    assert peak(2**20) > 4, "the control: all at once in fp32, with its log-softmax and gradient"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("chunk", [2**20, 22])
def test_cross_entropy(dtype, chunk, monkeypatch):
    monkeypatch.setattr(cross_entropy_module, "OTHERWISE", chunk)
    labels = torch.randint(0, 11, (B, S), generator=torch.Generator().manual_seed(0))
    labels[0, 2] = labels[1] = -100
    calls = calls_of(lambda x: cross_entropy(x, labels.to(x.device)), [randn(B, S, 11, dtype=dtype)])
    call = calls["aclnnCrossEntropyLoss"]
    assert call["input"].dtype == torch.float32
    assert call["input"].shape == (min(B * S, chunk // 11), 11)
    assert call["reduction"] == "none"
    assert call["ignore_index"] == -100
    assert calls["aclnnCrossEntropyLossGrad"]["out"].dtype == torch.float32


def test_cross_entropy_ignores_the_label_that_it_is_told(monkeypatch):
    monkeypatch.setattr(cross_entropy_module, "OTHERWISE", 44)
    labels = torch.tensor([[3, 1, 3, 0, 10], [3, 3, 2, 5, 3]])
    calls = calls_of(lambda x: cross_entropy(x, labels.to(x.device), 3), [randn(B, S, 11)])
    assert calls["aclnnCrossEntropyLoss"]["ignore_index"] == 3
    assert calls["aclnnCrossEntropyLossGrad"]["ignore_index"] == 3
