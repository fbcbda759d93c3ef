"""The network on megatron-core's layers, dressed as its data-parallel wrapper, optimizer and schedules expect."""

from collections.abc import Mapping
from typing import Any

import torch
from ckpt_tools import LlamaConfig
from torch.nn import functional as F

from llama_model.errors import RequestError
from llama_model.model import LlamaModel
from llama_model.parallel.adaptor import adapted_device

FIXED = (
    *("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels"),
    *("layernorm_epsilon", "normalization", "gated_linear_unit", "activation_func", "add_bias_linear"),
    *("tensor_model_parallel_size", "pipeline_model_parallel_size"),
)
"""Fields of megatron-core's configuration that the architecture and `initialize` determine."""

UNHEEDED = ("recompute_", "hidden_dropout", "attention_dropout", "fp8", "fp4", "moe_", "num_moe", "context_parallel",
            "virtual_pipeline", "qk_layernorm", "cpu_offloading", "mtp_", "enable_cuda_graph")  # fmt: skip
"""Beginnings of fields that would ask this network for what it does not do."""


def build_model(
    config: LlamaConfig,
    *,
    transformer_options: Mapping[str, object] | None = None,
    make_vocab_size_divisible_by: int = 1,
) -> LlamaModel:
    """This rank's part of the network, with fresh weights, on the layout that `initialize` has set up.

    Its `config` is megatron-core's TransformerConfig; with `set_input_tensor` and `sharded_state_dict` it works inside
    megatron-core's DDP, optimizers, schedules and distributed checkpoints.

    Args:
        config: The architecture.
        transformer_options: Fields of TransformerConfig: `params_dtype`, `bf16`, `fp16`, `sequence_parallel`,
            `calculate_per_token_loss`, ...
        make_vocab_size_divisible_by: The vocabulary is padded to a multiple of this times the tensor-parallel size.
            Padding rows never enter loss or logits.

    Raises:
        RequestError: The architecture does not divide among the ranks, or an option is one that this network does not
            heed.
    """
    adapted = adapted_device()
    if adapted is None:
        raise RequestError("call llama_model.parallel.initialize before build_model")
    from megatron.core import parallel_state
    from megatron.core.enums import ModelType
    from megatron.core.transformer.transformer_block import get_num_layers_to_build
    from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

    from llama_model.parallel.layers import MegatronLayers

    device = adapted.torch_device()
    options = _options(config, dict(transformer_options or {}), device)
    model = ParallelLlamaModel(
        config,
        layers=MegatronLayers(options, device, make_vocab_size_divisible_by),
        first_layer=get_transformer_layer_offset(options),
        num_layers=get_num_layers_to_build(options),
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
    )
    model.config, model.model_type = options, ModelType.encoder_or_decoder
    return model


class ParallelLlamaModel(LlamaModel):
    """`LlamaModel` with what megatron-core looks for on a model."""

    config: Any
    """Its TransformerConfig."""
    model_type: Any
    share_embeddings_and_output_weights = False
    vp_stage: int | None = None

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """See `llama_model.parallel.sharded_state_dict`."""
        from llama_model.parallel.checkpoint import sharded_state_dict

        assert (prefix, sharded_offsets) == ("", ()), "the model stands at the top of its checkpoint"
        return sharded_state_dict(self, metadata)


def _options(config: LlamaConfig, asked: dict[str, Any], device: torch.device) -> Any:
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
    }
    defaults = {
        "init_method_std": config.init_method_std,
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
