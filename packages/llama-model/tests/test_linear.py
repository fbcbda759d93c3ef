"""The linear layer of one rank against torch's, and where its weight's gradient goes."""

import pytest
import torch
from llama_model import ModelError
from llama_model.parallel.adaptor import _norm_together, _scale_together
from llama_model.parallel.host_memory import keep_freed_memory
from llama_model.parallel.linear import linear

NEAR = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 0.02}


def inputs(dtype):
    draw = torch.Generator().manual_seed(0)
    x, weight, dy = (torch.randn(*shape, generator=draw).to(dtype) for shape in ((5, 3, 16), (24, 16), (5, 3, 24)))
    return x.requires_grad_(), torch.nn.Parameter(weight), dy


def expected(dtype):
    x, weight, dy = inputs(dtype)
    y = torch.nn.functional.linear(x, weight)
    y.backward(dy)
    return y.detach(), x.grad, weight.grad


@pytest.mark.parametrize("dtype", NEAR, ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_output_and_gradients_are_torchs(dtype, transposed):
    x, weight, dy = inputs(dtype)
    y = linear(x, weight)
    y.backward(dy.transpose(0, 1).contiguous().transpose(0, 1) if transposed else dy)
    for ours, theirs in zip((y.detach(), x.grad, weight.grad), expected(dtype), strict=True):
        torch.testing.assert_close(ours, theirs, atol=NEAR[dtype], rtol=NEAR[dtype])


def test_the_weights_gradient_is_added_to_a_main_grad_of_its_type():
    x, weight, dy = inputs(torch.float32)
    weight.main_grad = torch.ones_like(weight)
    for _ in range(2):  # two micro-batches
        linear(x, weight).backward(dy)
    assert weight.grad_added_to_main_grad
    assert weight.grad is not None, "the wrapper's hook needs one"
    torch.testing.assert_close(weight.main_grad, 1 + 2 * expected(torch.float32)[2])


def test_a_main_grad_of_another_type_is_left_to_the_wrapper():
    x, weight, dy = inputs(torch.bfloat16)
    weight.main_grad = torch.zeros(weight.shape)
    linear(x, weight).backward(dy)
    assert not hasattr(weight, "grad_added_to_main_grad")
    assert not weight.main_grad.any()
    torch.testing.assert_close(weight.grad, expected(torch.bfloat16)[2])


def test_a_second_derivative_is_refused():
    x, weight, _ = inputs(torch.float64)
    with pytest.raises(ModelError, match="no second derivative"):
        torch.autograd.grad(linear(x, weight).sum(), x, create_graph=True)


@pytest.mark.parametrize("in_place", [True, False])
def test_many_tensors_are_scaled_together(in_place):
    source = [torch.ones(3), torch.full((2, 2), 2.0)]
    target = source if in_place else [torch.zeros(3), torch.zeros(2, 2)]
    _scale_together(0, torch.zeros(1), [source, target], 0.5)
    assert [t.unique().item() for t in target] == [0.5, 1.0]
    assert in_place or source[0].eq(1).all()


def test_freed_memory_may_be_kept_again_and_again():
    keep_freed_memory()
    keep_freed_memory()


def test_the_gradients_norm_is_right_for_large_tensors_too():
    large = torch.randn(3_000_001, generator=torch.Generator().manual_seed(0))
    tensors = [[large, torch.ones(7, 3)], [torch.zeros(0)]]
    norm, _ = _norm_together(0, torch.zeros(1), tensors, False)
    expected = torch.cat([tensor.double().flatten() for part in tensors for tensor in part]).norm()
    assert norm.shape == (1,)
    assert abs(norm.item() / expected.item() - 1) < 1e-7
