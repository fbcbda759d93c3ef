"""Weights from every format into the network, and only what a rank needs."""

import pytest
import torch
from ckpt_tools import CheckpointError, Layout, convert, open_checkpoint
from llama_model import LlamaModel, ModelError, RequestError, load_model, load_weights


def test_a_model_is_ready_to_compute(case):
    model = load_model(case.folder)
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("dtype", ["float16", torch.bfloat16])
def test_weights_are_cast_to_the_type_asked_for(gqa, dtype):
    model, exact = load_model(gqa.folder, dtype=dtype, device="cpu"), load_model(gqa.folder)
    for ours, theirs in zip(model.parameters(), exact.parameters(), strict=True):
        assert torch.equal(ours, theirs.to(ours.dtype))
    assert model(gqa.tokens).dtype == model.output_layer.weight.dtype


def test_a_megatron_checkpoint_of_two_ranks_is_the_same_model(gqa, tmp_path):
    convert(
        gqa.folder, tmp_path / "tp2", to="megatron-core", layout=Layout(tensor_model_parallel_size=2), dtype="bfloat16"
    )
    model = load_model(tmp_path / "tp2")
    for ours, theirs in zip(model.parameters(), load_model(gqa.folder).parameters(), strict=True):
        assert torch.equal(ours, theirs.to(torch.bfloat16))


def test_what_does_not_fit_is_refused(case, gqa, tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        load_model(tmp_path / "nowhere")
    with pytest.raises(RequestError, match="no weights of type int8"):
        load_model(gqa.folder, dtype="int8")
    other = LlamaModel(load_model(gqa.folder).architecture)
    with open_checkpoint(case.folder) as checkpoint:
        if checkpoint.config == other.architecture:
            load_weights(other, checkpoint)
        else:
            with pytest.raises(ModelError, match="num_query_groups is 2 in the model, 4 in"):
                load_weights(other, checkpoint)
