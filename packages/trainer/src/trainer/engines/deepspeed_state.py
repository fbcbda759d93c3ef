"""What a ZeRO optimizer of DeepSpeed keeps on this rank, of any stage: found in place, and filled from any checkpoint.

Each rank keeps fp32 main weights and moments in flat tensors, one for each group of parameters. Under stages 1 and 2
such a tensor is an even share of the group, in which parameters begin and end anywhere; under stage 3 it holds an even
share of each parameter, one behind the other.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from llama_model import LlamaModel
from torch import distributed

from trainer.engines.canonical import Fragment, load_fragments, parts


class _Share(NamedTuple):
    """This rank's elements of a parameter."""

    parameter: torch.nn.Parameter
    begin: int
    """The first one in the parameter."""
    flat: torch.Tensor
    """The flat main weights that they are part of."""
    at: int
    """Where they begin there."""
    length: int

    def weights(self) -> torch.Tensor:
        """The same elements of the parameter itself; under stage 3 its partition begins where the share does."""
        partition: torch.Tensor | None = getattr(self.parameter, "ds_tensor", None)
        if partition is not None:
            return partition.view(-1)[: self.length]
        return self.parameter.data.view(-1)[self.begin : self.begin + self.length]


def load(folder: Path, model: LlamaModel, optimizer: Any) -> None:
    """Fills main weights and moments.

    Raises:
        CheckpointError: The checkpoint holds no optimizer state, or a broken one.
    """
    names = {parameter: name for name, parameter in model.named_parameters()}
    fragments: list[Fragment] = []
    for share in _shares(optimizer):
        here = slice(share.at, share.at + share.length)
        kept = parts(share.flat, _state(optimizer, share.flat))
        tensors = {part: flat[here] for part, flat in kept.items()}
        fragments.append(Fragment(names[share.parameter], share.begin, tensors, share.weights()))
    load_fragments(folder, model, fragments)


def progress(optimizer: Any) -> dict[str, Any]:
    """The optimizer's steps and the loss scale: see `Engine.state`."""
    taken = [int(state["step"]) for state in optimizer.optimizer.state.values() if "step" in state]
    scaler = _dynamic_scaler(optimizer)
    scale = None
    if scaler is not None:
        # It doubles one step later than Megatron's after an overflow, and as Megatron's from then on.
        steps_since = scaler.cur_iter - scaler.last_overflow_iter - 1
        growth = (steps_since - 1) % scaler.scale_window if steps_since else -1
        scale = {"scale": float(scaler.cur_scale), "growth": growth, "hysteresis": int(scaler.cur_hysteresis)}
    return {"optimizer_steps": max(taken, default=0), "loss_scaler": scale}


def set_progress(optimizer: Any, state: dict[str, Any]) -> None:
    """Takes what `progress` of either engine gave."""
    for kept in optimizer.optimizer.state.values():
        if "step" in kept:
            kept["step"].fill_(state["optimizer_steps"])
    scaler, saved = _dynamic_scaler(optimizer), state["loss_scaler"]
    if scaler is not None and saved is not None:
        scaler.cur_scale, scaler.cur_hysteresis = saved["scale"], saved["hysteresis"]
        scaler.cur_iter, scaler.last_overflow_iter = saved["growth"] + 1, -1


def leave_smallest_scale_to_the_loop(optimizer: Any) -> None:
    """An overflow at the smallest loss scale is no exception of the optimizer's: `trainer.loop` names its samples."""
    if (scaler := _dynamic_scaler(optimizer)) is not None:
        scaler.raise_error_at_min_scale = False


def loss_scale(optimizer: Any) -> float:
    """What the loss is multiplied by at present."""
    scaler = _dynamic_scaler(optimizer)
    return 1.0 if scaler is None else float(scaler.loss_scale)


def _dynamic_scaler(optimizer: Any) -> Any | None:
    """DeepSpeed's, in a float16 run."""
    scaler: Any = getattr(optimizer, "loss_scaler", None)
    return scaler if getattr(scaler, "dynamic", False) else None


def _flat_weights(optimizer: Any) -> list[torch.Tensor]:
    """The flat fp32 main weights."""
    for name in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition"):
        if hasattr(optimizer, name):  # of stage 3, of 1 and 2, and of 1 in bf16
            return list(getattr(optimizer, name))
    raise AssertionError(f"{type(optimizer).__name__} is no ZeRO optimizer")


def _shares(optimizer: Any) -> Iterator[_Share]:
    flats = _flat_weights(optimizer)
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        yield from _shares_of_parameters(optimizer.fp16_groups, flats)
        return
    groups = optimizer.bf16_groups if hasattr(optimizer, "bf16_groups") else optimizer.bit16_groups
    for group, flat in zip(groups, flats, strict=True):
        for parameter in group:
            if (mapping := parameter._hp_mapping) is not None:
                main, place = mapping.hp_fragment_address, mapping.lp_fragment_address
                yield _Share(parameter, place.start, flat, main.start, main.numel)


def _shares_of_parameters(groups: list[list[Any]], flats: list[torch.Tensor]) -> Iterator[_Share]:
    for group, flat in zip(groups, flats, strict=True):
        at = 0
        for parameter in group:
            size = parameter.ds_tensor.ds_numel
            begin = distributed.get_rank(parameter.ds_process_group) * size
            count = max(0, min(size, parameter.ds_numel - begin))  # the last shares are padded
            if count:
                yield _Share(parameter, begin, flat, at, count)
            at += size


def _state(optimizer: Any, flat: torch.Tensor) -> dict[str, torch.Tensor]:
    """Adam's state of a flat tensor, which AdamW makes at its first step: made here as it would be there."""
    state: dict[str, torch.Tensor] = optimizer.optimizer.state[flat]
    if not state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=flat.device)
        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(flat.data), torch.zeros_like(flat.data)
    return state
