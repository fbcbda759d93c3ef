"""Model FLOPs: the arithmetic that the network's definition asks for, whatever the engine recomputes or pads."""

from ckpt_tools import LlamaConfig


def model_flops_per_token(config: LlamaConfig, seq_length: int) -> int:
    """FLOPs of one token's forward and backward pass in a sequence of `seq_length` tokens, as trained.

    Matrix products only, a multiply-add counting as two, the backward pass as twice the forward:

        3 * (2 * N + L * 2 * s * n * d)

    N: elements of all weight matrices but the embedding, which is a lookup (so 2 N for a token's forward pass).
    L layers, s `seq_length`, n query heads, d channels of a head. Attention's two products (scores, weighted values)
    take 2 * 2 * n * d FLOPs for each pair of query and key; a causal query sees (s + 1) / 2 keys on average, counted as
    s / 2.
    (Megatron-LM's formula counts causal attention in the same way; nanoGPT's and PaLM's count all s keys.)
    Grouped queries change N only. Recomputation, padding of the vocabulary, norms and the optimizer are not counted.

    Source: Chowdhery et al., "PaLM", https://arxiv.org/abs/2204.02311, appendix B, with the causal half of
        Megatron-LM's `num_floating_point_operations`,
        https://github.com/NVIDIA/Megatron-LM/blob/main/megatron/training/training.py
    """
    hidden, heads, groups = config.hidden_size, config.num_attention_heads, config.num_query_groups
    d = config.kv_channels
    qkv_and_proj = hidden * (heads + 2 * groups) * d + heads * d * hidden
    layer = qkv_and_proj + 3 * hidden * config.ffn_hidden_size
    matrices = config.num_layers * layer + hidden * config.vocab_size
    attention = config.num_layers * 2 * seq_length * heads * d
    return 3 * (2 * matrices + attention)
