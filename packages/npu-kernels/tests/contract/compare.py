"""Runs one function on the CPU's references and on the emulated NPU, forward and backward, and compares."""

import emulator
import pytest
import torch
from npu_kernels import dispatch

BOUNDS = {torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}
"""Largest relative and absolute difference by type: rounding, not more."""


def randn(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator).to(dtype)


def results(function, inputs, device, with_grads=True):
    """The outputs of `function(*inputs)` on a device, then the gradients of a random weighting of them, on the CPU."""
    moved = [x.detach().to(device).requires_grad_(with_grads and x.is_floating_point()) for x in inputs]
    outputs = function(*moved)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    assert all(out.device.type == device for out in outputs)
    grads = ()
    if with_grads:
        leaves = [x for x in moved if x.requires_grad]
        weights = [randn(*out.shape, dtype=out.dtype, seed=9).to(device) for out in outputs]
        grads = torch.autograd.grad(outputs, leaves, weights)
    return [x.detach().cpu() for x in (*outputs, *grads)]


def reference(function, inputs, with_grads=True):
    """`results` of the plain references, on the CPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(dispatch.VARIABLE, "reference")
        dispatch.forget_choice()
        expected = results(function, inputs, "cpu", with_grads)
    dispatch.forget_choice()
    return expected


def same(ours, theirs, bound=None):
    """Whether all are equal to rounding, and of one type."""
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.dtype == other.dtype
        atol = bound or BOUNDS[mine.dtype]
        if not torch.allclose(mine.double(), other.double(), rtol=atol, atol=atol * max(1, other.abs().max().item())):
            return False
    return True


def calls_of(function, inputs, with_grads=True, bound=None):
    """The aclnn calls of running it on the NPU, by name, once its results are shown to be the references'."""
    with emulator.recording() as calls:
        ours = results(function, inputs, "npu", with_grads)
    theirs = reference(function, inputs, with_grads)
    assert same(ours, theirs, bound), [
        (mine.double() - other.double()).abs().max().item() for mine, other in zip(ours, theirs, strict=True)
    ]
    assert not same([-x for x in ours], theirs, bound), "the control must differ"
    return {call.op: call for call in calls}
