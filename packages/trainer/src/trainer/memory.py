"""What a rank's weights, gradients and optimizer state take, exactly, from the architecture and the options alone.

Megatron-core's data-parallel wrapper lays the parameters of a model chunk out in one flat buffer, the last parameter
first, and cuts it into buckets. With the distributed optimizer the buffer holds the weights too, every parameter starts
at a multiple of 64 elements, every bucket ends at a multiple of 128 and of the data-parallel size, and each
data-parallel rank updates an equal part of each bucket: it has optimizer state for the parameters' elements in its
parts, and none for padding.

    weights      bytes of the type x elements (with the distributed optimizer: elements of the buffer)
    gradients    4 x elements of the buffer (main gradients are fp32 in every precision)
    optimizer    (4 + 4) x elements updated here: Adam's two moments; 4 more under bf16 or fp16: the fp32 weights

DeepSpeed's ZeRO (zero mode) gives each of d data-parallel ranks an even share of the n elements, exact but for a few
elements of padding: of the optimizer's state, 12 x n / d in every precision; of gradients, 4 x n / d from stage 2 on
(and whole the parameters at the borders of two ranks' shares); of weights under stage 3.

Source: `_ParamAndGradBuffer` of megatron-core, https://github.com/NVIDIA/Megatron-LM/blob/core_v0.16.1/megatron/core/
    distributed/param_and_grad_buffer.py
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from ckpt_tools import LlamaConfig, sharding
from ckpt_tools.shard_rules import EMBEDDING

from trainer.config import TrainConfig

_ALIGNED_PARAMETER, _ALIGNED_BUCKET = 64, 128
Span = tuple[int, int]
"""First element and one past the last."""


@dataclass(frozen=True, slots=True)
class Buffer:
    """Where the parameters of one model chunk lie in megatron-core's flat buffer."""

    parameters: tuple[Span, ...]
    """In the buffer's order, which is the model's from its end."""
    buckets: tuple[Span, ...]

    @property
    def numel(self) -> int:
        """Elements with padding."""
        return self.buckets[-1][1] if self.buckets else 0

    def updated_by(self, dp_rank: int, dp_size: int) -> int:
        """Elements of parameters, without padding, that the distributed optimizer of one rank updates."""
        total = 0
        for start, stop in self.buckets:
            share = (stop - start) // dp_size
            mine = (start + dp_rank * share, start + (dp_rank + 1) * share)
            total += sum(_overlap(mine, span) for span in self.parameters)
        return total


@dataclass(frozen=True, slots=True, kw_only=True)
class States:
    """Bytes of what lasts from step to step on the ranks of one pipeline stage. Tensor-parallel ranks are alike."""

    parameters: int
    """Elements, padding rows of the vocabulary among them."""
    weight_bytes: int
    gradient_bytes: int
    optimizer_bytes: tuple[int, ...]
    """By data-parallel rank."""


def element_bytes(config: TrainConfig) -> int:
    """Bytes of a weight or an activation."""
    return 2 if config.bf16 or config.fp16 else 4


def states(config: TrainConfig, model: LlamaConfig, stage: int, dp_size: int) -> States:
    """What the ranks of pipeline stage `stage` hold.

    Raises:
        UsageError: The architecture does not divide among the ranks.
    """
    chunks = config.layout.chunks(model.num_layers)[stage]
    sizes = [parameter_sizes(config, model, layers) for layers in chunks]
    buffers = [
        lay_out(
            part, _bucket_size(config, stage, number, dp_size), dp_size if config.use_distributed_optimizer else None
        )
        for number, part in enumerate(sizes)
    ]
    parameters = sum(map(sum, sizes))
    if config.mode == "zero":
        return _zero_states(config, parameters, dp_size)
    numel = sum(buffer.numel for buffer in buffers)
    a_state = 8 if element_bytes(config) == 4 else 12
    if config.use_distributed_optimizer:
        updated = [sum(buffer.updated_by(rank, dp_size) for buffer in buffers) for rank in range(dp_size)]
    else:
        updated = [parameters] * dp_size
    return States(
        parameters=parameters,
        weight_bytes=numel * element_bytes(config),
        gradient_bytes=numel * 4,
        optimizer_bytes=tuple(count * a_state for count in updated),
    )


def _zero_states(config: TrainConfig, parameters: int, dp_size: int) -> States:
    share = _up(parameters, dp_size) // dp_size
    return States(
        parameters=parameters,
        weight_bytes=(share if config.zero_stage == 3 else parameters) * element_bytes(config),
        gradient_bytes=(share if config.zero_stage >= 2 else parameters) * 4,
        optimizer_bytes=(12 * share,) * dp_size,
    )


def parameter_sizes(config: TrainConfig, model: LlamaConfig, layers: range) -> list[int]:
    """Elements of each parameter of a model chunk on one tensor-parallel rank, in the model's order.

    The chunk of the first layer has the embedding, that of the last layer the final norm and the head.
    """
    tp = config.tensor_model_parallel_size
    padded = model.padded_vocab_size(tp, config.make_vocab_size_divisible_by)
    first, last = 0 in layers, model.num_layers - 1 in layers
    held = [
        rule
        for name, rule in sharding(model).items()
        if (rule.layer in layers if rule.layer is not None else first if name == EMBEDDING else last)
    ]
    return [math.prod(rule.view(0, tp, padded).shape) for rule in held]


def lay_out(sizes: Sequence[int], bucket_size: int | None, dp_size: int | None) -> Buffer:
    """The buffer of parameters of `sizes` elements, given in the model's order.

    Args:
        sizes: Elements of each parameter.
        bucket_size: Elements after which a bucket ends with the parameter at hand; None: one bucket.
        dp_size: Data-parallel ranks that a distributed optimizer splits it among; None: it does not, nothing is padded.
    """
    before_parameter, after_bucket = (
        (1, 1) if dp_size is None else (_ALIGNED_PARAMETER, math.lcm(dp_size, _ALIGNED_BUCKET))
    )
    parameters, ends, at = [], [0], 0
    for size in reversed(sizes):
        at = _up(at, before_parameter)
        parameters.append((at, at + size))
        at += size
        if bucket_size is not None and at - ends[-1] >= bucket_size:
            at = _up(at, after_bucket)
            ends.append(at)
    if at > ends[-1]:
        ends.append(_up(at, after_bucket))
    return Buffer(tuple(parameters), tuple(pairwise(ends)))


def _bucket_size(config: TrainConfig, stage: int, chunk: int, dp_size: int) -> int | None:
    """Only gradients that travel while the backward pass still runs are cut into buckets, and only where that pass is
    the step's last: in the first chunk of the first stage.
    """
    if not config.overlap_grad_reduce or stage or chunk:
        return None
    return max(40_000_000, 1_000_000 * dp_size)


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _overlap(one: Span, other: Span) -> int:
    return max(0, min(one[1], other[1]) - max(one[0], other[0]))
