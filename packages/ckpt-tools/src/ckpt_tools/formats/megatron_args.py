"""Megatron's `args`: the Namespace in a checkpoint from which Megatron-LM and MindSpeed-LLM take the architecture."""

from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ckpt_tools.config import LlamaConfig
from ckpt_tools.errors import CheckpointError
from ckpt_tools.layout import Layout
from ckpt_tools.storage.unpickle import Global

REQUIRED_VALUES = {
    "position_embedding_type": ("rope", "learned_absolute"),  # Megatron's default stays beside the older flag for rope
    "swiglu": (True,),
    "normalization": ("RMSNorm",),
    "untie_embeddings_and_output_weights": (True,),
    "rotary_percent": (1.0, 1),
    "rotary_interleaved": (False,),
    "use_rope_scaling": (False,),
    "qk_layernorm": (False,),
    "apply_layernorm_1p": (False,),
    "num_experts": (),
    "tie_word_embeddings": (False,),
    "rotary_seq_len_interpolation_factor": (1, 1.0),
    "rope_scaling": (),
    "rope_scaling_type": (),
}
"""What LLaMA-2 has for the args that would make it another network; None and absence pass."""


def refuse_other_networks(args: Mapping[str, Any], where: Path) -> None:
    """Refuses what is no LLaMA-2 by megatron-core's args. AscendSpeed's say nothing true of it: its network is fixed.

    Raises:
        CheckpointError: They state another kind of network.
    """
    for name, allowed in REQUIRED_VALUES.items():
        if args.get(name) is not None and args[name] not in allowed:
            raise CheckpointError(f"{where}: its args have {name} = {args[name]!r}, which LLaMA-2 has not")


def config_from_args(args: Mapping[str, Any], where: Path) -> LlamaConfig | None:
    """The architecture that `args` state, or None where they leave out some of it.

    Raises:
        CheckpointError: They state something impossible.
    """
    stated = _stated(args)
    if any(value is None for value in stated.values()):
        return None
    optional = {
        "max_position_embeddings": args.get("max_position_embeddings"),
        "init_method_std": args.get("init_method_std"),
    }
    known = {name: value for name, value in {**stated, **optional}.items() if value is not None}
    tokens = {name: args[name] for name in ("bos_token_id", "eos_token_id") if name in args}
    try:
        return LlamaConfig(**{**known, **tokens})
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{where}: its args are impossible: {error}") from None


def _stated(args: Mapping[str, Any]) -> dict[str, Any]:
    """What the args say of each field that shapes the network; None for what they leave out."""
    heads = args.get("num_attention_heads")
    grouped = args.get("num_query_groups") if args.get("group_query_attention", True) else heads
    stated = {
        "num_layers": args.get("num_layers"),
        "hidden_size": args.get("hidden_size"),
        "ffn_hidden_size": _first(args, "ffn_hidden_size", "intermediate_size"),
        "num_attention_heads": heads,
        "num_query_groups": args.get("num_key_value_heads") or grouped or heads,
        "kv_channels": _first(args, "kv_channels", "head_dim"),
        "vocab_size": args.get("vocab_size"),
        "layernorm_epsilon": _first(args, "norm_epsilon", "layernorm_epsilon", "rms_norm_eps"),
        "rotary_base": _first(args, "rotary_base", "rope_theta"),
    }
    if stated["kv_channels"] is None and type(heads) is int and type(stated["hidden_size"]) is int:
        stated["kv_channels"] = stated["hidden_size"] // max(heads, 1)
    return stated


def contradiction(config: LlamaConfig, args: Mapping[str, Any]) -> tuple[str, Any, Any] | None:
    """The first field in which the args, as far as they go, are not of this architecture: name, its value, theirs."""
    stated = ((name, getattr(config, name), theirs) for name, theirs in _stated(args).items() if theirs is not None)
    return next((found for found in stated if found[1] != found[2]), None)


def says_the_same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two files' args state the same of the architecture."""
    return _stated(one) == _stated(other)


def _first(args: Mapping[str, Any], *names: str) -> Any:
    """The value under the first of the names that has one: Megatron-LM's, then those that other converters write."""
    return next((args[name] for name in names if args.get(name) is not None), None)


def args_for(config: LlamaConfig, layout: Layout, padded_vocab_size: int, dtype: str) -> Namespace:
    """What Megatron-LM's `--use-checkpoint-args` and its checks read, and the names that MindSpeed-LLM adds."""
    chunks = len(layout.chunks(config.num_layers)[0])
    return Namespace(
        num_layers=config.num_layers,
        encoder_num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        ffn_hidden_size=config.ffn_hidden_size,
        num_attention_heads=config.num_attention_heads,
        group_query_attention=config.num_query_groups != config.num_attention_heads,
        num_query_groups=config.num_query_groups,
        kv_channels=config.kv_channels,
        seq_length=config.max_position_embeddings,
        max_position_embeddings=config.max_position_embeddings,
        position_embedding_type="rope",
        add_position_embedding=False,
        use_rotary_position_embeddings=True,
        rotary_base=int(config.rotary_base) if config.rotary_base.is_integer() else config.rotary_base,
        rotary_percent=1.0,
        rotary_interleaved=False,
        normalization="RMSNorm",
        norm_epsilon=config.layernorm_epsilon,
        layernorm_epsilon=config.layernorm_epsilon,
        apply_layernorm_1p=False,
        swiglu=True,
        add_bias_linear=False,
        add_qkv_bias=False,
        untie_embeddings_and_output_weights=True,
        init_method_std=config.init_method_std,
        vocab_size=config.vocab_size,
        padded_vocab_size=padded_vocab_size,
        make_vocab_size_divisible_by=layout.make_vocab_size_divisible_by or 1,
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        tensor_model_parallel_size=layout.tensor_model_parallel_size,
        pipeline_model_parallel_size=layout.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=chunks if chunks > 1 else None,
        num_layers_per_virtual_pipeline_stage=layout.num_layers_per_virtual_pipeline_stage,
        num_layer_list=",".join(map(str, layout.num_layer_list)) if layout.num_layer_list else None,
        params_dtype=Global("torch", dtype),
        fp16=dtype == "float16",
        bf16=dtype == "bfloat16",
        use_mcore_models=True,
        transformer_impl="local",
        iteration=1,
        consumed_train_samples=0,
        consumed_valid_samples=0,
        num_key_value_heads=config.num_query_groups,
        rope_theta=config.rotary_base,
    )
