"""The seam's layers under tensor parallelism: megatron-core's, with this network's interface.

s sequence, b batch, h hidden, v vocabulary, t tensor-parallel size.
"""

from typing import Any

import torch
from ckpt_tools import LlamaConfig
from megatron.core import parallel_state
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    gather_from_tensor_model_parallel_region,
)
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from llama_model.parallel.linear import linear
from llama_model.parallel.loss import head_loss


class MegatronLayers:
    """Makes the layers that a tensor-parallel rank holds; see `llama_model.layers.Layers`.

    Args:
        options: megatron-core's configuration: types, initialisation, sequence parallelism.
        device: Where this rank computes.
        make_vocab_size_divisible_by: The vocabulary is padded to a multiple of this times t.
    """

    def __init__(self, options: TransformerConfig, device: torch.device, make_vocab_size_divisible_by: int) -> None:
        self._options, self._device, self._divisible_by = options, device, make_vocab_size_divisible_by
        self.tensor_model_parallel_size: int = parallel_state.get_tensor_model_parallel_world_size()
        self.tensor_model_parallel_rank: int = parallel_state.get_tensor_model_parallel_rank()

    def padded_vocab_size(self, config: LlamaConfig) -> int:
        """See `Layers.padded_vocab_size`."""
        return config.padded_vocab_size(self.tensor_model_parallel_size, self._divisible_by)

    def norm(self, config: LlamaConfig) -> nn.Parameter:
        """See `Layers.norm`. Under sequence parallelism its gradient is summed over the ranks, which see parts."""
        weight = nn.Parameter(torch.ones(config.hidden_size, dtype=self._options.params_dtype, device=self._device))
        weight.sequence_parallel = self._options.sequence_parallel  # type: ignore[attr-defined]
        return weight

    def embedding(self, config: LlamaConfig) -> nn.Module:
        """See `Layers.embedding`."""
        layer = _Embedding(
            self.padded_vocab_size(config),
            config.hidden_size,
            init_method=self._options.init_method,
            reduce_scatter_embeddings=self._options.sequence_parallel,
            config=self._options,
        )
        return _split(layer, 0)

    def column(self, in_features: int, out_features: int) -> nn.Module:
        """See `Layers.column`."""
        layer = _Column(
            in_features,
            out_features,
            config=self._options,
            init_method=self._options.init_method,
            bias=False,
            gather_output=False,
        )
        return _split(layer, 0)

    def row(self, in_features: int, out_features: int) -> nn.Module:
        """See `Layers.row`."""
        layer = _Row(
            in_features,
            out_features,
            config=self._options,
            init_method=self._options.output_layer_init_method,
            bias=False,
            input_is_parallel=True,
            skip_bias_add=False,
        )
        return _split(layer, 1)

    def output(self, config: LlamaConfig) -> nn.Module:
        """See `Layers.output`."""
        layer = _Output(
            config.hidden_size,
            self.padded_vocab_size(config),
            config=self._options,
            init_method=self._options.init_method,
            bias=False,
            gather_output=False,
        )
        layer.set_vocabulary(config.vocab_size, self.tensor_model_parallel_rank)
        return _split(layer, 0)


def _split(layer: nn.Module, dim: int) -> nn.Module:
    """`layer`, its weight marked as one that the ranks share out: gradient norms would count it once otherwise."""
    set_tensor_model_parallel_attributes(layer.weight, is_parallel=True, dim=dim, stride=1)
    return layer


def _trains_alone(layer: Any) -> bool:
    """Whether the layer is this rank's alone and a backward pass follows: megatron-core's own overlaps its products
    with collectives, where there are any.
    """
    return bool(layer.tp_group.size() == 1 and torch.is_grad_enabled() and layer.weight.requires_grad)


class _Embedding(VocabParallelEmbedding):  # type: ignore[misc]
    def forward(self, tokens: Tensor) -> Tensor:
        # [b, s] -> [s, b, h]; with reduce-scatter (sequence parallelism) megatron-core transposes itself.
        x: Tensor = super().forward(tokens if self.reduce_scatter_embeddings else tokens.t())
        return x


class _Column(ColumnParallelLinear):  # type: ignore[misc]
    def forward(self, x: Tensor) -> Tensor:
        if _trains_alone(self):
            return linear(x, self.weight)
        y: Tensor = super().forward(x)[0]  # the second is a bias left for the caller to add
        return y


class _Row(RowParallelLinear):  # type: ignore[misc]
    def forward(self, x: Tensor) -> Tensor:
        if _trains_alone(self):
            return linear(x, self.weight)
        y: Tensor = super().forward(x)[0]
        return y


class _Output(ColumnParallelLinear):  # type: ignore[misc]
    """The head: each rank computes the logits of its part of the vocabulary."""

    def set_vocabulary(self, vocab_size: int, rank: int) -> None:
        """Notes which rows of the vocabulary this rank holds, and how many of its own are padding."""
        rows: int = self.output_size_per_partition
        self._vocab_size, self._first_row = vocab_size, rank * rows
        self._true_rows = max(0, min(rows, vocab_size - self._first_row))

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        if labels is not None:
            return self._loss(x, labels)
        logits: Tensor = super().forward(x)[0]  # [s, b, v / t], padding among them
        gathered: Tensor = gather_from_tensor_model_parallel_region(logits)
        return gathered[..., : self._vocab_size]  # padding stands at the end

    def _loss(self, x: Tensor, labels: Tensor) -> Tensor:
        # Whole on every rank; the gradient that comes back is summed over them, to each its part under SP.
        gather = (
            gather_from_sequence_parallel_region if self.sequence_parallel else copy_to_tensor_model_parallel_region
        )
        x = gather(x, group=self.tp_group)  # [s, b, h]
        loss = head_loss(
            x.flatten(0, 1),
            self.weight,
            labels.flatten(),
            true_rows=self._true_rows,
            first_row=self._first_row,
            group=self.tp_group,
        )
        return loss.view(labels.shape)
