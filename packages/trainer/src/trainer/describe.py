"""What a run would be, computed from its options and the model's config.json alone: nothing is started or allocated."""

import math
from typing import Any

from ckpt_tools import open_checkpoint, sharding
from llama_model import flops

from trainer.config import TrainConfig


def describe(config: TrainConfig, world_size: int) -> dict[str, Any]:
    """Named figures of the run: parameters over all and on a rank, layout, batch arithmetic.

    Raises:
        ConfigError: The processes, the layout and the batch sizes do not divide.
    """
    with open_checkpoint(config.load_weights) as checkpoint:
        model = checkpoint.config
    data_parallel_size = config.data_parallel_size(world_size)
    tp = config.tensor_model_parallel_size
    padded = model.padded_vocab_size(tp, config.make_vocab_size_divisible_by)
    on_rank = 0
    for rule in sharding(model).values():
        shape = (padded, *rule.shape[1:]) if rule.vocab else rule.shape
        on_rank += math.prod(shape) // (1 if rule.split_dim is None else tp)
    return {
        "parameters": sum(math.prod(rule.shape) for rule in sharding(model).values()),
        "parameters_per_rank": on_rank,
        "padded_vocab_size": padded,
        "processes": world_size,
        "tensor_model_parallel_size": tp,
        "data_parallel_size": data_parallel_size,
        "num_microbatches": config.num_microbatches(world_size),
        "tokens_per_step": config.global_batch_size * config.seq_length,
        "tokens_in_all": config.global_batch_size * config.seq_length * config.train_iters,
        "model_flops_per_token": flops.model_flops_per_token(model, config.seq_length),
    }
