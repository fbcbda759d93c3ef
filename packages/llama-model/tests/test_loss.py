"""The training loss of one rank against PyTorch's, and what it keeps; `test_parallel` has shared vocabularies."""

import pytest
import torch
from llama_model import ModelError
from llama_model.parallel import loss as module
from llama_model.parallel.loss import head_loss
from torch.nn import functional as F

N, H, V = 50, 24, 70
NEAR = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 0.05, torch.float16: 0.006}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", {"cpu": 7 * V})


def inputs(dtype, padding=0):
    draw = torch.Generator().manual_seed(0)
    x, weight, factors = (torch.randn(*shape, generator=draw) for shape in ((N, H), (V, H), (N,)))
    labels = torch.randint(0, V, (N,), generator=draw)
    labels[5:9] = labels[-1] = -100
    weight = torch.cat((weight, torch.full((padding, H), 1e3)))
    return x.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), labels, factors


def reference(x, weight, labels, factors):
    """PyTorch's loss and gradients in float64."""
    x, weight = x.detach().double().requires_grad_(), weight.detach().double()[:V].requires_grad_()
    loss = F.cross_entropy(x @ weight.t(), labels, reduction="none")
    (loss * factors.double()).sum().backward()
    return loss.detach(), x.grad, weight.grad


def errors(dtype, padding=0, labels=None, **options):
    x, weight, true_labels, factors = inputs(dtype, padding)
    loss = head_loss(x, weight, true_labels if labels is None else labels, true_rows=V, **options)
    (loss * factors.to(loss.dtype)).sum().backward()
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert not weight.grad[V:].any()
    ours = loss.detach(), x.grad, weight.grad[:V]
    pairs = zip(ours, reference(x, weight, true_labels, factors), strict=True)
    return [((mine.double() - theirs).abs().max() / theirs.abs().max()).item() for mine, theirs in pairs]


@pytest.mark.parametrize("dtype", NEAR, ids=str)
@pytest.mark.parametrize("padding", [0, 10])
def test_loss_and_gradients_are_pytorchs_for_any_weight_of_a_token(dtype, padding):
    assert max(errors(dtype, padding)) < NEAR[dtype]


@pytest.mark.parametrize("dtype", NEAR, ids=str)
def test_the_comparison_notices_a_wrong_label(dtype):
    labels = inputs(dtype)[2]
    labels[0] = (labels[0] + 1) % V
    assert min(errors(dtype, labels=labels)) > NEAR[dtype]


def test_ignored_tokens_have_neither_loss_nor_gradient():
    x, weight, labels, _ = inputs(torch.float32)
    loss = head_loss(x, weight, labels, true_rows=V)
    loss.sum().backward()
    assert loss[labels == -100].eq(0).all()
    assert x.grad[labels == -100].eq(0).all()
    assert x.grad[labels != -100].ne(0).any(1).all()


def test_fp16_keeps_the_gradient_of_small_probabilities():
    weight = torch.zeros(V, 1, dtype=torch.float16)
    weight[0] = 18.0  # every other token has a probability of 1.5e-8: nothing in fp16
    weight.requires_grad_()
    x = torch.ones(1, 1, dtype=torch.float16)
    (head_loss(x, weight, torch.tensor([0]), true_rows=V) * 2.0**12).sum().backward()
    expected = 2.0**12 * torch.exp(torch.tensor(-18.0))
    torch.testing.assert_close(weight.grad[1:, 0].float(), expected.expand(V - 1), rtol=0.1, atol=0)
    assert torch.exp(torch.tensor(-18.0)).half() == 0


def test_without_gradients_nothing_is_kept_and_the_loss_is_the_same():
    x, weight, labels, _ = inputs(torch.float32)
    with torch.no_grad():
        plain = head_loss(x, weight, labels, true_rows=V)
    assert plain.grad_fn is None
    torch.testing.assert_close(plain, head_loss(x, weight, labels, true_rows=V).detach())


def test_the_logits_are_held_once():
    """Their own size, no second one beside it, in forward and backward."""
    n, h, v = 2048, 8, 4096
    x, weight = torch.randn(n, h, requires_grad=True), torch.randn(v, h, requires_grad=True)
    labels = torch.randint(0, v, (n,))
    with torch.profiler.profile(profile_memory=True) as profile:
        head_loss(x, weight, labels, true_rows=v).sum().backward()
    assert peak(profile) < 1.3 * n * v * 4
    with torch.profiler.profile(profile_memory=True) as profile:
        F.cross_entropy(x @ weight.t(), labels).backward()
    assert peak(profile) > 1.9 * n * v * 4, "the control must be seen"


def peak(profile):
    """The most bytes that were allocated at once."""
    held = highest = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            highest = max(highest, held)
    return highest


def test_a_second_derivative_is_refused():
    x, weight, labels, _ = inputs(torch.float64)
    loss = head_loss(x, weight, labels, true_rows=V).sum()
    with pytest.raises(ModelError, match="no second derivative"):
        torch.autograd.grad(loss, x, create_graph=True)
