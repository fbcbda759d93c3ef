"""What both engines make of the run's options, and what their ranks tell each other."""

import math
import re
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from llama_model import Recompute
from torch import distributed

from trainer.config import TrainConfig
from trainer.data import Batch
from trainer.errors import TrainerError


def recompute_of(config: TrainConfig) -> Recompute | None:
    """What the backward pass computes again."""
    if config.recompute_granularity is None:
        return None
    return Recompute(
        granularity=config.recompute_granularity,
        method=config.recompute_method,
        num_layers=config.recompute_num_layers,
        modules=config.recompute_modules,
    )


def transformer_options(config: TrainConfig) -> dict[str, Any]:
    """What both engines tell megatron-core's TransformerConfig."""
    return {
        "bf16": config.bf16,
        "fp16": config.fp16,
        "params_dtype": getattr(torch, config.dtype),
        "perform_initialization": False,  # `Fill` does
    }


def schedule_of(config: TrainConfig, optimizer: Any) -> Any:
    """Megatron's schedule, counted in samples: the first step of a warm-up has the rate 0.

    It sets learning rate and weight decay in each of the `param_groups` of `optimizer`, times the group's `lr_mult` and
    `wd_mult`.
    """
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    samples = config.global_batch_size
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=config.lr,
        min_lr=config.min_lr,
        lr_warmup_steps=config.warmup_samples,
        lr_decay_steps=config.decay_iters * samples,
        lr_decay_style=config.lr_decay_style,
        start_wd=config.weight_decay,
        end_wd=config.weight_decay,
        wd_incr_steps=config.train_iters * samples,
        wd_incr_style="constant",
    )


def set_schedule(schedule: Any, samples: int) -> None:
    """Takes a schedule to where it stood after so many samples."""
    schedule.num_steps = 0
    schedule.step(increment=samples)


def loss_of_tokens(model: Callable[..., torch.Tensor], batch: Batch, device: torch.device) -> torch.Tensor:
    """What a wrapped model makes of a micro-batch: fp32 [b, s], 0 where there is no loss; hidden states [s, b, h] of a
    pipeline stage that is not the last.
    """

    def here(tensor: torch.Tensor | None) -> torch.Tensor | None:
        return None if tensor is None else tensor.to(device, non_blocking=True)

    return model(
        here(batch.tokens),
        labels=here(batch.labels),
        position_ids=here(batch.position_ids),
        cu_seqlens=here(batch.cu_seqlens),
    )


def all_finite(parameters: Iterable[torch.Tensor]) -> bool:
    """Whether every number of all ranks' parameters is finite; of a partitioned one each rank looks at its own part."""
    held = (getattr(parameter, "ds_tensor", parameter) for parameter in parameters)
    mine = torch.stack([tensor.detach().mul(0).float().sum() for tensor in held]).sum()  # 0 times inf is no number
    distributed.all_reduce(mine)
    return math.isfinite(float(mine))


def first_bad(losses: torch.Tensor) -> int | None:
    """The number, in the global batch, of the first micro-batch whose loss is no number; asked by all ranks together.

    Args:
        losses: [m], of this rank's micro-batches, which are dealt out to the copies of the model in turn.
    """
    from megatron.core import parallel_state

    rank, size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    bad = (~losses.isfinite()).nonzero().flatten().tolist()
    none = torch.iinfo(torch.int64).max
    first = torch.tensor(bad[0] * size + rank if bad else none, device=losses.device)
    distributed.all_reduce(first, op=distributed.ReduceOp.MIN)
    return None if int(first) == none else int(first)


_LITTLE = 2**20
"""Bytes left on a disk that is called full."""


def could_not_write(folder: Path, who: str, reason: str) -> TrainerError:
    """The error of a save that failed: torch says why behind words of its own."""
    said = re.sub(r"^(Worker failure: )?(\[enforce fail at [^\]]*\] ?\.? ?)?", "", " ".join(reason.split()))
    full = "; the disk is full" if shutil.disk_usage(folder).free < _LITTLE else ""
    return TrainerError(f"{who} could not write its part of {folder}: {said}{full}")
