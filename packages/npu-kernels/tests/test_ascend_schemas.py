"""Every Ascend backend against the locked schemas of torch_npu's ops, without torch_npu: PyTorch checks the calls.

The ops are registered for the CPU, each computing by our references what torch_npu documents. With the wheel,
`tests/contract` runs the same backends on the real front end.
"""

import sys

import pytest
import torch
from npu_kernels import dispatch, ops
from npu_kernels.ops.ascend_schemas import SCHEMAS

ops.load_all()
REFERENCE = {name: op.reference for name, op in dispatch.OPS.items()}
S, N, G, D = 5, 4, 2, 16


def rms_norm(input, gamma, epsilon):
    return REFERENCE["rms_norm"](input, gamma, epsilon), input.new_empty(*input.shape[:-1], 1)


def add_rms_norm(x1, x2, gamma, epsilon):
    total = x1 + x2
    return REFERENCE["rms_norm"](total, gamma, epsilon), x1.new_empty(*x1.shape[:-1], 1), total


def rotary_mul(input, r1, r2, rotary_mode, rotate):
    assert rotary_mode == "half"
    return REFERENCE["rotary_embedding"](input, input, r1, r2)[0]


def fusion_attention(query, key, value, input_layout, atten_mask, scale, sparse_mode, actual_seq_qlen, **_):
    q, k, v = (x.unsqueeze(0) if input_layout == "TND" else x for x in (query, key, value))
    bounds = [0, *actual_seq_qlen] if actual_seq_qlen else None
    seen = ~atten_mask if sparse_mode == 1 else None
    out = REFERENCE["attention"](q, k, v, sparse_mode == 3, seen, scale, bounds)
    empty = query.new_empty(0)
    return out[0] if input_layout == "TND" else out.clone(), empty, empty.clone(), empty.clone(), 0, 0, 0


def fused_infer(query, key, value, scale, sparse_mode, actual_seq_lengths_kv, **_):
    if actual_seq_lengths_kv:
        lengths = torch.tensor(actual_seq_lengths_kv)
        out = REFERENCE["decode_attention"](query, key, value, lengths, tuple(actual_seq_lengths_kv))
    else:
        out = REFERENCE["attention"](query, key, value, sparse_mode == 3, None, scale, None)
    return out.clone(), query.new_empty(0)


def cross_entropy_loss(input, target, reduction, ignore_index, **_):
    assert reduction == "none"
    loss = REFERENCE["cross_entropy"](input, target, ignore_index)
    return loss, input.log_softmax(-1), input.new_empty(0), input.new_empty(0)


def cross_entropy_loss_backward(grad_loss, log_prob, target, ignore_index, **_):
    ignored = target == ignore_index
    onehot = torch.nn.functional.one_hot(target.masked_fill(ignored, 0), log_prob.shape[1])
    return (log_prob.exp() - onehot) * grad_loss.masked_fill(ignored, 0)[:, None]


IMPLEMENTATIONS = {
    "npu_rms_norm": rms_norm,
    "npu_add_rms_norm": add_rms_norm,
    "npu_rotary_mul": rotary_mul,
    "npu_swiglu": lambda input, dim: REFERENCE["swiglu"](input),
    "npu_fusion_attention": fusion_attention,
    "npu_fused_infer_attention_score": fused_infer,
    "npu_cross_entropy_loss": cross_entropy_loss,
    "npu_cross_entropy_loss_backward": cross_entropy_loss_backward,
}


def by_name(schema, function):
    """`function` called with every argument of the schema by its name; the dispatcher leaves defaults out."""
    arguments = torch._C.parse_schema(schema).arguments
    defaults = {argument.name: argument.default_value for argument in arguments}
    return lambda *args, **kwargs: function(**defaults | dict(zip(defaults, args, strict=False)) | kwargs)


@pytest.fixture(scope="module", autouse=True)
def _registered():
    if "torch_npu" in sys.modules:
        pytest.skip("torch_npu is imported: tests/contract runs on its own ops")
    with torch.library._scoped_library("npu", "DEF") as library:
        for name, schema in SCHEMAS.items():
            library.define(schema)
            library.impl(name, by_name(schema, IMPLEMENTATIONS[name]), "CompositeExplicitAutograd")
        yield


def randn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def heads(dtype=torch.float32, s=S):
    return (
        randn(1, s, N, D, dtype=dtype),
        randn(1, S, G, D, dtype=dtype, seed=1),
        randn(1, S, G, D, dtype=dtype, seed=2),
    )


LENGTHS = torch.tensor([3])
SEEN = torch.ones(1, 1, S, S, dtype=torch.bool).tril(1)
TABLES = (randn(S, 1, D).cos(), randn(S, 1, D).sin())
HALF = torch.bfloat16
CALLS = {
    "rms_norm": (randn(3, 8), randn(8), 1e-5),
    "add_rms_norm": (randn(3, 8), randn(3, 8, seed=1), randn(8), 1e-5),
    "rotary_embedding": (*heads()[:2], *TABLES),
    "swiglu": (randn(3, 8),),
    "attention causal": (*heads(), True, None, 0.3, None),
    "attention full": (*heads(), False, None, 0.3, None),
    "attention mask": (*heads(), False, SEEN, 0.3, None),
    "attention packed": (*heads(), True, None, 0.3, [0, 2, S]),
    "attention inference": (*heads(HALF), True, None, 0.3, None),
    "decode_attention fp32": (*heads(s=1), LENGTHS, (3,)),
    "decode_attention bf16": (*heads(HALF, s=1), LENGTHS, (3,)),
    "cross_entropy": (randn(4, 7), torch.tensor([0, 6, -100, 2]), -100),
}


@pytest.mark.parametrize("call", CALLS)
def test_every_backend_calls_ops_as_they_are_declared(call):
    op = dispatch.OPS[call.split()[0]]
    ours, expected = op.ascend(*CALLS[call]), op.reference(*CALLS[call])
    torch.testing.assert_close(ours, expected, rtol=2**-7 if "bf16" in call or "inf" in call else 1e-5, atol=1e-2)
    outputs = ours if isinstance(ours, tuple) else (ours,)
    assert all(out.abs().sum() > 0 for out in outputs)


def test_the_loss_has_its_gradient():
    logits = randn(4, 7).requires_grad_()
    labels = torch.tensor([0, 6, -100, 2])
    grads = [torch.autograd.grad(f(logits, labels, -100).sum(), logits)[0]
             for f in (dispatch.OPS["cross_entropy"].ascend, REFERENCE["cross_entropy"])]  # fmt: skip
    torch.testing.assert_close(*grads)


def test_a_call_that_the_schema_does_not_know_is_refused():
    q, k, v = heads()
    with pytest.raises(RuntimeError, match="pre_tokens"):
        torch.ops.npu.npu_fusion_attention(q, k, v, N, "BSND", pre_tokens=3)


def test_all_ops_that_are_called_are_locked():
    named = {name for op in dispatch.OPS.values() for name in op.ascend_ops}
    assert named == set(SCHEMAS)
