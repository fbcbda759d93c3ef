"""The engine of "ptd" mode: megatron-core's data-parallel wrapper, optimizer, schedules and distributed checkpoints
around Puna's network on its tensor-parallel layers.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from ckpt_tools import Checkpoint
from llama_model import load_weights, parallel
from npu_kernels import Device

from trainer.config import TrainConfig
from trainer.data import Batch
from trainer.engines import StepResult


class MegatronEngine:
    """Trains on the process groups that `llama_model.parallel.initialize` has made.

    Args:
        config: The run's options.
        checkpoint: Architecture and weights to start from; each rank reads only its slices.
        device: Where this rank computes.
    """

    def __init__(self, config: TrainConfig, checkpoint: Checkpoint, device: Device) -> None:
        from megatron.core import parallel_state
        from megatron.core.distributed import (
            DistributedDataParallel,
            DistributedDataParallelConfig,
            finalize_model_grads,
        )

        self._config, self._device = config, device.torch_device()
        self._dp_group = parallel_state.get_data_parallel_group()
        self._num_microbatches = config.num_microbatches(torch.distributed.get_world_size())
        model = parallel.build_model(
            checkpoint.config,
            make_vocab_size_divisible_by=config.make_vocab_size_divisible_by,
            transformer_options={
                "bf16": config.bf16,
                "fp16": config.fp16,
                "params_dtype": params_dtype(config),
                # Gradients of every rank are summed, then divided by the global number of labelled tokens.
                "calculate_per_token_loss": True,
            },
        )
        load_weights(model, checkpoint)
        self._model = DistributedDataParallel(
            model.config,
            DistributedDataParallelConfig(
                grad_reduce_in_fp32=True, use_distributed_optimizer=config.use_distributed_optimizer
            ),
            model,
        )
        self._optimizer = _optimizer(config, self._model)
        self._schedule = _schedule(config, self._optimizer)
        options: Any = model.config
        options.finalize_model_grads_func = finalize_model_grads
        options.grad_scale_func = self._optimizer.scale_loss

    def train_step(self, batches: Iterable[Batch]) -> StepResult:
        """See `Engine.train_step`."""
        self._model.zero_grad_buffer()
        self._optimizer.zero_grad()
        loss, tokens = self._run(batches, forward_only=False)
        used_lr = float(self._optimizer.param_groups[0]["lr"])
        loss_scale = float(self._optimizer.get_loss_scale())
        updated, grad_norm, _ = self._optimizer.step()
        if updated:
            self._schedule.step(increment=self._config.global_batch_size)
        return StepResult(
            loss=loss / max(tokens, 1),
            loss_tokens=tokens,
            grad_norm=float(grad_norm or 0.0),
            lr=used_lr,
            loss_scale=loss_scale,
            skipped=not updated,
        )

    def evaluate(self, batches: Iterable[Batch]) -> tuple[float, int]:
        """See `Engine.evaluate`."""
        self._model.eval()
        try:
            with torch.no_grad():
                return self._run(batches, forward_only=True)
        finally:
            self._model.train()

    def save(self, folder: Path) -> None:
        """See `Engine.save`: megatron-core's distributed format, keyed as its GPTModel's own."""
        from megatron.core import dist_checkpointing

        metadata = {"singleton_local_shards": False}
        state = parallel.sharded_state_dict(self._model.module, metadata)
        try:
            dist_checkpointing.save(state, str(folder), content_metadata=metadata)
        finally:
            _end_manager()

    def _run(self, batches: Iterable[Batch], *, forward_only: bool) -> tuple[float, int]:
        """Summed loss and labelled tokens of the global batch, after megatron-core's schedule has run it."""
        from megatron.core.pipeline_parallel import get_forward_backward_func

        sums = get_forward_backward_func()(
            forward_step_func=self._forward_step,
            data_iterator=iter(batches),
            model=self._model,
            num_microbatches=self._num_microbatches,
            seq_length=self._config.seq_length,
            micro_batch_size=self._config.micro_batch_size,
            forward_only=forward_only,
        )
        total = torch.stack([pair["loss and tokens"] for pair in sums]).sum(0)
        torch.distributed.all_reduce(total, group=self._dp_group)
        loss, tokens = total.tolist()
        return loss, int(tokens)

    def _forward_step(self, batches: Iterator[Batch], model: Any) -> Any:
        batch = next(batches)
        labels = batch.labels.to(self._device, non_blocking=True)
        output = model(batch.tokens.to(self._device, non_blocking=True), labels=labels)
        tokens = batch.loss_tokens

        def loss_and_tokens(per_token: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
            loss = per_token.float().sum()
            report = torch.stack([loss.detach(), tokens.to(loss.device, torch.float32)])  # exact up to 2**24 tokens
            return loss, tokens.to(loss.device, torch.int), {"loss and tokens": report}

        return output, loss_and_tokens


def params_dtype(config: TrainConfig) -> torch.dtype:
    """What weights and activations are kept in."""
    return torch.bfloat16 if config.bf16 else torch.float16 if config.fp16 else torch.float32


def _optimizer(config: TrainConfig, model: Any) -> Any:
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    options = OptimizerConfig(
        optimizer="adam",
        lr=config.lr,
        min_lr=config.min_lr,
        weight_decay=config.weight_decay,
        adam_beta1=config.adam_beta1,
        adam_beta2=config.adam_beta2,
        adam_eps=config.adam_eps,
        clip_grad=config.clip_grad,
        bf16=config.bf16,
        fp16=config.fp16,
        params_dtype=params_dtype(config),
        initial_loss_scale=2.0**16,
        use_distributed_optimizer=config.use_distributed_optimizer,
    )
    return get_megatron_optimizer(options, [model])


def _schedule(config: TrainConfig, optimizer: Any) -> Any:
    """Megatron's schedule, counted in samples: the first step of a warm-up has the rate 0."""
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    samples = config.global_batch_size
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=config.lr,
        min_lr=config.min_lr,
        lr_warmup_steps=config.lr_warmup_iters * samples,
        lr_decay_steps=config.decay_iters * samples,
        lr_decay_style=config.lr_decay_style,
        start_wd=config.weight_decay,
        end_wd=config.weight_decay,
        wd_incr_steps=config.train_iters * samples,
        wd_incr_style="constant",
    )


def _end_manager() -> None:
    """Ends the process that megatron-core starts for a save: it would outlive a rank that is killed later."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    queue, filesystem_async._results_queue = filesystem_async._results_queue, None
    if queue is not None:
        queue._manager.shutdown()
