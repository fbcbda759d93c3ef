"""Recomputing activations changes nothing but what is kept."""

import pytest
import torch
from conftest import LAYERS
from llama_model import LlamaModel, Recompute, RequestError, load_model

CHOICES = {
    "every layer": (Recompute(granularity="full"), LAYERS, LAYERS),
    "groups of three": (Recompute(granularity="full", num_layers=3), LAYERS, LAYERS),
    "the first three": (Recompute(granularity="full", method="block", num_layers=3), 3, 3),
    "more than there are": (Recompute(granularity="full", method="block", num_layers=9), LAYERS, LAYERS),
    "attention": (Recompute(granularity="selective"), 0, 0),
    "attention and mlp": (Recompute(granularity="selective", modules=("core_attn", "mlp")), 0, LAYERS),
}
"""Which, and how often layers and feed-forward networks are computed again."""


def run(model, gqa):
    """Loss, gradients, calls of layers and of feed-forward networks, and bytes kept for the backward pass."""
    calls, kept = {"layers": 0, "mlps": 0}, {}

    def count(kind):
        def hook(*_):
            calls[kind] += 1

        return hook

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    for layer in model.decoder.layers:
        layer.register_forward_pre_hook(count("layers"))
        layer.mlp.register_forward_pre_hook(count("mlps"))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(gqa.tokens, labels=gqa.labels)
        size = sum(kept.values())
    loss.sum().backward()
    return loss.detach(), [parameter.grad for parameter in model.parameters()], calls, size


def model_with(recompute, gqa):
    whole = load_model(gqa.folder)
    model = LlamaModel(whole.architecture, recompute=recompute)
    model.load_state_dict(whole.state_dict())
    return model


@pytest.mark.parametrize("choice", CHOICES)
def test_loss_and_gradients_are_bit_for_bit_the_same(gqa, choice):
    recompute, layers, mlps = CHOICES[choice]
    loss, grads, calls, size = run(model_with(recompute, gqa), gqa)
    expected, expected_grads, plain_calls, plain_size = run(model_with(None, gqa), gqa)
    assert torch.equal(loss, expected)
    assert all(map(torch.equal, grads, expected_grads))
    assert plain_calls == {"layers": LAYERS, "mlps": LAYERS}
    assert calls == {"layers": LAYERS + layers, "mlps": LAYERS + mlps}
    assert size < plain_size


def test_without_gradients_nothing_is_prepared(gqa):
    model = model_with(Recompute(granularity="full"), gqa)
    with torch.no_grad():
        assert torch.equal(model(gqa.tokens), model_with(None, gqa)(gqa.tokens))


WRONG = {
    "granularity 'partial'": {"granularity": "partial"},
    "method 'some'": {"granularity": "full", "method": "some"},
    "module 'norm'": {"granularity": "selective", "modules": ("norm",)},
    "num_layers is 0": {"granularity": "full", "num_layers": 0},
}


@pytest.mark.parametrize("message", WRONG)
def test_what_is_no_recomputation_is_refused(message):
    with pytest.raises(RequestError, match=message):
        Recompute(**WRONG[message])
