"""What a run would be, computed from its options and the model's config.json alone: nothing is started or allocated.

Neither torch nor any weights are needed. `trainer.memory` has the exact part, `trainer.activations` and
`trainer.communication` the formulas.
"""

import math
from pathlib import Path
from typing import Any

from ckpt_tools import LlamaConfig, open_checkpoint, sharding
from llama_model import flops
from npu_kernels import peaks

from trainer import activations, communication, memory
from trainer.config import TrainConfig
from trainer.deepspeed_options import deepspeed_options
from trainer.errors import ConfigError

Figures = dict[str, Any]


def describe(config: TrainConfig, world_size: int, device: str | None = None) -> Figures:
    """Named figures of the run, as JSON: the model, the layout, a step's arithmetic, and each pipeline stage's share.

    Args:
        config: The options.
        world_size: Processes, over all machines; each has one device.
        device: A chip as its driver calls it: adds its peak, a step's time, and whether a rank fits its memory.

    Raises:
        ConfigError: The processes, the layout, the batch sizes and the model do not fit together, or nothing is known
            of the device.
    """
    model = architecture(config)
    dp_size = config.data_parallel_size(world_size)
    num_microbatches = config.num_microbatches(world_size)
    config.check_model(model)
    if config.mode == "zero":
        deepspeed_options(config, world_size)  # names what a user's JSON contradicts
    stages = [_stage(config, model, stage, dp_size, num_microbatches) for stage in range(_stages(config))]
    tokens = config.global_batch_size * config.seq_length
    per_token = flops.model_flops_per_token(model, config.seq_length)
    figures = {
        "architecture": {name: getattr(model, name) for name in _SHOWN},
        "parameters": sum(math.prod(rule.shape) for rule in sharding(model).values()),
        "parameters_per_rank": max(stage["parameters"] for stage in stages),
        "padded_vocab_size": model.padded_vocab_size(
            config.tensor_model_parallel_size, config.make_vocab_size_divisible_by
        ),
        "dtype": config.dtype,
        "processes": world_size,
        "tensor_model_parallel_size": config.tensor_model_parallel_size,
        "sequence_parallel": config.sequence_parallel,
        "pipeline_model_parallel_size": config.pipeline_model_parallel_size,
        "virtual_pipeline_model_parallel_size": len(config.layout.chunks(model.num_layers)[0]),
        "data_parallel_size": dp_size,
        "use_distributed_optimizer": config.use_distributed_optimizer,
        "zero_stage": config.zero_stage if config.mode == "zero" else None,
        "recompute": _recompute(config),
        "train_iters": config.train_iters,
        "seq_length": config.seq_length,
        "micro_batch_size": config.micro_batch_size,
        "global_batch_size": config.global_batch_size,
        "num_microbatches": num_microbatches,
        "pipeline_bubble": _bubble(config, model, num_microbatches),
        "tokens_per_step": tokens,
        "tokens_in_all": tokens * config.train_iters,
        "model_flops_per_token": per_token,
        "model_flops_per_step": tokens * per_token,
        "stages": stages,
    }
    return figures | ({} if device is None else {"device": _on_device(device, figures)})


_SHOWN = (
    *("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels"),
    *("vocab_size", "max_position_embeddings"),
)


def architecture(config: TrainConfig) -> LlamaConfig:
    """The model that a run trains: of the run that it resumes, of the weights that it loads, or of a config.json."""
    source = config.resume or config.load_weights
    if source is None:
        assert config.model_config is not None  # TrainConfig has seen to it
        return LlamaConfig.from_hf(config.model_config)
    if _is_only_described(source):
        return LlamaConfig.from_hf(source)
    with open_checkpoint(source) as checkpoint:
        return checkpoint.config


def _is_only_described(folder: Path) -> bool:
    """Whether a folder holds a config.json and no weights (yet): it describes a model all the same."""
    return folder.is_dir() and {path.name for path in folder.iterdir()} == {"config.json"}


def _stage(config: TrainConfig, model: LlamaConfig, stage: int, dp_size: int, num_microbatches: int) -> Figures:
    """What the ranks of one pipeline stage hold and send."""
    held = memory.states(config, model, stage, dp_size)
    chunks = config.layout.chunks(model.num_layers)[stage]
    kept = activations.stage_bytes(config, model, stage, num_microbatches)
    return {
        "stage": stage,
        "layers": [[layers.start, layers.stop - 1] for layers in chunks],
        "ranks": ranks_of_stage(config, stage, dp_size),
        "parameters": held.parameters,
        "weight_bytes": held.weight_bytes,
        "gradient_bytes": held.gradient_bytes,
        "optimizer_bytes": max(held.optimizer_bytes),
        "optimizer_bytes_by_data_parallel_rank": list(held.optimizer_bytes),
        "passes_in_flight": activations.passes_in_flight(config, stage, len(chunks), num_microbatches),
        "activation_bytes": kept,
        "total_bytes": held.weight_bytes + held.gradient_bytes + max(held.optimizer_bytes) + kept,
        "sent_bytes_per_step": {
            "tensor_parallel": communication.tensor_parallel_bytes(config, model, stage, num_microbatches),
            "pipeline": communication.pipeline_bytes(config, model, stage, num_microbatches),
            "data_parallel": communication.data_parallel_bytes(config, held, dp_size),
        },
    }


def ranks_of_stage(config: TrainConfig, stage: int, dp_size: int) -> list[list[int]]:
    """The first and the last rank of each copy of a stage: megatron-core counts tensor-parallel ranks first, then
    data-parallel ones, then stages.
    """
    tp = config.tensor_model_parallel_size
    starts = [tp * (copy + dp_size * stage) for copy in range(dp_size)]
    return [[start, start + tp - 1] for start in starts]


def _on_device(name: str, figures: Figures) -> Figures:
    """What a chip makes of it. Unknown figures are None."""
    known = {known.lower(): known for known in peaks.known()}
    spelled = next(
        (known[start] + name[len(start) :] for start in sorted(known, reverse=True) if name.lower().startswith(start)),
        None,
    )
    if spelled is None:
        raise ConfigError(f"--device {name!r} is none of the chips whose peaks are known: {', '.join(known.values())}")
    peak, size = peaks.flops(spelled, figures["dtype"]), peaks.memory_bytes(spelled)
    fullest = max(stage["total_bytes"] for stage in figures["stages"])
    at_peak = figures["model_flops_per_step"] / figures["processes"] / peak if peak else None
    return {
        "name": spelled,
        "peak_flops": peak,
        "memory_bytes": size,
        "fits": fullest <= size if size else None,
        "step_time_s_at_full_mfu": at_peak,
        "step_time_s_at_half_mfu": at_peak * 2 if at_peak else None,
    }


def _bubble(config: TrainConfig, model: LlamaConfig, num_microbatches: int) -> float:
    """The share of a step's time that a stage waits for others: (P - 1) / (c m + P - 1) of P stages of c chunks with m
    micro-batches, each pass taking equally long.

    Source: Narayanan et al., https://arxiv.org/abs/2104.04473, section 2.2.
    """
    others = _stages(config) - 1
    return others / (len(config.layout.chunks(model.num_layers)[0]) * num_microbatches + others)


def _recompute(config: TrainConfig) -> str:
    if config.recompute_granularity == "full":
        return f"full, {config.recompute_method}, {config.recompute_num_layers}"
    if config.recompute_granularity == "selective":
        return f"selective, {' and '.join(config.recompute_modules)}"
    return "none"


def _stages(config: TrainConfig) -> int:
    return config.pipeline_model_parallel_size
