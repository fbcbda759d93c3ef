"""The FLOPs formula, by counting the network's matrix products and by published figures."""

import pytest
import torch
from ckpt_tools import LlamaConfig
from llama_model import LlamaModel, flops
from torch.utils.flop_counter import FlopCounterMode

LLAMA2_7B = LlamaConfig(
    num_layers=32, hidden_size=4096, ffn_hidden_size=11008, num_attention_heads=32, num_query_groups=32,
    kv_channels=128, vocab_size=32000,
)  # fmt: skip


def test_matrix_products_are_those_that_pytorch_counts():
    config = LlamaConfig(
        num_layers=2, hidden_size=32, ffn_hidden_size=48, num_attention_heads=4, num_query_groups=2, kv_channels=8,
        vocab_size=50, max_position_embeddings=64,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaModel(config)
        tokens = torch.zeros(1, 16, dtype=torch.int64)
    model.rotary.first(16, torch.device("meta"))
    with FlopCounterMode(display=False) as counter:
        model(tokens).sum().backward()
    counts = {str(op): count for op, count in counter.get_flop_counts()["Global"].items()}
    products = counts.pop("aten.mm")
    attention = sum(counts.values()) / 2  # counted over every key; a causal query sees half of them
    assert flops.model_flops_per_token(config, 16) == (products + attention) / 16


def test_the_7b_model_takes_the_published_flops():
    """46.1 GFLOP a token at 4096 positions when attention counts every key; 42.9 with the causal half."""
    every_key = flops.model_flops_per_token(LLAMA2_7B, 2 * 4096)
    assert every_key == pytest.approx(46.1e9, rel=2e-3)
    assert flops.model_flops_per_token(LLAMA2_7B, 4096) == pytest.approx(42.9e9, rel=2e-3)
