"""The engine of "ptd" mode: megatron-core's data-parallel wrapper, optimizer and pipeline schedules around Puna's
network on its tensor-parallel layers.
"""

import contextlib
import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from ckpt_tools import LlamaConfig
from llama_model import LlamaModel, parallel
from npu_kernels import Device

from trainer.config import TrainConfig
from trainer.data import Batch
from trainer.engines import Fill, StepResult, Writing
from trainer.engines import megatron_state as states
from trainer.engines.common import (
    all_finite,
    first_bad,
    loss_of_tokens,
    recompute_of,
    schedule_of,
    set_schedule,
    transformer_options,
)

_LOW = 4096
"""Numbers of tokens travel in two fp32 parts, so that a sum over many ranks stays exact."""


class MegatronEngine:
    """Trains on the process groups that `llama_model.parallel.initialize` has made.

    Args:
        config: The run's options.
        model: The architecture.
        device: Where this rank computes.
        fill: Gives a chunk of the model its weights; called before the optimizer takes its copies.
    """

    def __init__(self, config: TrainConfig, model: LlamaConfig, device: Device, fill: Fill) -> None:
        from megatron.core import parallel_state

        self._config, self._device = config, device.torch_device()
        self._num_microbatches = config.num_microbatches(torch.distributed.get_world_size())
        self._is_last_stage = parallel_state.is_pipeline_last_stage(ignore_virtual=True)
        # Of the ranks that share a layer, each knows the whole loss: one of them reports it.
        self._reports = self._is_last_stage and parallel_state.get_tensor_model_parallel_rank() == 0
        chunks = parallel.build_chunks(
            model,
            config.layout,
            transformer_options=_transformer_options(config, device),
            recompute=recompute_of(config),
        )
        for chunk in chunks:
            fill(chunk, chunk.named_parameters())
        self._chunks = [_wrap(config, chunk, number) for number, chunk in enumerate(chunks)]
        self._optimizer = _optimizer(config, self._chunks)
        self._schedule = schedule_of(config, self._optimizer)
        _connect(config, self._chunks, self._optimizer)

    @property
    def chunks(self) -> list[LlamaModel]:
        """This rank's parts of the model: one, or as many as its stage of a virtual pipeline has."""
        return [chunk.module for chunk in self._chunks]

    def train_step(self, batches: Iterable[Batch], stop_asked: bool = False) -> StepResult:
        """See `Engine.train_step`."""
        for chunk in self._chunks:
            chunk.zero_grad_buffer()
        self._optimizer.zero_grad()
        total = self._run(batches, forward_only=False, stop_asked=stop_asked)
        used_lr = float(self._optimizer.param_groups[0]["lr"])
        loss_scale = float(self._optimizer.get_loss_scale())
        updated, grad_norm, _ = self._optimizer.step()
        if updated:
            self._schedule.step(increment=self._config.global_batch_size)
        return StepResult(
            loss=total.loss / max(total.tokens, 1),
            loss_tokens=total.tokens,
            grad_norm=math.nan if grad_norm is None else float(grad_norm),
            lr=used_lr,
            loss_scale=loss_scale,
            skipped=not updated,
            bad_microbatch=None if math.isfinite(total.loss) else first_bad(total.per_microbatch[:, 0]),
            stop_asked=total.stop_asked,
        )

    def evaluate(self, batches: Iterable[Batch]) -> tuple[float, int]:
        """See `Engine.evaluate`."""
        for chunk in self._chunks:
            chunk.eval()
        try:
            with torch.no_grad(), self._whole_weights():
                total = self._run(batches, forward_only=True)
                return total.loss, total.tokens
        finally:
            for chunk in self._chunks:
                chunk.train()

    def has_finite_weights(self) -> bool:
        """See `Engine.has_finite_weights`."""
        return all_finite(parameter for chunk in self.chunks for parameter in chunk.parameters())

    def write(self, folder: Path, *, in_background: bool = False) -> Writing:
        """See `Engine.write`: megatron-core's distributed format, keyed as its GPTModel's own."""
        from trainer.engines.megatron_writing import begin

        with self._whole_weights():
            optimizer = self._optimizer if self._config.save_optimizer else None
            return begin(folder, *states.to_save(self.chunks, optimizer), in_background=in_background)

    def load(self, folder: Path) -> None:
        """See `Engine.load`; of another engine's checkpoint, the weights are those that `fill` gave."""
        if (folder / ".metadata").is_file():
            states.load(folder, self.chunks, self._optimizer)
        else:
            states.load_canonical(folder, self.chunks, self._optimizer)

    def state(self) -> dict[str, Any]:
        """See `Engine.state`."""
        return {"schedule_samples": self._schedule.num_steps, **states.progress(self._optimizer)}

    def load_state(self, state: dict[str, Any]) -> None:
        """See `Engine.load_state`."""
        states.set_progress(self._optimizer, state)
        set_schedule(self._schedule, state["schedule_samples"])

    def close(self) -> None:
        """See `Engine.close`."""
        for chunk in self._chunks:
            vars(chunk).clear()

    # --- a pass over the global batch

    def _run(self, batches: Iterable[Batch], *, forward_only: bool, stop_asked: bool = False) -> "_Total":
        """megatron-core's schedule over this rank's micro-batches; the sums over all ranks."""
        from megatron.core.pipeline_parallel import get_forward_backward_func

        stream = iter(batches)
        first = next(stream)
        rows, length = first.tokens.shape  # as the stages send hidden states to each other
        # Every chunk of a virtual pipeline sees the same micro-batches, each at its own time.
        streams = list(itertools.tee(itertools.chain([first], stream), len(self._chunks)))
        several = len(self._chunks) > 1
        reports = get_forward_backward_func()(
            forward_step_func=self._forward_step,
            data_iterator=streams if several else streams[0],
            model=self._chunks if several else self._chunks[0],
            num_microbatches=self._num_microbatches,
            seq_length=length,
            micro_batch_size=rows,
            forward_only=forward_only,
        )
        return self._total([report["loss and tokens"] for report in reports], stop_asked)

    def _forward_step(self, batches: Iterator[Batch], model: Any) -> Any:
        batch = next(batches)

        output = loss_of_tokens(model, batch, self._device)
        tokens = batch.loss_tokens

        def loss_and_tokens(per_token: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
            loss = per_token.float().sum()
            report = torch.stack([loss.detach(), tokens.to(loss.device, torch.float32)])  # exact up to 2**24 tokens
            return loss, tokens.to(loss.device, torch.int), {"loss and tokens": report}

        return output, loss_and_tokens

    def _total(self, reports: list[torch.Tensor], stop_asked: bool) -> "_Total":
        """Adds up over all ranks in one all-reduce: the loss, the tokens, and who was asked to stop."""
        mine = torch.stack(reports) if reports else torch.zeros(0, 2, device=self._device)
        loss, tokens = mine.sum(0) if self._reports else torch.zeros(2, device=self._device)
        high = (tokens / _LOW).floor()
        flag = torch.full_like(loss, float(stop_asked))
        sums = torch.stack([loss, high, tokens - high * _LOW, flag])
        torch.distributed.all_reduce(sums)
        total_loss, high_sum, low_sum, flags = sums.tolist()
        return _Total(total_loss, int(high_sum) * _LOW + int(low_sum), flags > 0, mine)

    @contextlib.contextmanager
    def _whole_weights(self) -> Iterator[None]:
        """Where gathering the new weights overlaps with the next forward pass: gathers them now."""
        if not self._config.overlap_param_gather:
            yield
            return
        for chunk in self._chunks:
            chunk.disable_forward_pre_hook()
        try:
            yield
        finally:
            for chunk in self._chunks:
                chunk.enable_forward_pre_hook()


@dataclass(frozen=True, slots=True)
class _Total:
    """What a pass over the global batch added up to."""

    loss: float
    tokens: int
    stop_asked: bool
    per_microbatch: torch.Tensor
    """This rank's losses and labelled tokens, [m, 2]."""


# --- megatron-core's parts from the run's options --------------------------------------------------------------------


def _transformer_options(config: TrainConfig, device: Device) -> dict[str, Any]:
    return transformer_options(config) | {
        "sequence_parallel": config.sequence_parallel,
        # A device's stream has sent an output before its memory is used again; gloo reads it whenever it comes to it.
        "deallocate_pipeline_outputs": config.pipeline_model_parallel_size > 1 and device.type != "cpu",
        "overlap_p2p_comm": config.num_layers_per_virtual_pipeline_stage is not None,
        # Gradients of every rank are summed, then divided by the global number of labelled tokens.
        "calculate_per_token_loss": True,
    }


def _wrap(config: TrainConfig, chunk: LlamaModel, number: int) -> Any:
    """megatron-core's data-parallel wrapper: gradients in one fp32 buffer, reduced over the copies of the model."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    options = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=config.use_distributed_optimizer,
        overlap_grad_reduce=config.overlap_grad_reduce,
        overlap_param_gather=config.overlap_param_gather,
    )
    # Only the first chunk's backward pass ends the step: the others' gradients are reduced in one piece.
    return DistributedDataParallel(chunk.config, options, chunk, disable_bucketing=number > 0)


def _optimizer(config: TrainConfig, chunks: list[Any]) -> Any:
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    options = OptimizerConfig(
        optimizer="adam",
        lr=config.lr,
        min_lr=config.min_lr,
        weight_decay=config.weight_decay,
        adam_beta1=config.adam_beta1,
        adam_beta2=config.adam_beta2,
        adam_eps=config.adam_eps,
        clip_grad=config.clip_grad or math.inf,  # with 0 megatron-core would not compute the norm either
        bf16=config.bf16,
        fp16=config.fp16,
        params_dtype=getattr(torch, config.dtype),
        initial_loss_scale=config.initial_loss_scale,
        min_loss_scale=config.min_loss_scale,
        loss_scale_window=config.loss_scale_window,
        hysteresis=config.hysteresis,
        use_distributed_optimizer=config.use_distributed_optimizer,
        overlap_param_gather=config.overlap_param_gather,
    )
    return get_megatron_optimizer(options, chunks)


def _connect(config: TrainConfig, chunks: list[Any], optimizer: Any) -> None:
    """Tells megatron-core's schedules what to do at the end of a pass, and when to talk to the other copies."""
    from megatron.core.distributed import finalize_model_grads

    several = len(chunks) > 1
    for chunk in chunks:
        options = chunk.config
        options.finalize_model_grads_func = finalize_model_grads
        options.grad_scale_func = optimizer.scale_loss
        if config.overlap_grad_reduce:
            options.no_sync_func = [part.no_sync for part in chunks] if several else chunk.no_sync
        if config.overlap_grad_reduce and several:
            options.grad_sync_func = [part.start_grad_sync for part in chunks]
        if config.overlap_param_gather and several:
            options.param_sync_func = [part.start_param_sync for part in chunks]
