"""The engine of "zero" mode: DeepSpeed's ZeRO around Puna's network on megatron-core's tensor-parallel layers.

Needs the extra `[deepspeed]`, which is imported when the engine is made.
"""

import contextlib
import io
import math
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from ckpt_tools import LlamaConfig
from llama_model import LlamaModel, parallel
from npu_kernels import Device
from torch import distributed

from trainer.config import TrainConfig
from trainer.data import Batch
from trainer.deepspeed_options import REPORTS, deepspeed_options
from trainer.engines import Fill, StepResult, Writing, deepspeed_adaptor
from trainer.engines import deepspeed_state as states
from trainer.engines.common import (
    all_finite,
    could_not_write,
    first_bad,
    loss_of_tokens,
    recompute_of,
    schedule_of,
    set_schedule,
    transformer_options,
)
from trainer.hashes import leave_hashes


class DeepSpeedEngine:
    """Trains on the process groups that `llama_model.parallel.initialize` has made.

    Args:
        config: The run's options, which `trainer.deepspeed_options.check` has passed.
        model: The architecture.
        device: Where this rank computes.
        fill: Gives the model its weights, before DeepSpeed takes its copies; under stage 3, where no rank holds the
            whole model, one parameter at a time.
    """

    def __init__(self, config: TrainConfig, model: LlamaConfig, device: Device, fill: Fill) -> None:
        from megatron.core import parallel_state

        options = deepspeed_options(config, distributed.get_world_size())
        deepspeed = deepspeed_adaptor.imported(device)
        self._config, self._device = config, device.torch_device()
        self._dp_rank: int = parallel_state.get_data_parallel_rank()
        self._dp_size: int = parallel_state.get_data_parallel_world_size()
        self._tp_rank: int = parallel_state.get_tensor_model_parallel_rank()
        groups: Any = deepspeed_adaptor.Groups(parallel_state)
        with _partitioning(deepspeed, config, options, groups):
            (self._model,) = parallel.build_chunks(
                model,
                config.layout,
                transformer_options=transformer_options(config),
                recompute=recompute_of(config),
            )
        fill(self._model, _one_by_one(self._model))
        adam = _optimizer(config, self._model, self._device)
        with contextlib.redirect_stdout(io.StringIO()):  # it prints how much memory it takes
            self._engine, self._optimizer, _, _ = deepspeed.initialize(
                model=self._model, optimizer=adam, config=options, mpu=groups, dist_init_required=False
            )
        states.leave_smallest_scale_to_the_loop(self._optimizer)
        if any(options.get(name) for name in REPORTS):
            deepspeed_adaptor.let_it_speak()
        self._engine._copy_recovery_script = lambda _: None  # a script beside the checkpoints, that unpickles them
        self._adam = adam
        self._schedule = schedule_of(config, adam)

    @property
    def chunks(self) -> list[LlamaModel]:
        """This rank's part of the model; under stage 3 its parameters are empty between the passes."""
        return [self._model]

    def train_step(self, batches: Iterable[Batch], stop_asked: bool = False) -> StepResult:
        """See `Engine.train_step`."""
        batches = list(batches)
        tokens, any_asked = self._over_ranks(sum(int(batch.loss_tokens) for batch in batches), stop_asked)
        used_lr = float(self._adam.param_groups[0]["lr"])
        loss_scale = states.loss_scale(self._optimizer)
        # DeepSpeed averages the copies' gradients: this makes it their sum, over the global number of tokens.
        share = self._dp_size / max(tokens, 1)
        losses = []
        with contextlib.redirect_stdout(sys.stderr):  # for the reports that a user's JSON may ask for
            for batch in batches:
                loss = self._loss(batch)
                losses.append(loss.detach())
                self._engine.backward(loss * share, scale_wrt_gas=False)
                self._engine.step()  # which steps after the last one
        updated = bool(self._engine.was_step_applied())
        if updated:
            self._schedule.step(increment=self._config.global_batch_size)
        mine = torch.stack(losses)
        total = self._sum(mine)
        return StepResult(
            loss=total / max(tokens, 1),
            loss_tokens=tokens,
            grad_norm=self._grad_norm(),
            lr=used_lr,
            loss_scale=loss_scale,
            skipped=self._config.fp16 and not updated,
            bad_microbatch=None if math.isfinite(total) else first_bad(mine),
            stop_asked=any_asked,
        )

    def evaluate(self, batches: Iterable[Batch]) -> tuple[float, int]:
        """See `Engine.evaluate`."""
        self._engine.eval()
        try:
            with torch.no_grad():
                batches = list(batches)
                tokens, _ = self._over_ranks(sum(int(batch.loss_tokens) for batch in batches), False)
                return self._sum(torch.stack([self._loss(batch) for batch in batches])), tokens
        finally:
            self._engine.train()

    def has_finite_weights(self) -> bool:
        """See `Engine.has_finite_weights`."""
        return all_finite(parameter for chunk in self.chunks for parameter in chunk.parameters())

    def write(self, folder: Path, *, in_background: bool = False) -> Writing:
        """See `Engine.write`: DeepSpeed's own files. Loadable by itself as the tag `folder.name` of `folder.parent`."""
        assert not in_background, "the options refuse it"
        self._engine.save_zero_checkpoint = self._config.save_optimizer
        try:
            # Its file `latest` would name the folder before the other ranks are done.
            self._engine.save_checkpoint(str(folder.parent), tag=folder.name, save_latest=False)
        except (OSError, RuntimeError) as error:
            raise could_not_write(folder, f"rank {distributed.get_rank()}", str(error)) from error
        leave_hashes(folder, distributed.get_rank(), self._files(folder))
        return _Written()

    def load(self, folder: Path) -> None:
        """See `Engine.load`; the weights are those that `fill` gave."""
        states.load(folder, self._model, self._optimizer)

    def state(self) -> dict[str, Any]:
        """See `Engine.state`."""
        return {"schedule_samples": self._schedule.num_steps, **states.progress(self._optimizer)}

    def load_state(self, state: dict[str, Any]) -> None:
        """See `Engine.load_state`."""
        states.set_progress(self._optimizer, state)
        set_schedule(self._schedule, state["schedule_samples"])

    def close(self) -> None:
        """See `Engine.close`."""
        self._engine.destroy()

    # --- a pass over the global batch

    def _loss(self, batch: Batch) -> torch.Tensor:
        """The summed loss of a micro-batch's labelled tokens."""
        return loss_of_tokens(self._engine, batch, self._device).float().sum()

    def _grad_norm(self) -> float:
        """Before clipping. DeepSpeed says -1 where it is no number."""
        norm = float(self._engine.get_global_grad_norm())
        return norm if norm >= 0 else math.inf

    def _over_ranks(self, tokens: int, stop_asked: bool) -> tuple[int, bool]:
        """The tokens of all copies of the model, and whether any rank was asked to stop."""
        counted = tokens if self._tp_rank == 0 else 0  # the ranks that share a layer have the same batches
        sums = torch.tensor([counted, int(stop_asked)], device=self._device)
        distributed.all_reduce(sums)
        total, asked = sums.tolist()
        return total, asked > 0

    def _sum(self, losses: torch.Tensor) -> float:
        """Over this rank's micro-batches and all copies of the model."""
        total = losses.sum() if self._tp_rank == 0 else torch.zeros((), device=self._device)
        distributed.all_reduce(total)
        return float(total)

    def _files(self, folder: Path) -> Iterator[Path]:
        """Those that this rank has written."""
        yield from folder.glob(f"*zero_pp_rank_{self._dp_rank}_mp_rank_{self._tp_rank:02d}_*_states.pt")
        if self._dp_rank == 0:
            yield from folder.glob(f"mp_rank_{self._tp_rank:02d}_model_states.pt")


class _Written:
    """See `trainer.engines.Writing`: DeepSpeed returns when its files are written."""

    def finished(self, *, wait: bool) -> bool:
        """True."""
        return True


def _partitioning(
    deepspeed: Any, config: TrainConfig, options: dict[str, Any], groups: Any
) -> contextlib.AbstractContextManager[Any]:
    """Under stage 3: parameters made within it are shared out as soon as their layer is made."""
    if config.zero_stage < 3:
        return contextlib.nullcontext()
    context: contextlib.AbstractContextManager[Any] = deepspeed.zero.Init(
        data_parallel_group=groups.get_data_parallel_group(), config_dict_or_path=options, mpu=groups
    )
    return context


def _one_by_one(model: LlamaModel) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """The parameters to fill; one that is shared out is whole only until the next one is asked for."""
    for name, parameter in model.named_parameters():
        if not hasattr(parameter, "ds_id"):
            yield name, parameter
            continue
        parameter.all_gather()  # type: ignore[attr-defined]
        yield name, parameter
        parameter.partition(has_been_updated=True)  # type: ignore[attr-defined]


def _optimizer(config: TrainConfig, model: LlamaModel, device: torch.device) -> torch.optim.AdamW:
    """AdamW on the kernels of `llama_model.parallel.fused_adam`; no weight decay on one-dimensional parameters."""
    parameters = list(model.parameters())
    decayed = [parameter for parameter in parameters if len(_shape(parameter)) > 1]
    others = [parameter for parameter in parameters if len(_shape(parameter)) == 1]
    fused = device.type in ("cpu", "cuda", torch._C._get_privateuse1_backend_name())
    return torch.optim.AdamW(
        [{"params": decayed, "wd_mult": 1.0}, {"params": others, "wd_mult": 0.0}],
        lr=config.lr,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_eps,
        weight_decay=config.weight_decay,
        fused=fused,
    )


def _shape(parameter: torch.nn.Parameter) -> tuple[int, ...]:
    """Of the whole parameter: one that is shared out looks like an empty vector."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))
