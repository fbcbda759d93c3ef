"""The network's state as megatron-core's distributed checkpoints take it, under the keys of GPTModel.

Layers are stacked: `decoder.layers.mlp.linear_fc2.weight` of shape [L, h, f] holds all of them. The layers' norms stand
under the names that they have inside Transformer Engine's fused layers. A checkpoint of ours is one that GPTModel loads
strictly, and the other way round.
"""

from typing import Any

from llama_model.model import LlamaModel

NORMS = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}
"""How GPTModel's checkpoints spell a layer's norms, whatever layers it was trained with."""


def sharded_state_dict(model: LlamaModel, metadata: dict[str, Any] | None = None) -> dict[str, Any]:
    """Every parameter of this rank with its place in the whole model, for `megatron.core.dist_checkpointing`.

    Args:
        model: A chunk made by `build_chunks`.
        metadata: megatron-core's: how the optimizer is sharded and the like.

    Returns:
        The local names of `model.state_dict()` to ShardedTensors (fc1 to a factory that stores gate and up apart) and
        the layers' empty extra states.
    """
    from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group

    metadata = ensure_metadata_has_dp_cp_group(metadata)
    state: dict[str, Any] = {}
    if model.pre_process:
        state |= _of_module(model.embedding.word_embeddings, "embedding.word_embeddings.", (), metadata)
    for index, layer in enumerate(model.decoder.layers):
        place = (model.first_layer + index, model.architecture.num_layers)
        state |= _of_layer(layer, f"decoder.layers.{index}.", place, metadata)
    if model.post_process:
        state |= _of_module(model.decoder.final_layernorm, "decoder.final_layernorm.", (), metadata)
        state |= _of_module(model.output_layer, "output_layer.", (), metadata)
        state["output_layer.weight"].allow_shape_mismatch = True  # the vocabulary's padding depends on the layout
        state.pop("output_layer._extra_state", None)  # as GPTModel does
    return state


def _of_layer(layer: Any, local: str, place: tuple[int, int], metadata: dict[str, Any]) -> dict[str, Any]:
    """One layer's parameters: `local` names them here, `place` is the layer's number and that of all layers."""
    from megatron.core.dist_checkpointing.utils import apply_prefix_mapping, replace_prefix_for_sharding
    from megatron.core.transformer.mlp import apply_swiglu_sharded_factory

    # The layer's row in a first dimension that all layers share; or, where asked for, names of its own.
    singletons = bool(metadata.get("singleton_local_shards", False))
    offsets = () if singletons else ((0, *place),)
    stored = f"decoder.layers.{place[0]}." if singletons else "decoder.layers."
    state: dict[str, Any] = {}
    for name, module in _leaves(layer):
        state |= _of_module(module, f"{local}{name}.", offsets, metadata)
    fc1 = f"{local}mlp.linear_fc1.weight"
    state[fc1] = apply_swiglu_sharded_factory(state[fc1], offsets, singletons)
    apply_prefix_mapping(state, {f"{local}{ours}": f"{local}{theirs}" for ours, theirs in NORMS.items()})
    replace_prefix_for_sharding(state, local, stored)
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
