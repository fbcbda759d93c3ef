"""The network's state as megatron-core's distributed checkpoints take it, under the keys of GPTModel.

Layers are stacked: `decoder.layers.mlp.linear_fc2.weight` of shape [L, h, f] holds all of them. A checkpoint of ours is
one that GPTModel loads strictly, and the other way round.
"""

from typing import Any

from llama_model.model import LlamaModel


def sharded_state_dict(model: LlamaModel, metadata: dict[str, Any] | None = None) -> dict[str, Any]:
    """Every parameter of this rank with its place in the whole model, for `megatron.core.dist_checkpointing`.

    Args:
        model: Made by `build_model`.
        metadata: megatron-core's: how the optimizer is sharded and the like.

    Returns:
        The local names of `model.state_dict()` to ShardedTensors (fc1 to a factory that stores gate and up apart) and
        the layers' empty extra states.
    """
    from megatron.core.dist_checkpointing.utils import replace_prefix_for_sharding
    from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
    from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group

    metadata = ensure_metadata_has_dp_cp_group(metadata)
    singletons = bool(metadata.get("singleton_local_shards", False))
    state: dict[str, Any] = {}
    if model.pre_process:
        state |= _of_module(model.embedding.word_embeddings, "embedding.word_embeddings.", (), metadata)
    for index, layer in enumerate(model.decoder.layers):
        local = f"decoder.layers.{index}."
        number = model.first_layer + index
        # The layer's place in a first dimension that all layers share; or, asked for single ones, a key of its own.
        offsets = () if singletons else ((0, number, model.architecture.num_layers),)
        stored = f"decoder.layers.{number}." if singletons else "decoder.layers."
        part: dict[str, Any] = {}
        for name, module in _leaves(layer):
            part |= _of_module(module, f"{local}{name}.", offsets, metadata)
        fc1 = f"{local}mlp.linear_fc1.weight"
        part[fc1] = apply_swiglu_sharded_factory(part[fc1], offsets, singletons)
        replace_prefix_for_sharding(part, local, stored)
        state |= part
    if model.post_process:
        state |= _of_module(model.decoder.final_layernorm, "decoder.final_layernorm.", (), metadata)
        state |= _of_module(model.output_layer, "output_layer.", (), metadata)
        state["output_layer.weight"].allow_shape_mismatch = True  # the vocabulary's padding depends on the layout
        state.pop("output_layer._extra_state", None)  # as GPTModel does
    return state


def _leaves(layer: Any) -> list[tuple[str, Any]]:
    """The modules of a layer that hold its parameters, by name."""
    return [(name, module) for name, module in layer.named_modules() if name and not list(module.children())]


def _of_module(module: Any, prefix: str, offsets: tuple[Any, ...], metadata: dict[str, Any]) -> dict[str, Any]:
    """A parallel layer knows its own shards; any other module is the same on every tensor-parallel rank."""
    from megatron.core import parallel_state
    from megatron.core.transformer.utils import sharded_state_dict_default

    group = parallel_state.get_tensor_model_parallel_group()
    found: dict[str, Any] = sharded_state_dict_default(module, prefix, offsets, metadata, tp_group=group)
    return found
