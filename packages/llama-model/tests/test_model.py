"""The network on one device against Hugging Face's LlamaForCausalLM, in fp32; and controls that must fail."""

import pytest
import torch
from ckpt_tools import open_checkpoint
from conftest import LAYERS
from llama_model import LlamaModel, RequestError, load_model

LOGITS, LOSS, GRADIENT = 5e-6, 5e-6, 1e-5
"""Largest absolute differences of logits and losses; of a gradient, relative to the tensor's largest element."""


def compare(case, folder, labels=None):
    """The differences from Hugging Face of the model in `folder`."""
    labels = case.labels if labels is None else labels
    model = load_model(folder).requires_grad_(True)
    logits = model(case.tokens)
    loss = model(case.tokens, labels=labels)
    loss.sum().backward()
    with open_checkpoint(case.gradients) as gradients:
        errors = {}
        for name, parameter in model.named_parameters():
            expected = torch.from_numpy(gradients.read(name))
            errors[name] = ((parameter.grad - expected).abs().max() / expected.abs().max()).item()
    return (logits - case.logits).abs().max().item(), (loss - case.loss).abs().max().item(), errors


def assert_equal(differences):
    logits, loss, gradients = differences
    assert logits < LOGITS
    assert loss < LOSS
    assert max(gradients.values()) < GRADIENT, gradients


def test_logits_loss_and_every_gradient_are_hugging_faces(case):
    differences = compare(case, case.folder)
    assert_equal(differences)
    assert len(differences[2]) == 3 + 6 * LAYERS


@pytest.mark.parametrize("mistake", ["interleaved", "swapped"])
def test_the_comparison_notices_weights_converted_wrongly(case, mistake):
    logits, loss, gradients = compare(case, case.wrong(mistake))
    assert logits > 100 * LOGITS
    assert loss > 100 * LOSS
    assert max(gradients.values()) > 100 * GRADIENT


def test_the_comparison_notices_labels_that_are_not_shifted(case):
    logits, loss, gradients = compare(case, case.folder, labels=case.tokens)
    assert logits < LOGITS
    assert loss > 100 * LOSS
    assert max(gradients.values()) > 100 * GRADIENT


def test_loss_and_gradients_are_hugging_faces_in_float64(gqa, exact):
    model = load_model(gqa.folder).double().requires_grad_(True)
    loss = model(gqa.tokens, labels=gqa.labels)
    loss.sum().backward()
    torch.testing.assert_close(loss, exact.loss, atol=1e-12, rtol=0)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, exact.gradients[name], atol=1e-12, rtol=1e-12)


def test_ignored_positions_have_no_loss(case):
    loss = load_model(case.folder)(case.tokens, labels=case.labels)
    assert loss.dtype == torch.float32
    assert loss[case.labels == -100].eq(0).all()
    assert loss[case.labels != -100].gt(0).all()


def test_packed_documents_do_not_see_each_other(gqa):
    model = load_model(gqa.folder)
    row = gqa.tokens[:1]
    bounds = torch.tensor([0, 8, 20], dtype=torch.int32)
    positions = torch.cat((torch.arange(8), torch.arange(12)))[None]
    packed = model(row, cu_seqlens=bounds, position_ids=positions)
    alone = torch.cat((model(row[:, :8]), model(row[:, 8:])), 1)
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=LOGITS)
    assert not torch.allclose(packed[:, 8:], model(row)[:, 8:], atol=1e-2), "the control must leak"


def test_rotary_angles_stay_exact_in_a_model_cast_to_bfloat16(gqa):
    model = load_model(gqa.folder)
    cos, sin = model.rotary.first(64, torch.device("cpu"))
    for table in model.to(torch.bfloat16).rotary.first(64, torch.device("cpu")):
        assert table.dtype == torch.float32
    assert torch.equal(cos, model.rotary.first(64, torch.device("cpu"))[0])
    theirs = gqa.hf.model.rotary_emb(torch.zeros(1), torch.arange(64)[None])
    assert torch.equal(cos, theirs[0][0])
    assert torch.equal(sin, theirs[1][0])


def test_parameters_carry_the_canonical_names(case):
    with open_checkpoint(case.folder) as checkpoint:
        shapes = {name: checkpoint.shape(name) for name in checkpoint.names()}
    model = LlamaModel(load_model(case.folder).architecture)
    assert {name: tuple(parameter.shape) for name, parameter in model.named_parameters()} == shapes
    assert not list(model.buffers())


def test_a_stage_is_a_part_of_the_whole(gqa):
    whole = load_model(gqa.folder)
    config = whole.architecture
    first = LlamaModel(config, num_layers=1, post_process=False)
    second = LlamaModel(config, first_layer=1, pre_process=False)
    with open_checkpoint(gqa.folder) as checkpoint:
        from llama_model import load_weights

        load_weights(first, checkpoint)
        load_weights(second, checkpoint)
    second.set_input_tensor([first(gqa.tokens)])
    torch.testing.assert_close(second(gqa.tokens), whole(gqa.tokens))


def test_sequences_beyond_the_positions_are_refused(gqa):
    with pytest.raises(RequestError, match="a sequence of 65 tokens: the model has 64 positions"):
        load_model(gqa.folder)(torch.zeros(1, 65, dtype=torch.int64))


def test_rows_longer_than_the_positions_pass_where_every_position_is_one_of_them(gqa):
    tokens, positions = torch.zeros(1, 80, dtype=torch.int64), torch.arange(40).repeat(2)[None]
    bounds = torch.tensor([0, 40, 80], dtype=torch.int32)
    packed = load_model(gqa.folder)(tokens, position_ids=positions, cu_seqlens=bounds)
    torch.testing.assert_close(packed[:, :40], packed[:, 40:], rtol=0, atol=LOGITS)
