"""What a rank sends in one optimizer step, by formula: bytes that leave it in ring algorithms.

A ring over r ranks sends 2 (r - 1) / r of the buffer for an all-reduce, (r - 1) / r for an all-gather or a
reduce-scatter. With X = s b h e bytes of one micro-batch's hidden states, L layers of the rank, t tensor-parallel and
d data-parallel ranks:

    tensor parallel, each micro-batch and layer     4 all-reduces of X: after attention and feed-forward on the way
                                                    forward, at the inputs of linear_qkv and linear_fc1 on the way back
      with sequence parallelism                     4 all-gathers and 4 reduce-scatters of X instead, and 2 all-gathers
                                                    more: the inputs of linear_qkv and linear_fc1, for the weights'
                                                    gradients
      embedding, head                               an all-reduce of X each (with sequence parallelism an all-gather and
                                                    a reduce-scatter each); the loss: 12 bytes a token
      full recomputation                            the forward's half once more for layers that are computed again
    pipeline, each micro-batch and chunk            X to the next stage, X to the one before (with sequence parallelism
                                                    1 / t of it); the first and the last chunk have one neighbour
    data parallel, once a step                      an all-reduce of the fp32 gradients; with the distributed optimizer
                                                    a reduce-scatter of them and an all-gather of the weights
      ZeRO                                          the same two; from stage 2 on the gradients of each micro-batch;
                                                    under stage 3 the weights for each pass, forward and backward, and
                                                    once more for layers that are computed again

Not counted: what has a few numbers a step (norms, counts of tokens, the norm weights' gradients).

Source: Korthikanti et al., https://arxiv.org/abs/2205.05198, section 4.2; Rajbhandari et al., "ZeRO",
    https://arxiv.org/abs/1910.02054, section 7.
"""

from fractions import Fraction

from ckpt_tools import LlamaConfig

from trainer.activations import hidden_bytes
from trainer.config import TrainConfig
from trainer.memory import States, element_bytes


def tensor_parallel_bytes(config: TrainConfig, model: LlamaConfig, stage: int, num_microbatches: int) -> int:
    """What layers, embedding, head and loss exchange."""
    tokens = config.micro_batch_size * config.seq_length
    whole = tokens * model.hidden_size * element_bytes(config)
    chunks = config.layout.chunks(model.num_layers)[stage]
    layers = sum(map(len, chunks))
    forward, backward = (4, 6) if config.sequence_parallel else (4, 4)  # in halves of an all-reduce
    exchanged = layers * (forward + backward) + sum(_layers_again(config, len(chunk)) for chunk in chunks) * forward
    ends = (stage == 0) + (stage == config.pipeline_model_parallel_size - 1)
    last = 12 * tokens * 2 if stage == config.pipeline_model_parallel_size - 1 else 0
    return _sent((exchanged + 2 * ends) * whole + last, config.tensor_model_parallel_size) * num_microbatches


def pipeline_bytes(config: TrainConfig, model: LlamaConfig, stage: int, num_microbatches: int) -> int:
    """Hidden states to the next stage, and their gradients to the one before."""
    stages, chunks = config.pipeline_model_parallel_size, len(config.layout.chunks(model.num_layers)[stage])
    if stages == 1:
        return 0
    without = (stage == 0) + (stage == stages - 1)
    return (2 * chunks - without) * hidden_bytes(config, model) * num_microbatches


def data_parallel_bytes(config: TrainConfig, held: States, dp_size: int) -> int:
    """Gradients, and with the distributed optimizer or ZeRO the weights."""
    if config.mode == "zero":
        return _zero_bytes(config, held.parameters, dp_size)
    second = held.weight_bytes if config.use_distributed_optimizer else held.gradient_bytes
    return _sent(held.gradient_bytes + second, dp_size)


def _zero_bytes(config: TrainConfig, parameters: int, dp_size: int) -> int:
    num_microbatches = config.global_batch_size // (config.micro_batch_size * dp_size)
    reduced = num_microbatches if config.zero_stage >= 2 else 1
    passes = 3 if config.recompute_granularity == "full" else 2
    gathered = num_microbatches * passes if config.zero_stage == 3 else 1
    return _sent(parameters * (4 * reduced + element_bytes(config) * gathered), dp_size)


def _layers_again(config: TrainConfig, num_layers: int) -> int:
    if config.recompute_granularity != "full":
        return 0
    return num_layers if config.recompute_method == "uniform" else min(config.recompute_num_layers, num_layers)


def _sent(size: int, ranks: int) -> int:
    """Bytes that leave a rank when `size` go once round a ring."""
    return int(Fraction(size * (ranks - 1), ranks))
