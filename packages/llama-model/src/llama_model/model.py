"""The network of LLaMA-2, top to bottom: embedding, layers of attention and SwiGLU, final norm, untied head.

Hidden states are [s, b, h] throughout, as megatron-core's sequence-parallel and pipeline code wants them; kernels get
batch-first views. Parameter names are megatron-core's: an attribute path here is the canonical name of ckpt-tools.

b batch, s sequence, h hidden, n query heads, g query groups (key and value heads), r = n / g, d channels of a head,
f feed-forward, v vocabulary, t tensor-parallel size. Under tensor parallelism n, g and f are this rank's shares.

Source: Touvron et al., "LLaMA", https://arxiv.org/abs/2302.13971, section 2.2, and "Llama 2",
    https://arxiv.org/abs/2307.09288, section 2.2 (grouped-query attention).
"""

from typing import Any

from ckpt_tools import LlamaConfig
from npu_kernels import attention, rms_norm, rotary_embedding, swiglu
from torch import Tensor, nn

from llama_model.cache import KeyValueCache
from llama_model.errors import RequestError
from llama_model.layers import Layers, OneDevice
from llama_model.recompute import Recompute, caller, layer_groups
from llama_model.rotary import RotaryTables


class LlamaModel(nn.Module):
    """LLaMA-2, or the part of it that one pipeline stage and one tensor-parallel rank hold.

    Args:
        config: The architecture.
        layers: Who makes the layers; torch.nn unless given.
        first_layer: The number of the first layer held, from 0.
        num_layers: How many are held; the rest from `first_layer` on unless given.
        pre_process: Whether this stage embeds the tokens; otherwise `set_input_tensor` gives its hidden states.
        post_process: Whether it ends in logits; otherwise in hidden states.
        recompute: What the backward pass computes again; everything is kept unless given.

    Raises:
        RequestError: The heads, groups or feed-forward channels do not divide among the tensor-parallel ranks.
    """

    def __init__(
        self,
        config: LlamaConfig,
        *,
        layers: Layers | None = None,
        first_layer: int = 0,
        num_layers: int | None = None,
        pre_process: bool = True,
        post_process: bool = True,
        recompute: Recompute | None = None,
    ) -> None:
        super().__init__()
        layers = OneDevice(config.init_method_std) if layers is None else layers
        _check_division(config, layers.tensor_model_parallel_size)
        self.architecture = config
        self.tensor_model_parallel_size = layers.tensor_model_parallel_size
        self.tensor_model_parallel_rank = layers.tensor_model_parallel_rank
        self.padded_vocab_size = layers.padded_vocab_size(config)
        self.first_layer, self.pre_process, self.post_process = first_layer, pre_process, post_process
        self.rotary = RotaryTables(config.kv_channels, config.rotary_base, config.max_position_embeddings)
        if pre_process:
            self.embedding = Embedding(config, layers)
        count = config.num_layers - first_layer if num_layers is None else num_layers
        self.decoder = Decoder(config, layers, first_layer, count, post_process, recompute)
        if post_process:
            self.output_layer = layers.output(config)
        self._input_tensor: Tensor | None = None

    def forward(
        self,
        tokens: Tensor,
        *,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        """Logits of the next token, or the loss of each label.

        Args:
            tokens: int64 [b, s].
            position_ids: int64 [b, s], each below `max_position_embeddings`, which is the caller's to see to (looking
                would wait for the device); default 0 to s - 1, or where the rows of `cache` end. With them, a row of
                packed documents may be longer than the model has positions.
            labels: int64 [b, s], already shifted: `labels[:, i]` is the token that follows `tokens[:, i]`. -100: none.
            cu_seqlens: int32, from 0 to s: documents packed into one row (b = 1) that do not see each other.
            cache: What the rows hold already; the tokens are added to it.

        Returns:
            Logits [b, s, v] of the true vocabulary in the model's type; with labels the loss of each token in nats,
            fp32 [b, s] (fp64 of an fp64 model), 0 where ignored. A stage without `post_process` returns hidden states
            [s, b, h].

        Raises:
            RequestError: Without `position_ids`, a sequence that is longer than `max_position_embeddings`.
        """
        x = self.hidden_states(tokens, position_ids=position_ids, cu_seqlens=cu_seqlens, cache=cache)
        if not self.post_process:
            return x
        if labels is None:
            return self.logits(x).transpose(0, 1)  # [b, s, v]
        loss: Tensor = self.output_layer(x, labels.t()).t()  # [b, s]
        return loss

    def hidden_states(
        self,
        tokens: Tensor,
        *,
        position_ids: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        """What the head sees, [s, b, h]: `forward` without it, for callers that need the logits of few positions."""
        if position_ids is None:
            self._check_length(tokens.shape[1])
        x = self.embedding(tokens) if self.pre_process else self._input_tensor
        if cache is not None:
            position_ids = cache.positions(tokens.shape[1])
        hidden: Tensor = self.decoder(x, self._tables(tokens, position_ids), position_ids, cu_seqlens, cache)
        if cache is not None:
            cache.advance(tokens.shape[1])
        return hidden

    def logits(self, x: Tensor) -> Tensor:
        """Logits [s, b, v] of any hidden states [s, b, h] that `hidden_states` returned."""
        logits: Tensor = self.output_layer(x)
        return logits

    def set_input_tensor(self, input_tensor: Tensor | list[Tensor] | None) -> None:
        """Takes the hidden states [s, b, h] that the stage before has sent; megatron-core's schedules call it."""
        self._input_tensor = input_tensor[0] if isinstance(input_tensor, list) else input_tensor

    def new_cache(self, batch_size: int, num_slots: int) -> KeyValueCache:
        """An empty cache for `batch_size` sequences of up to `num_slots` tokens, in the model's type and place."""
        config, weight = self.architecture, next(self.parameters())
        groups = config.num_query_groups // self.tensor_model_parallel_size
        shape = (batch_size, num_slots, groups, config.kv_channels)
        return KeyValueCache(len(self.decoder.layers), shape, weight.dtype, weight.device)

    def canonical_name(self, name: str) -> str:
        """The name that one of this model's parameters has in the whole model: its layers count from the first one."""
        if not name.startswith("decoder.layers."):
            return name
        decoder, layers, index, rest = name.split(".", 3)
        return f"{decoder}.{layers}.{self.first_layer + int(index)}.{rest}"

    def _check_length(self, count: int) -> None:
        longest = self.architecture.max_position_embeddings
        if count > longest:
            raise RequestError(f"a sequence of {count} tokens: the model has {longest} positions")

    def _tables(self, tokens: Tensor, position_ids: Tensor | None) -> tuple[Tensor, Tensor]:
        if position_ids is None:
            return self.rotary.first(tokens.shape[1], tokens.device)
        return self.rotary.at(position_ids)


class Embedding(nn.Module):
    """Token ids [b, s] to hidden states [s, b, h]."""

    def __init__(self, config: LlamaConfig, layers: Layers) -> None:
        super().__init__()
        self.word_embeddings = layers.embedding(config)

    def forward(self, tokens: Tensor) -> Tensor:
        """Row `tokens[b, s]` of the table."""
        x: Tensor = self.word_embeddings(tokens)
        return x


class Decoder(nn.Module):
    """The layers, and the norm behind the last one."""

    def __init__(
        self,
        config: LlamaConfig,
        layers: Layers,
        first_layer: int,
        num_layers: int,
        final_norm: bool,
        recompute: Recompute | None,
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(config, layers, first_layer, n, recompute) for n in range(num_layers))
        self._groups = layer_groups(recompute, num_layers)
        self.final_layernorm = RMSNorm(config, layers) if final_norm else None

    def forward(
        self,
        x: Tensor,
        tables: tuple[Tensor, Tensor],
        positions: Tensor | None,
        cu_seqlens: Tensor | None,
        cache: KeyValueCache | None,
    ) -> Tensor:
        """Hidden states [s, b, h] through every layer."""
        for group, call in self._groups:
            x = call(self._through, group, x, tables, positions, cu_seqlens, cache)
        if self.final_layernorm is not None:
            x = self.final_layernorm(x)
        return x

    def _through(self, group: range, x: Tensor, *context: Any) -> Tensor:
        for index in group:
            x = self.layers[index](x, *context)
        return x


class Layer(nn.Module):
    """Attention, then the feed-forward network, each on a normed copy and added to the residual stream."""

    def __init__(
        self, config: LlamaConfig, layers: Layers, first_layer: int, index: int, recompute: Recompute | None
    ) -> None:
        super().__init__()
        self.layer_number = first_layer + index + 1  # over the whole model, from 1, as megatron-core counts
        self.input_layernorm = RMSNorm(config, layers)
        self.self_attention = Attention(config, layers, index, recompute)
        self.pre_mlp_layernorm = RMSNorm(config, layers)
        self.mlp = MLP(config, layers)
        self._call_mlp = caller(recompute, "mlp")

    def forward(
        self,
        x: Tensor,
        tables: tuple[Tensor, Tensor],
        positions: Tensor | None,
        cu_seqlens: Tensor | None,
        cache: KeyValueCache | None,
    ) -> Tensor:
        """[s, b, h] to [s, b, h]."""
        x = x + self.self_attention(self.input_layernorm(x), tables, positions, cu_seqlens, cache)
        y: Tensor = x + self._call_mlp(self.mlp, self.pre_mlp_layernorm(x))
        return y


class Attention(nn.Module):
    """Grouped-query attention with rotary positions.

    The rows of `linear_qkv` stand in Megatron's group order: for each group its r query heads, then its key head, then
    its value head. A tensor-parallel rank holds whole groups.
    """

    def __init__(self, config: LlamaConfig, layers: Layers, index: int, recompute: Recompute | None) -> None:
        super().__init__()
        heads, groups, d = config.num_attention_heads, config.num_query_groups, config.kv_channels
        self.index, self.d = index, d
        self.heads_per_group = heads // groups
        self.linear_qkv = layers.column(config.hidden_size, (heads + 2 * groups) * d)
        self.linear_proj = layers.row(heads * d, config.hidden_size)
        self._call_core = caller(recompute, "core_attn")

    def forward(
        self,
        x: Tensor,
        tables: tuple[Tensor, Tensor],
        positions: Tensor | None,
        cu_seqlens: Tensor | None,
        cache: KeyValueCache | None,
    ) -> Tensor:
        """[s, b, h] to [s, b, h]."""
        r = self.heads_per_group
        qkv = self.linear_qkv(x).unflatten(-1, (-1, r + 2, self.d))  # [s, b, g, r + 2, d]
        q, k, v = (part.flatten(2, 3).transpose(0, 1) for part in qkv.split((r, 1, 1), -2))  # [b, s, n or g, d]
        q, k = rotary_embedding(q, k, *tables)
        if cache is None:
            out = self._call_core(attention, q, k, v, cu_seqlens=cu_seqlens)  # [b, s, n, d]
        else:
            assert positions is not None
            out = cache.attend(self.index, q, k, v, positions)
        y: Tensor = self.linear_proj(out.transpose(0, 1).flatten(2))  # [s, b, n * d] -> [s, b, h]
        return y


class MLP(nn.Module):
    """SwiGLU. A rank's rows of `linear_fc1` are its gate rows, then its up rows."""

    def __init__(self, config: LlamaConfig, layers: Layers) -> None:
        super().__init__()
        self.linear_fc1 = layers.column(config.hidden_size, 2 * config.ffn_hidden_size)
        self.linear_fc2 = layers.row(config.ffn_hidden_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """[s, b, h] to [s, b, h]."""
        y: Tensor = self.linear_fc2(swiglu(self.linear_fc1(x)))  # [s, b, 2f] -> [s, b, f] -> [s, b, h]
        return y


class RMSNorm(nn.Module):
    """Root-mean-square norm over h."""

    def __init__(self, config: LlamaConfig, layers: Layers) -> None:
        super().__init__()
        self.eps = config.layernorm_epsilon
        self.weight = layers.norm(config)

    def forward(self, x: Tensor) -> Tensor:
        """[s, b, h] to [s, b, h]."""
        return rms_norm(x, self.weight, self.eps)


def _check_division(config: LlamaConfig, tp_size: int) -> None:
    shared = {
        "attention heads": config.num_attention_heads,
        "query groups (key and value heads)": config.num_query_groups,
        "feed-forward channels": config.ffn_hidden_size,
    }
    for what, count in shared.items():
        if count % tp_size:
            raise RequestError(f"{count} {what} do not divide among {tp_size} tensor-parallel ranks")
