"""What a run says of itself before its first step: layout, sizes, kernels, data."""

import math
from collections.abc import Iterator

from ckpt_tools import sharding
from llama_model import flops
from npu_kernels import Device, backends

from trainer.config import TrainConfig
from trainer.data import DataOrder
from trainer.start import Start


def lines(config: TrainConfig, start: Start, order: DataOrder, on: Device, world_size: int) -> Iterator[str]:
    """One fact a line."""
    model = start.model
    parameters = sum(math.prod(rule.shape) for rule in sharding(model).values())
    yield (
        f"model    {parameters:,} parameters in {config.dtype}, {model.num_layers} layers, "
        f"{flops.model_flops_per_token(model, config.seq_length):,} FLOPs a token, from {start.path}"
    )
    yield f"layout   {layout(config, world_size)}"
    yield (
        f"batch    {config.global_batch_size} samples of {config.seq_length} tokens a step: "
        f"{config.num_microbatches(world_size)} micro-batches of {config.micro_batch_size} on each copy of the model"
    )
    for source in order.sources:
        share = f"{source.weight:.1%} " if source.weight < 1 else ""  # the three files of instruction data are whole
        yield f"data     {share}{source.name}: {source.sequences:,} sequences, {source.tokens:,} tokens"
    vocabulary = f"sha256 {start.vocab_sha256[:12]}" if start.vocab_sha256 else "no tokenizer, so no fingerprint"
    yield f"vocab    {model.vocab_size:,} entries, {vocabulary}"
    yield f"kernels  on {on.type}: {', '.join(f'{op} by {backend}' for op, backend in backends(on.type).items())}"


def layout(config: TrainConfig, world_size: int) -> str:
    """The run's processes in words: TP 2 (sequence parallel) x PP 2 x DP 2."""
    parts = [f"TP {config.tensor_model_parallel_size}" + " (sequence parallel)" * config.sequence_parallel]
    pipeline = f"PP {config.pipeline_model_parallel_size}"
    if config.num_layers_per_virtual_pipeline_stage:
        pipeline += f" (interleaved, chunks of {config.num_layers_per_virtual_pipeline_stage} layers)"
    if config.num_layer_list:
        pipeline += f" (layers {', '.join(map(str, config.num_layer_list))})"
    data = f"DP {config.data_parallel_size(world_size)}"
    data += " (distributed optimizer)" * config.use_distributed_optimizer
    if config.mode == "zero":
        return f"{world_size} processes: {' x '.join([*parts, data])}, ZeRO stage {config.zero_stage}"
    return f"{world_size} processes: {' x '.join([*parts, pipeline, data])}"
