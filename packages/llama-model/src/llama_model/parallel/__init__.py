"""megatron-core around the network: process groups, tensor-parallel layers, distributed checkpoints, on any device.

Needs the extra `[parallel]`. Nothing is imported or installed before it is called for. A training step, run by every
rank (under torchrun, or as a single process without it):

    from ckpt_tools import open_checkpoint
    from llama_model import load_weights, parallel

    parallel.initialize(tensor_model_parallel_size=2)          # before any import of megatron.core
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.pipeline_parallel import get_forward_backward_func

    with open_checkpoint("llama-2-7b-hf") as checkpoint:
        model = parallel.build_model(checkpoint.config, transformer_options={"calculate_per_token_loss": True})
        load_weights(model, checkpoint)                        # this rank's slices
    wrapped = DistributedDataParallel(model.config, DistributedDataParallelConfig(grad_reduce_in_fp32=True), model)
    optimizer = get_megatron_optimizer(OptimizerConfig(optimizer="adam", lr=1e-5), [wrapped])
    model.config.finalize_model_grads_func = finalize_model_grads

    def forward_step(batches, model):
        tokens, labels = next(batches)
        def loss_and_count(loss):                              # [b, s], 0 where ignored
            count = (labels != -100).sum().int()
            return loss.sum(), count, {"loss": loss.detach().sum() / count}
        return model(tokens, labels=labels), loss_and_count

    wrapped.zero_grad_buffer(); optimizer.zero_grad()
    get_forward_backward_func()(forward_step_func=forward_step, data_iterator=batches, model=wrapped,
                                num_microbatches=4, seq_length=4096, micro_batch_size=1)
    optimizer.step()

    from megatron.core import dist_checkpointing
    dist_checkpointing.save(parallel.sharded_state_dict(model), "an/existing/empty/folder")
    parallel.destroy()
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llama_model.parallel.adaptor import adapt, l2_norm
    from llama_model.parallel.building import build_chunks, build_model
    from llama_model.parallel.checkpoint import sharded_state_dict
    from llama_model.parallel.groups import destroy, initialize

_HOME = {
    "adapt": "adaptor",
    "build_chunks": "building",
    "build_model": "building",
    "destroy": "groups",
    "initialize": "groups",
    "l2_norm": "adaptor",
    "sharded_state_dict": "checkpoint",
}

__all__ = ["adapt", "build_chunks", "build_model", "destroy", "initialize", "l2_norm", "sharded_state_dict"]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'llama_model.parallel' has no attribute {name!r}")
    return getattr(import_module(f"llama_model.parallel.{_HOME[name]}"), name)
