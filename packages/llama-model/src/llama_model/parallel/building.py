"""The network on megatron-core's layers, dressed as its data-parallel wrapper, optimizer and schedules expect."""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from ckpt_tools import Layout, LlamaConfig
from torch.nn import functional as F

from llama_model.errors import RequestError
from llama_model.initialization import init_weights
from llama_model.model import LlamaModel
from llama_model.parallel.adaptor import adapted_device
from llama_model.recompute import Recompute

FIXED = (
    *("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels"),
    *("layernorm_epsilon", "normalization", "gated_linear_unit", "activation_func", "add_bias_linear"),
    *("tensor_model_parallel_size", "pipeline_model_parallel_size", "virtual_pipeline_model_parallel_size"),
)
"""Fields of megatron-core's configuration that the architecture and `initialize` determine."""

UNHEEDED = ("recompute_", "hidden_dropout", "attention_dropout", "fp8", "fp4", "moe_", "num_moe", "context_parallel",
            "qk_layernorm", "cpu_offloading", "mtp_", "enable_cuda_graph")  # fmt: skip
"""Beginnings of fields that would ask this network for what it does not do."""


def build_chunks(
    config: LlamaConfig,
    layout: Layout,
    *,
    transformer_options: Mapping[str, object] | None = None,
    recompute: Recompute | None = None,
) -> list["ParallelLlamaModel"]:
    """This rank's chunks of the network, on the groups that `initialize` has made: one without a virtual pipeline.

    Their weights are fresh, as `init_weights` draws them from the seed that `initialize` gave to torch; with the
    option `perform_initialization` False they are whatever the memory held, for a caller that sets them all.

    A chunk's `config` is megatron-core's TransformerConfig, one object for all; with `set_input_tensor`, `vp_stage` and
    `sharded_state_dict` it works inside megatron-core's DDP, optimizers, schedules and distributed checkpoints.

    Args:
        config: The architecture.
        layout: Which layers each stage and chunk holds, and what the vocabulary is padded to (a multiple of
            `make_vocab_size_divisible_by`, 1 unless given, times the tensor-parallel size). Padding rows never enter
            loss or logits.
        transformer_options: Fields of TransformerConfig: `params_dtype`, `bf16`, `fp16`, `sequence_parallel`,
            `calculate_per_token_loss`, ...
        recompute: What the backward pass computes again.

    Raises:
        RequestError: The layout is not that of `initialize`, the architecture does not divide among the ranks, or an
            option is one that this network does not heed.
        UsageError: The layers do not divide among stages and chunks.
    """
    adapted = adapted_device()
    if adapted is None:
        raise RequestError("call llama_model.parallel.initialize before the model is built")
    from megatron.core import parallel_state
    from megatron.core.enums import ModelType

    from llama_model.parallel.layers import MegatronLayers

    stages = layout.chunks(config.num_layers)
    _check_layout(layout, len(stages[0]))
    stage = parallel_state.get_pipeline_model_parallel_rank()
    device = adapted.torch_device()
    asked = dict(transformer_options or {})
    fresh = asked.pop("perform_initialization", True)
    options = _options(config, asked, len(stages[0]), device)
    layers = MegatronLayers(options, device, layout.make_vocab_size_divisible_by or 1)
    chunks = []
    for number, held in enumerate(stages[stage]):
        chunk = ParallelLlamaModel(
            config,
            layers=layers,
            first_layer=held.start,
            num_layers=len(held),
            pre_process=held.start == 0,
            post_process=held.stop == config.num_layers,
            recompute=recompute,
        )
        chunk.config, chunk.model_type = options, ModelType.encoder_or_decoder
        chunk.vp_stage = number if len(stages[stage]) > 1 else None
        chunks.append(chunk)
    if fresh:
        for chunk in chunks:
            init_weights(chunk, torch.initial_seed())
    return chunks


def build_model(
    config: LlamaConfig,
    *,
    transformer_options: Mapping[str, object] | None = None,
    make_vocab_size_divisible_by: int = 1,
    recompute: Recompute | None = None,
) -> "ParallelLlamaModel":
    """`build_chunks` for a pipeline that is not virtual and has equally many layers on each stage, or for none.

    Raises:
        RequestError: As for `build_chunks`.
        UsageError: The layers do not divide among the stages.
    """
    layout = Layout(
        tensor_model_parallel_size=_size("tensor"),
        pipeline_model_parallel_size=_size("pipeline"),
        make_vocab_size_divisible_by=make_vocab_size_divisible_by,
    )
    (chunk,) = build_chunks(config, layout, transformer_options=transformer_options, recompute=recompute)
    return chunk


class ParallelLlamaModel(LlamaModel):
    """`LlamaModel` with what megatron-core looks for on a model."""

    config: Any
    """Its TransformerConfig."""
    model_type: Any
    vp_stage: int | None = None
    """Which of its stage's chunks it is in a virtual pipeline."""
    share_embeddings_and_output_weights = False

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """See `llama_model.parallel.sharded_state_dict`."""
        from llama_model.parallel.checkpoint import sharded_state_dict

        assert (prefix, sharded_offsets) == ("", ()), "the model stands at the top of its checkpoint"
        return sharded_state_dict(self, metadata)


def _size(kind: Literal["tensor", "pipeline"]) -> int:
    """How many ranks share the layers, or how many stages there are; 1 before `initialize`."""
    if adapted_device() is None:
        return 1
    from megatron.core import parallel_state

    if kind == "tensor":
        return int(parallel_state.get_tensor_model_parallel_world_size())
    return int(parallel_state.get_pipeline_model_parallel_world_size())


def _check_layout(layout: Layout, chunks: int) -> None:
    """Refuses a layout that `initialize` was not called with."""
    from megatron.core import parallel_state

    virtual = parallel_state.get_virtual_pipeline_model_parallel_world_size()
    pairs = {
        "tensor_model_parallel_size": (layout.tensor_model_parallel_size, _size("tensor")),
        "pipeline_model_parallel_size": (layout.pipeline_model_parallel_size, _size("pipeline")),
        "virtual_pipeline_model_parallel_size": (chunks, virtual or 1),
    }
    for name, (asked, made) in pairs.items():
        if asked != made:
            raise RequestError(f"the layout has {name} {asked}, parallel.initialize was called with {made}")


def _options(config: LlamaConfig, asked: dict[str, Any], chunks: int, device: torch.device) -> Any:
    """megatron-core's configuration of this architecture on this layout."""
    from megatron.core import parallel_state
    from megatron.core.transformer.transformer_config import TransformerConfig

    for name, value in asked.items():
        if name in FIXED:
            raise RequestError(f"{name} is not an option: the architecture or parallel.initialize determines it")
        if value and name.startswith(UNHEEDED):
            raise RequestError(f"this network does not heed {name} (here {value!r}) yet")
    dtype = asked.get("params_dtype", torch.float32)
    on_cpu = device.type == "cpu"
    fixed = {
        "num_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "ffn_hidden_size": config.ffn_hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "num_query_groups": config.num_query_groups,
        "kv_channels": config.kv_channels,
        "layernorm_epsilon": config.layernorm_epsilon,
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "add_bias_linear": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "tensor_model_parallel_size": parallel_state.get_tensor_model_parallel_world_size(),
        "pipeline_model_parallel_size": parallel_state.get_pipeline_model_parallel_world_size(),
        "virtual_pipeline_model_parallel_size": chunks if chunks > 1 else None,
    }
    defaults = {
        "init_method_std": config.init_method_std,
        "perform_initialization": False,  # megatron-core's would depend on the layout
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "use_cpu_initialization": on_cpu,
        # CUDA kernels of apex and Transformer Engine: this network brings its own.
        "gradient_accumulation_fusion": False,
        "persist_layer_norm": False,
        "bias_dropout_fusion": False,
        "bias_activation_fusion": False,
        "masked_softmax_fusion": False,
        "apply_rope_fusion": False,
        "batch_p2p_comm": False,
        "cuda_graph_scope": [],  # the default is deprecated, and says so
    }
    return TransformerConfig(**{**defaults, **asked, **fixed})
