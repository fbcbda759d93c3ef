"""Host kernels of CANN's fused ops, after its documentation of each: computed in fp32, rounded at the end.

A kernel refuses what the documentation rules out, so that a call that the front end lets through fails here as it might
on the hardware; what it returns for such a call on the hardware is not known.

Source: CANN's operator reference, pages "aclnnFlashAttentionScore", "aclnnRmsNorm" and so on.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from emulator.calls import kernel

HALF = (torch.float16, torch.bfloat16)
COMPRESSED = 2048
"""Side of the triangle that stands for any causal mask in sparse modes 2, 3 and 4."""


# --- norm, rotary, swiglu --------------------------------------------------------------------------------------------


@kernel("aclnnRmsNorm", "x gamma epsilon:float y rstd")
def _rms_norm(x: Tensor, gamma: Tensor, epsilon: float, y: Tensor, rstd: Tensor) -> None:
    assert gamma.shape == x.shape[-1:], f"gamma {list(gamma.shape)}, x {list(x.shape)}"
    assert gamma.dtype == x.dtype, f"gamma {gamma.dtype}, x {x.dtype}"
    wide = x.float()
    rstd.copy_(torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon))
    y.copy_(wide * rstd * gamma.float())


@kernel("aclnnRmsNormGrad", "dy x rstd gamma dx dgamma")
def _rms_norm_grad(dy: Tensor, x: Tensor, rstd: Tensor, gamma: Tensor, dx: Tensor, dgamma: Tensor) -> None:
    normed, dy = x.float() * rstd, dy.float()
    dgamma.copy_((dy * normed).flatten(0, -2).sum(0))
    scaled = dy * gamma.float()
    dx.copy_(rstd * (scaled - normed * (scaled * normed).mean(-1, keepdim=True)))


@kernel("aclnnAddRmsNorm", "x1 x2 gamma epsilon:float y rstd x")
def _add_rms_norm(x1: Tensor, x2: Tensor, gamma: Tensor, epsilon: float, y: Tensor, rstd: Tensor, x: Tensor) -> None:
    x.copy_(x1.float() + x2.float())
    _rms_norm(x, gamma, epsilon, y, rstd)


def _turned(x: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat((-second, first), -1)


@kernel("aclnnRotaryPositionEmbeddingV2", "x cos sin mode:int rotate out")
def _rotary(x: Tensor, cos: Tensor, sin: Tensor, mode: int, rotate: Tensor | None, out: Tensor) -> None:
    assert mode == 0, "only the half mode is emulated"
    assert x.shape[-1] < 896, "head size"
    assert x.shape[-1] % 2 == 0, "head size"
    assert cos.dtype == sin.dtype == x.dtype, f"tables {cos.dtype}, x {x.dtype}"
    out.copy_(x.float() * cos.float() + _turned(x.float()) * sin.float())


@kernel("aclnnRotaryPositionEmbeddingGrad", "dy cos sin x mode:int dx dcos dsin")
def _rotary_grad(
    dy: Tensor, cos: Tensor, sin: Tensor, x: Tensor | None, mode: int, dx: Tensor, dcos: Tensor, dsin: Tensor
) -> None:
    assert mode == 0, "only the half mode is emulated"
    dx.copy_(dy.float() * cos.float() - _turned(dy.float() * sin.float()))


@kernel("aclnnSwiGlu", "x dim:int out")
def _swiglu(x: Tensor, dim: int, out: Tensor) -> None:
    assert x.shape[dim] % 2 == 0, f"x {list(x.shape)}"
    gate, up = x.float().chunk(2, dim)
    out.copy_(gate * torch.sigmoid(gate) * up)


@kernel("aclnnSwiGluGrad", "dy x dim:int dx")
def _swiglu_grad(dy: Tensor, x: Tensor, dim: int, dx: Tensor) -> None:
    gate, up = x.float().chunk(2, dim)
    sigmoid, dy = torch.sigmoid(gate), dy.float()
    dx.copy_(torch.cat((dy * up * (sigmoid + gate * sigmoid * (1 - sigmoid)), dy * gate * sigmoid), dim))


# --- attention -------------------------------------------------------------------------------------------------------


def _hidden(mask: Tensor | None, mode: int, s: int, t: int) -> Tensor:
    """[..., s, t], True where a query does not see a key. Without a mask the mode counts for nothing."""
    if mask is None:
        return torch.zeros(s, t, dtype=torch.bool)
    if mode in (0, 1):
        assert mask.shape[-2:] == (s, t), f"a mask {list(mask.shape)} for {s} queries and {t} keys"
        return mask.bool()
    assert mode in (2, 3), f"sparse mode {mode} is not emulated"
    triangle = torch.ones(COMPRESSED, COMPRESSED, dtype=torch.bool).triu(1)
    assert torch.equal(mask.bool().reshape(mask.shape[-2:]), triangle), f"a compressed mask {list(mask.shape)}"
    return torch.ones(s, t, dtype=torch.bool).triu(1 if mode == 2 else 1 + t - s)


def _heads_first(x: Tensor, layout: str) -> Tensor:
    """A view [b, heads, s, d]."""
    assert layout in ("BSND", "BNSD"), f"layout {layout} is not emulated"
    return x.transpose(1, 2) if layout == "BSND" else x


def _weights(q: Tensor, k: Tensor, scale: float, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Weights [..., n, s, t], and the softmax's maximum and sum [..., n, s, 1]; a row that sees nothing is 0."""
    n, g = q.shape[-3], k.shape[-3]
    assert n % g == 0, f"{n} query heads, {g} key and value heads"
    scores = q.float() @ k.float().repeat_interleave(n // g, -3).transpose(-1, -2) * scale
    scores = scores.masked_fill(hidden, float("-inf"))
    top = scores.amax(-1, keepdim=True)
    powers = torch.exp(scores - top.masked_fill(top.isinf(), 0))
    total = powers.sum(-1, keepdim=True)
    return powers / total.masked_fill(total == 0, 1), top, total


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    weights, top, total = _weights(q, k, scale, hidden)
    return weights @ v.float().repeat_interleave(q.shape[-3] // v.shape[-3], -3), top, total


def _attend_grad(
    q: Tensor, k: Tensor, v: Tensor, dy: Tensor, scale: float, hidden: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    n, g = q.shape[-3], k.shape[-3]
    weights, _, _ = _weights(q, k, scale, hidden)
    q, k, v, dy = (
        q.float(),
        k.float().repeat_interleave(n // g, -3),
        v.float().repeat_interleave(n // g, -3),
        dy.float(),
    )
    dweights = dy @ v.transpose(-1, -2)
    dscores = weights * (dweights - (dweights * weights).sum(-1, keepdim=True)) * scale
    grouped = [dscores.transpose(-1, -2) @ q, weights.transpose(-1, -2) @ dy]
    dk, dv = (x.unflatten(-3, (g, n // g)).sum(-3) for x in grouped)
    return dscores @ k, dk, dv


def _check_training(q: Tensor, k: Tensor, v: Tensor) -> None:
    assert q.dtype == k.dtype == v.dtype, f"mixed types {q.dtype}, {k.dtype}, {v.dtype}"
    assert q.dtype in (*HALF, torch.float32), f"type {q.dtype}"
    assert q.shape[-1] <= 768, f"head size {q.shape[-1]}"


@kernel(
    "aclnnFlashAttentionScore",
    "query key value real_shift drop_mask padding_mask atten_mask prefix scale:float keep_prob:float pre_tokens:int "
    "next_tokens:int head_num:int input_layout:str inner_precise:int sparse_mode:int softmax_max softmax_sum "
    "softmax_out attention_out",
)
def _flash(query, key, value, _shift, _drop, _padding, atten_mask, _prefix, scale, keep_prob, _pre, _next, head_num,
           input_layout, _precise, sparse_mode, softmax_max, softmax_sum, _softmax, attention_out):  # fmt: skip
    _check_training(query, key, value)
    assert keep_prob == 1
    q, k, v = (_heads_first(x, input_layout) for x in (query, key, value))
    assert head_num == q.shape[1] <= 256, f"head_num {head_num}, query {list(query.shape)}"
    out, top, total = _attend(q, k, v, scale, _hidden(atten_mask, sparse_mode, q.shape[2], k.shape[2]))
    _heads_first(attention_out, input_layout).copy_(out)
    softmax_max.copy_(top.expand_as(softmax_max))
    softmax_sum.copy_(total.expand_as(softmax_sum))


@kernel(
    "aclnnFlashAttentionScoreGrad",
    "query key value dy pse_shift drop_mask padding_mask atten_mask softmax_max softmax_sum softmax_in attention_in "
    "prefix scale:float keep_prob:float pre_tokens:int next_tokens:int head_num:int input_layout:str "
    "inner_precise:int sparse_mode:int dq dk dv dpse",
)
def _flash_grad(query, key, value, dy, _shift, _drop, _padding, atten_mask, _max, _sum, _softmax, _out, _prefix, scale,
                _keep, _pre, _next, _heads, input_layout, _precise, sparse_mode, dq, dk, dv, _dpse):  # fmt: skip
    q, k, v, out_grad = (_heads_first(x, input_layout) for x in (query, key, value, dy))
    hidden = _hidden(atten_mask, sparse_mode, q.shape[2], k.shape[2])
    grads = _attend_grad(q, k, v, out_grad, scale, hidden)
    for target, grad in zip((dq, dk, dv), grads, strict=True):
        _heads_first(target, input_layout).copy_(grad)


def _documents(ends: list[int], tokens: int) -> Iterator[slice]:
    """Cumulative lengths, without a leading 0, to where each document lies."""
    assert ends == sorted(ends), f"lengths {ends}"
    assert ends[-1] == tokens, f"lengths {ends} for {tokens} tokens"
    assert len(ends) <= 1024, f"{len(ends)} documents"
    for start, stop in zip([0, *ends], ends, strict=False):
        yield slice(start, stop)


@kernel(
    "aclnnFlashAttentionVarLenScore",
    "query key value real_shift drop_mask padding_mask atten_mask prefix actual_seq_qlen actual_seq_kvlen scale:float "
    "keep_prob:float pre_tokens:int next_tokens:int head_num:int input_layout:str inner_precise:int sparse_mode:int "
    "softmax_max softmax_sum softmax_out attention_out",
)
def _flash_packed(query, key, value, _shift, _drop, _padding, atten_mask, _prefix, actual_seq_qlen, actual_seq_kvlen,
                  scale, _keep, _pre, _next, head_num, input_layout, _precise, sparse_mode, _max, _sum, _softmax,
                  attention_out):  # fmt: skip
    _check_training(query, key, value)
    assert input_layout == "TND"
    assert head_num == query.shape[1]
    queries, keys = _documents(actual_seq_qlen, len(query)), _documents(actual_seq_kvlen, len(key))
    for mine, theirs in zip(queries, keys, strict=True):
        q, k, v = (x.transpose(0, 1) for x in (query[mine], key[theirs], value[theirs]))  # [heads, s, d]
        out, _, _ = _attend(q, k, v, scale, _hidden(atten_mask, sparse_mode, q.shape[1], k.shape[1]))
        attention_out[mine].copy_(out.transpose(0, 1))


@kernel(
    "aclnnFlashAttentionUnpaddingScoreGrad",
    "query key value dy pse_shift drop_mask padding_mask atten_mask softmax_max softmax_sum softmax_in attention_in "
    "prefix actual_seq_qlen actual_seq_kvlen scale:float keep_prob:float pre_tokens:int next_tokens:int head_num:int "
    "input_layout:str inner_precise:int sparse_mode:int dq dk dv dpse",
)
def _flash_packed_grad(query, key, value, dy, _shift, _drop, _padding, atten_mask, _max, _sum, _softmax, _out, _prefix,
                       actual_seq_qlen, actual_seq_kvlen, scale, _keep, _pre, _next, _heads, _layout, _precise,
                       sparse_mode, dq, dk, dv, _dpse):  # fmt: skip
    queries, keys = _documents(actual_seq_qlen, len(query)), _documents(actual_seq_kvlen, len(key))
    for mine, theirs in zip(queries, keys, strict=True):
        q, k, v, out_grad = (x.transpose(0, 1) for x in (query[mine], key[theirs], value[theirs], dy[mine]))
        hidden = _hidden(atten_mask, sparse_mode, q.shape[1], k.shape[1])
        for target, grad in zip(
            (dq[mine], dk[theirs], dv[theirs]), _attend_grad(q, k, v, out_grad, scale, hidden), strict=True
        ):
            target.copy_(grad.transpose(0, 1))


@kernel(
    "aclnnFusedInferAttentionScoreV2",
    "query key value pse_shift atten_mask actual_seq_lengths actual_seq_lengths_kv dequant_scale1 quant_scale1 "
    "dequant_scale2 quant_scale2 quant_offset2 antiquant_scale antiquant_offset block_table query_padding_size "
    "kv_padding_size key_antiquant_scale key_antiquant_offset value_antiquant_scale value_antiquant_offset "
    "key_shared_prefix value_shared_prefix actual_shared_prefix_len num_heads:int scale:float pre_tokens:int "
    "next_tokens:int input_layout:str num_key_value_heads:int sparse_mode:int inner_precise:int block_size:int "
    "antiquant_mode:int softmax_lse_flag:bool key_antiquant_mode:int value_antiquant_mode:int attention_out "
    "softmax_lse",
)
def _fused_infer(query, key, value, _shift, atten_mask, _lengths, actual_seq_lengths_kv, *rest):
    num_heads, scale, _, _, input_layout, num_key_value_heads, sparse_mode = rest[17:24]
    attention_out = rest[-2]
    assert query.dtype == key[0].dtype == value[0].dtype in HALF, f"types {query.dtype}, {key[0].dtype}"
    assert query.is_contiguous(), "query is not contiguous"
    assert key[0].is_contiguous(), "key is not contiguous"
    assert query.shape[-1] % 16 == 0, f"head size {query.shape[-1]}"
    assert query.shape[-1] <= 512, f"head size {query.shape[-1]}"
    q, k, v = (_heads_first(x, input_layout) for x in (query, key[0], value[0]))
    assert (num_heads, num_key_value_heads) == (q.shape[1], k.shape[1]), f"heads {num_heads}, {num_key_value_heads}"
    assert num_heads // num_key_value_heads <= 64
    out = _heads_first(attention_out, input_layout)
    lengths = actual_seq_lengths_kv or [k.shape[2]] * len(q)
    assert len(lengths) == len(q), f"{len(lengths)} lengths for {len(q)} rows"
    for row, length in enumerate(lengths):
        assert 0 < length <= k.shape[2], f"length {length} in a cache of {k.shape[2]}"
        hidden = _hidden(atten_mask, sparse_mode, q.shape[2], length)
        hidden = hidden[row] if hidden.dim() == 4 else hidden
        out[row].copy_(_attend(q[row], k[row, :, :length], v[row, :, :length], scale, hidden)[0])


# --- loss ----------------------------------------------------------------------------------------------------------


@kernel(
    "aclnnCrossEntropyLoss",
    "input target weight reduction:str ignore_index:int label_smoothing:float lse_square_scale:float "
    "return_zloss:bool loss log_prob zloss lse",
)
def _cross_entropy(input, target, _weight, reduction, ignore_index, smoothing, _square, _return, loss, log_prob, *_):
    assert reduction == "none"
    assert smoothing == 0
    assert target.dtype == torch.int64
    log_prob.copy_(input.float().log_softmax(-1))
    ignored = target == ignore_index
    assert (ignored | (target >= 0) & (target < input.shape[1])).all(), "a label outside the vocabulary"
    picked = input.float().log_softmax(-1).gather(1, target.masked_fill(ignored, 0)[:, None])[:, 0]
    loss.copy_((-picked).masked_fill(ignored, 0))


@kernel(
    "aclnnCrossEntropyLossGrad",
    "grad_loss log_prob target weight grad_zloss lse reduction:str ignore_index:int label_smoothing:float "
    "lse_square_scale:float out",
)
def _cross_entropy_grad(grad_loss, log_prob, target, _weight, _zloss, _lse, _reduction, ignore_index, *rest):
    out = rest[-1]
    ignored = target == ignore_index
    onehot = torch.nn.functional.one_hot(target.masked_fill(ignored, 0), log_prob.shape[1])
    out.copy_((log_prob.float().exp() - onehot) * grad_loss.float().masked_fill(ignored, 0)[:, None])
