"""The seam: the layers that differ between one device and tensor parallelism, behind one small protocol.

`OneDevice` makes them of torch.nn; `llama_model.parallel.layers` of megatron-core's tensor-parallel layers. All weights
are called `weight` and have no biases; hidden states are [s, b, h].

s sequence, b batch, h hidden, v vocabulary, t tensor-parallel size.
"""

from typing import Protocol

import torch
from ckpt_tools import LlamaConfig
from npu_kernels import cross_entropy
from torch import Tensor, nn


class Layers(Protocol):
    """Makes a network's linear, embedding and output layers."""

    @property
    def tensor_model_parallel_size(self) -> int:
        """t: how many ranks share each layer."""

    @property
    def tensor_model_parallel_rank(self) -> int:
        """This rank among them."""

    def padded_vocab_size(self, config: LlamaConfig) -> int:
        """Rows of the vocabulary's tables over all ranks."""

    def norm(self, config: LlamaConfig) -> nn.Parameter:
        """The weight [h] of an RMSNorm, ones."""

    def embedding(self, config: LlamaConfig) -> nn.Module:
        """Token ids [b, s] to hidden states [s, b, h]."""

    def column(self, in_features: int, out_features: int) -> nn.Module:
        """[s, b, in_features], whole on every rank, to this rank's [s, b, out_features / t]."""

    def row(self, in_features: int, out_features: int) -> nn.Module:
        """This rank's [s, b, in_features / t] to [s, b, out_features], whole on every rank."""

    def output(self, config: LlamaConfig) -> nn.Module:
        """Hidden states [s, b, h] to logits [s, b, v] of the true vocabulary, whole on every rank; called with labels
        [s, b] too, to the loss of each token, fp32 [s, b], 0 where the label is -100.
        """


class OneDevice:
    """Layers of torch.nn, with fresh weights as a LLaMA-2 is initialised."""

    tensor_model_parallel_size = 1
    tensor_model_parallel_rank = 0

    def __init__(self, init_method_std: float) -> None:
        self._std = init_method_std

    def padded_vocab_size(self, config: LlamaConfig) -> int:
        """Nothing is padded."""
        return config.vocab_size

    def norm(self, config: LlamaConfig) -> nn.Parameter:
        """See `Layers.norm`."""
        return nn.Parameter(torch.ones(config.hidden_size))

    def embedding(self, config: LlamaConfig) -> nn.Module:
        """See `Layers.embedding`."""
        return self._fresh(_Embedding(config.vocab_size, config.hidden_size))

    def column(self, in_features: int, out_features: int) -> nn.Module:
        """See `Layers.column`."""
        return self._fresh(nn.Linear(in_features, out_features, bias=False))

    def row(self, in_features: int, out_features: int) -> nn.Module:
        """See `Layers.row`."""
        return self._fresh(nn.Linear(in_features, out_features, bias=False))

    def output(self, config: LlamaConfig) -> nn.Module:
        """See `Layers.output`."""
        return self._fresh(_Output(config.hidden_size, config.vocab_size, bias=False))

    def _fresh(self, layer: nn.Linear | nn.Embedding) -> nn.Module:
        nn.init.normal_(layer.weight, std=self._std)
        return layer


class _Embedding(nn.Embedding):
    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens.t())  # [b, s] -> [s, b, h]


class _Output(nn.Linear):
    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        logits = super().forward(x)  # [s, b, v]
        return logits if labels is None else cross_entropy(logits, labels)
