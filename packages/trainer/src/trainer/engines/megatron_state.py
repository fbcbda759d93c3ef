"""What of the megatron engine goes into a checkpoint, and back: one layout, whatever the run's topology.

On disk a checkpoint holds, keyed and stacked as megatron-core's GPTModel would:

    decoder.layers.mlp.linear_fc2.weight ...                     the weights, in the run's type
    optimizer.state.{param,exp_avg,exp_avg_sq}.<the same key>    fp32: main weight, Adam's two moments

and in `common.pt` the optimizer's step and loss scale, and each rank's random state. This is what megatron-core's
distributed optimizer writes as `fully_reshardable`. Its other optimizers write other keys, and neither loads what the
other wrote: here all of them write and read the one layout, so that a run resumes with any of them.
"""

from collections.abc import Iterator
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from ckpt_tools import check_distributed_metadata
from llama_model import LlamaModel
from torch import distributed

from trainer.engines.canonical import Fragment, load_fragments, parts
from trainer.errors import TrainerError

STATE_PREFIX = "optimizer.state"
MOMENTS = ("exp_avg", "exp_avg_sq")

_METADATA = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": True,  # gathered on the host of one rank, not on every device
    "singleton_local_shards": False,
}


def to_save(chunks: list[LlamaModel], optimizer: Any | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """megatron-core's sharded state, and the metadata that describes it; weights alone without an `optimizer`."""
    metadata = _metadata()
    state = _weights(chunks, metadata)
    if optimizer is not None:
        state["optimizer"] = _optimizer_state(_only(optimizer), dict(state), metadata, is_loading=False)
        state["rng_state"] = _random_states()
    return state, dict(_METADATA)


@torch.no_grad()
def load(folder: Path, chunks: list[LlamaModel], optimizer: Any) -> None:
    """Fills weights and optimizer from a checkpoint of any layout; random states where the number of ranks is the same.

    Raises:
        TrainerError: A tensor is missing or of another shape.
        CheckpointError: `.metadata` names something that no checkpoint needs: it is not read.
    """
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.core import CheckpointingException

    check_distributed_metadata(folder)
    inner, metadata = _only(optimizer), _metadata()
    wanted = _weights(chunks, metadata)
    wanted["optimizer"] = _optimizer_state(inner, dict(wanted), metadata, is_loading=True)
    try:
        found = dist_checkpointing.load(_tensors_only(wanted), str(folder))
    except (CheckpointingException, KeyError) as error:
        raise TrainerError(f"{folder} is no checkpoint of this model: {error}") from None
    except UnpicklingError:
        raise TrainerError(f"{folder}/common.pt is damaged, or holds more than plain data: it is not opened") from None
    except (EOFError, TypeError, ValueError) as error:
        raise TrainerError(f"{folder} could not be read: {type(error).__name__}: {error}") from None
    for name, chunk in zip(_chunk_names(chunks), chunks, strict=True):
        chunk.load_state_dict(found[name], strict=False)  # the layers' extra states are empty
    _load_optimizer(inner, found["optimizer"])
    _set_random_state(found.get("rng_state", []))


def _metadata() -> dict[str, Any]:
    from megatron.core import parallel_state

    return {**_METADATA, "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}


def _only(optimizer: Any) -> Any:
    """megatron-core chains optimizers of dense and expert layers: here there is one."""
    (inner,) = getattr(optimizer, "chained_optimizers", [optimizer])
    return inner


def _is_distributed(optimizer: Any) -> bool:
    """Whether the optimizer's state is shared out over the data-parallel ranks."""
    return hasattr(optimizer, "gbuf_ranges")


def _chunk_names(chunks: list[LlamaModel]) -> list[str]:
    return ["model"] if len(chunks) == 1 else [f"model{number}" for number in range(len(chunks))]


def _weights(chunks: list[LlamaModel], metadata: dict[str, Any]) -> dict[str, Any]:
    from llama_model import parallel

    states = (parallel.sharded_state_dict(chunk, metadata) for chunk in chunks)
    return dict(zip(_chunk_names(chunks), states, strict=True))


def _tensors_only(tree: Any) -> Any:
    """Without the objects (the layers' empty extra states): torch would unpickle those unguarded."""
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    if isinstance(tree, dict):
        return {key: _tensors_only(value) for key, value in tree.items() if not isinstance(value, ShardedObject)}
    return tree


# --- the optimizer -------------------------------------------------------------------------------------------------


def _optimizer_state(
    optimizer: Any, weights: dict[str, Any], metadata: dict[str, Any], *, is_loading: bool
) -> dict[str, Any]:
    if _is_distributed(optimizer):
        found: dict[str, Any] = optimizer.sharded_state_dict(weights, is_loading=is_loading, metadata=metadata)
        return found
    return {"param_state": dict(enumerate(_sharded_states(optimizer, weights))), **_common_state(optimizer)}


def _sharded_states(optimizer: Any, weights: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The state of each parameter, with its place in the whole model taken from the weight's."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor
    from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories

    entries, _ = extract_sharded_tensors_and_factories(weights)
    place = {id(entry.data): entry for entry in nested_values(entries)}
    for weight, main in _pairs(optimizer):
        tensors = {"param": main, **_moments(optimizer, main)}
        yield {
            name: make_sharded_optimizer_tensor(place[id(weight)], tensor.detach(), f"{STATE_PREFIX}.{name}")
            for name, tensor in tensors.items()
        }


def _pairs(optimizer: Any) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Each weight of the model with the fp32 one that the optimizer keeps, which in an fp32 run is the same."""
    if not hasattr(optimizer, "float16_groups"):
        yield from ((weight, weight) for weight in optimizer.get_parameters())
        return
    for weights, mains in zip(optimizer.float16_groups, optimizer.fp32_from_float16_groups, strict=True):
        yield from zip(weights, mains, strict=True)
    for weights in optimizer.fp32_from_fp32_groups:
        yield from ((weight, weight) for weight in weights)


def _moments(optimizer: Any, main: torch.Tensor) -> dict[str, torch.Tensor]:
    """Adam's moments of a parameter: zeros, and kept as its state, before the first step."""
    state = optimizer.optimizer.state[main]
    for name in MOMENTS:
        if name not in state:
            state[name] = torch.zeros_like(main)
    return {name: state[name] for name in MOMENTS}


def _common_state(optimizer: Any) -> dict[str, Any]:
    """What is not of a parameter, in the distributed optimizer's form."""
    groups = optimizer.optimizer.state_dict()["param_groups"]
    steps = {group["step"] for group in groups if "step" in group}
    kept = [{name: value for name, value in group.items() if name != "params"} for group in groups]
    state: dict[str, Any] = {"optimizer": {"param_groups": [group | {"step": max(steps, default=0)} for group in kept]}}
    if scaler := getattr(optimizer, "grad_scaler", None):
        state["grad_scaler"] = scaler.state_dict()
    return state


def load_canonical(folder: Path, chunks: list[LlamaModel], optimizer: Any) -> None:
    """Fills the optimizer from another engine's checkpoint, which ckpt-tools reads.

    Raises:
        CheckpointError: It holds no optimizer state, or a broken one.
    """
    inner = _only(optimizer)
    for chunk in chunks:
        names: dict[torch.Tensor, str] = {parameter: name for name, parameter in chunk.named_parameters()}
        fragments = [
            Fragment(
                names[weight],
                begin,
                parts(main, _moments(inner, main)),
                weight.data.view(-1)[begin : begin + main.numel()],
            )
            for weight, begin, main in _mains(inner)
            if weight in names
        ]
        load_fragments(folder, chunk, fragments)


def _mains(optimizer: Any) -> Iterator[tuple[torch.Tensor, int, torch.Tensor]]:
    """Each weight, the first of its elements that this rank keeps a main weight of, and the main weights."""
    if not _is_distributed(optimizer):
        yield from ((weight, 0, main) for weight, main in _pairs(optimizer))
        return
    for weight_groups, main_groups in (
        (optimizer.model_float16_groups, optimizer.shard_fp32_from_float16_groups),
        (optimizer.model_fp32_groups, optimizer.shard_fp32_groups),
    ):
        for weights, mains in zip(weight_groups, main_groups, strict=True):
            for weight, main in zip(weights, mains, strict=True):
                yield weight, optimizer._get_model_param_range_map(weight)["param"].start, main


def progress(optimizer: Any) -> dict[str, Any]:
    """The optimizer's steps and the loss scale: see `Engine.state`."""
    inner = _only(optimizer)
    steps = max((int(group.get("step", 0)) for group in inner.optimizer.param_groups), default=0)
    scaler = _dynamic_scaler(inner)
    scale = None
    if scaler is not None:
        scale = {"scale": float(scaler.scale), "growth": scaler._growth_tracker}
        scale["hysteresis"] = max(1, scaler._hysteresis_tracker)  # it falls on below 1, which says the same
    return {"optimizer_steps": steps, "loss_scaler": scale}


def set_progress(optimizer: Any, state: dict[str, Any]) -> None:
    """Takes what `progress` of either engine gave."""
    inner = _only(optimizer)
    for group in inner.optimizer.param_groups:
        group["step"] = state["optimizer_steps"]
    scaler, saved = _dynamic_scaler(inner), state["loss_scaler"]
    if scaler is not None and saved is not None:
        scaler._scale.fill_(saved["scale"])
        scaler._growth_tracker, scaler._hysteresis_tracker = saved["growth"], saved["hysteresis"]


def _dynamic_scaler(optimizer: Any) -> Any | None:
    """megatron-core's, in a float16 run."""
    scaler: Any = getattr(optimizer, "grad_scaler", None)
    return scaler if hasattr(scaler, "_growth_tracker") else None


def _load_optimizer(optimizer: Any, found: dict[str, Any]) -> None:
    """Takes state, step and loss scale; learning rates and the like stay those of the run's options."""
    step = max(int(group.get("step", 0)) for group in found["optimizer"]["param_groups"])
    if _is_distributed(optimizer):
        state = optimizer.state_dict()
        for group in state["optimizer"]["param_groups"]:
            group["step"] = step
        if "grad_scaler" in found:
            state["grad_scaler"] = found["grad_scaler"]
        state |= {"param_state": found["param_state"], "param_state_sharding_type": "fully_reshardable"}
        optimizer.load_state_dict(state)
        return
    for number, (_, main) in enumerate(_pairs(optimizer)):
        for name, tensor in {"param": main, **_moments(optimizer, main)}.items():
            tensor.data.copy_(found["param_state"][number][name])
    for group in optimizer.optimizer.param_groups:
        group["step"] = step
    if getattr(optimizer, "grad_scaler", None) and "grad_scaler" in found:
        optimizer.grad_scaler.load_state_dict(found["grad_scaler"])


# --- random states -------------------------------------------------------------------------------------------------


def _random_states() -> list[dict[str, Any]]:
    """Of every rank, in their order: nothing draws from them in the network of today, whose dropout is 0."""
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    mine = {"torch": torch.get_rng_state(), "tracker": dict(get_cuda_rng_tracker().get_states())}
    states: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(states, mine)
    return states


def _set_random_state(states: list[dict[str, Any]]) -> None:
    """On another number of ranks, whose states mean nothing here, the seeds of the run's start stay."""
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    if len(states) != distributed.get_world_size():
        return
    mine = states[distributed.get_rank()]
    torch.set_rng_state(mine["torch"])
    get_cuda_rng_tracker().set_states(mine["tracker"])
