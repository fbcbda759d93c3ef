"""The emulated CANN makes nothing up: what it does not know, or is called otherwise, fails by name."""

import emulator
import pytest
import torch
from emulator import calls


def test_an_op_without_a_kernel_fails_by_name():
    with pytest.raises(RuntimeError, match=r"no host kernel for aclnnErf\(float32\[3\], float32\[3\]\)"):
        torch.erf(torch.ones(3).npu())


def test_an_op_by_name_is_refused():
    x = torch.ones(1, 1, 32, 32).npu()
    with pytest.raises(RuntimeError, match="runs no ops by name"):
        torch.ops.npu.npu_scaled_masked_softmax(x, x.bool(), 1.0, False)


def test_a_kernel_declared_with_other_arguments_fails(monkeypatch):
    function, _ = calls._kernels["aclnnSwiGlu"]
    monkeypatch.setitem(calls._kernels, "aclnnSwiGlu", (function, [("x", "object"), ("out", "object")]))
    with pytest.raises(RuntimeError, match="declared with 2 integer and pointer arguments and called with 3"):
        torch.ops.npu.npu_swiglu(torch.ones(2, 4).npu())


def test_a_number_that_is_declared_as_an_object_fails(monkeypatch):
    function, _ = calls._kernels["aclnnSwiGlu"]
    parameters = [("x", "object"), ("dim", "object"), ("out", "object")]
    monkeypatch.setitem(calls._kernels, "aclnnSwiGlu", (function, parameters))
    with pytest.raises(RuntimeError, match="0xffffffffffffffff is no tensor, scalar, array or list"):
        torch.ops.npu.npu_swiglu(torch.ones(2, 4).npu())


def test_a_failing_kernel_fails_the_op(monkeypatch):
    def broken(*_):
        raise ArithmeticError("on purpose")

    _, parameters = calls._kernels["aclnnSwiGlu"]
    monkeypatch.setitem(calls._kernels, "aclnnSwiGlu", (broken, parameters))
    with pytest.raises(RuntimeError, match=r"aclnnSwiGlu.*(\n.*)*on purpose"):
        torch.ops.npu.npu_swiglu(torch.ones(2, 4).npu())


def test_calls_are_recorded_as_they_were_made():
    x = torch.arange(8.0).reshape(4, 2).npu()
    with emulator.recording() as made:
        torch.ops.npu.npu_swiglu(x.t(), -1)
    x.zero_()
    (call,) = [call for call in made if call.op == "aclnnSwiGlu"]
    assert call["dim"] == -1
    assert torch.equal(call["x"], torch.arange(8.0).reshape(4, 2).t()), "a view, in its own order, before it changed"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool, torch.uint8])
def test_tensors_go_there_and_back(dtype):
    x = (torch.arange(24).reshape(2, 3, 4) % 5).to(dtype)
    assert torch.equal(x.npu().cpu(), x)
    assert torch.equal(x.npu().transpose(0, 2).contiguous().cpu(), x.transpose(0, 2))


@pytest.mark.parametrize("value", [2, -3, 0.5])
def test_scalars_arrive(value):
    assert (torch.ones(3).npu() * value).cpu().tolist() == [value] * 3


def test_more_arguments_than_registers_arrive_in_order():
    """Fused attention has 18 in integer registers and on the stack, and two in floating-point registers."""
    q = torch.ones(1, 2, 2, 16).npu()
    with emulator.recording() as made:
        torch.ops.npu.npu_fusion_attention(q, q, q, 2, "BSND", scale=0.125, pre_tockens=7, next_tockens=3)
    (call,) = [call for call in made if call.op == "aclnnFlashAttentionScore"]
    assert (call["scale"], call["keep_prob"], call["pre_tokens"], call["next_tokens"]) == (0.125, 1.0, 7, 3)
    assert (call["head_num"], call["input_layout"]) == (2, "BSND")
