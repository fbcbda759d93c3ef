"""Fresh weights on one device; `test_parallel` has the layouts."""

import math

import pytest
import torch
from ckpt_tools import LlamaConfig
from llama_model import LlamaModel, init_weights, initialization

CONFIG = LlamaConfig(
    num_layers=2, hidden_size=96, ffn_hidden_size=160, num_attention_heads=4, num_query_groups=2, kv_channels=24,
    vocab_size=301, init_method_std=0.05,
)  # fmt: skip


def fresh(seed):
    model = LlamaModel(CONFIG)
    init_weights(model, seed)
    return dict(model.named_parameters())


def test_weights_have_megatrons_scale(monkeypatch):
    monkeypatch.setattr(initialization, "BLOCK", 1000)  # several blocks of rows
    for name, weight in fresh(1).items():
        if weight.dim() == 1:
            assert weight.eq(1).all()
            continue
        narrow = name.endswith(("linear_proj.weight", "linear_fc2.weight"))
        std = 0.05 / math.sqrt(4) if narrow else 0.05
        assert weight.std().item() == pytest.approx(std, rel=0.03), name
        assert weight.mean().abs().item() < 5 * std / math.sqrt(weight.numel()), name


def test_the_seed_and_the_name_decide():
    first, again, other = fresh(1), fresh(1), fresh(2)
    assert all(torch.equal(first[name], again[name]) for name in first)
    matrices = [name for name in first if first[name].dim() == 2]
    assert not any(torch.equal(first[name], other[name]) for name in matrices)
    layers = [name for name in matrices if ".0." in name]
    assert not any(torch.equal(first[name], first[name.replace(".0.", ".1.")]) for name in layers)


def test_rows_of_different_blocks_differ(monkeypatch):
    monkeypatch.setattr(initialization, "BLOCK", 96 * 10)
    table = fresh(1)["embedding.word_embeddings.weight"]
    assert len(table.unique(dim=0)) == len(table)
