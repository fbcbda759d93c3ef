"""FusedAdam against torch's own Adam and AdamW."""

import copy

import pytest
import torch
from llama_model.parallel.fused_adam import FusedAdam


def minimise(make, weights, steps=20):
    parameters = [torch.nn.Parameter(weight.clone()) for weight in weights]
    optimizer = make(parameters)
    for _ in range(steps):
        optimizer.zero_grad()
        sum((parameter**4 - parameter).sum() for parameter in parameters).backward()
        optimizer.step()
    return parameters, optimizer


@pytest.fixture
def weights():
    torch.manual_seed(0)
    return [torch.randn(5, 3), torch.randn(7)]


OPTIONS = dict(lr=0.05, betas=(0.9, 0.95), eps=1e-6, weight_decay=0.1)


@pytest.mark.parametrize("decoupled", [True, False])
def test_it_steps_as_torchs_own(weights, decoupled):
    own = torch.optim.AdamW if decoupled else torch.optim.Adam
    expected, _ = minimise(lambda p: own(p, **OPTIONS), weights)
    got, optimizer = minimise(lambda p: FusedAdam(p, adam_w_mode=decoupled, **OPTIONS), weights)
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    assert optimizer.param_groups[0]["step"] == 20


def test_its_state_goes_on_bit_for_bit(weights):
    whole, _ = minimise(lambda p: FusedAdam(p, **OPTIONS), weights, steps=10)
    half, optimizer = minimise(lambda p: FusedAdam(p, **OPTIONS), weights, steps=5)
    state = copy.deepcopy(optimizer.state_dict())

    def resumed(parameters):
        fresh = FusedAdam(parameters, lr=1.0)
        fresh.load_state_dict(state)
        return fresh

    again, _ = minimise(resumed, [parameter.detach() for parameter in half], steps=5)
    for ours, expected in zip(again, whole, strict=True):
        assert torch.equal(ours, expected)
