"""What the backward pass needs of the forward pass, by formula: bytes of the tensors that autograd keeps.

One layer, one micro-batch, on one tensor-parallel rank:

    s b [ (4 h e + 8) p + (3 q + 3 k + 3 f) e / t + 4 n / t ]

s `seq_length`, b `micro_batch_size`, h hidden size, n query heads, q = n d channels of all query heads, k = g d of all
key heads (and as many of all value heads), f feed-forward channels, e bytes of an element, t tensor-parallel size, p
1 / t under sequence parallelism, else 1. In the layer's order:

    h e p        the residual stream, input of the first norm    + 4 p   that norm's fp32 factor of each token
    h e p        the norm's output, input of linear_qkv (under sequence parallelism the part that is gathered again)
    (q + 2 k) e / t    linear_qkv's output: the values are a view of it and keep it whole
    (q + k) e / t      queries and keys after their rotation (whose backward needs only the tables)
    q e / t            attention's output, which linear_proj shares           + 4 n / t   fp32 log-sum-exp of each row
    h e p        the residual stream, input of the second norm   + 4 p
    h e p        the norm's output, input of linear_fc1
    2 f e / t    linear_fc1's output: gate and up
    f e / t      SwiGLU's output, input of linear_fc2

There is no s x s matrix (fused attention), no dropout mask and no bias. The last stage keeps besides, of one
micro-batch at a time, s b [ h e p + 4 p + h e + v e / t ]: the final norm's input and factor, its output (whole: the
head gathers it), and one buffer of the logits of v padded entries, which becomes their gradient.

Recomputation keeps less and adds the working set of what is computed again, once:

    selective core_attn    without the 4 n / t: the output stays, as linear_proj's input; working set: it and a second
                           output, s b (q e + 4 n) / t
    selective mlp          without the 3 f e / t; working set: s b 3 f e / t
    full uniform, N        s b h e p for each group of N layers; working set: a group's layers
    full block, N          s b h e p for each of a chunk's first N layers, the others as without; working set: a layer

Times the forward passes whose backward has still to come, at most: min(P - i, m) on stage i of P with m micro-batches
(1F1B), min(2 (P - i - 1) + (c - 1) P + 1, c m) of a chunk each where every stage has c chunks (interleaved).

Not counted: tensors that live only within an operation (gradients on their way back, gathered inputs, the loss's fp32
pieces), token ids and masks, the rotary tables, what a memory allocator loses.

Source: Korthikanti et al., "Reducing Activation Recomputation in Large Transformer Models",
    https://arxiv.org/abs/2205.05198, section 4 (s b h (34 + 5 a s / h) there: 16 bit, GELU, dropout, a softmax that is
    kept); schedules: Narayanan et al., https://arxiv.org/abs/2104.04473, section 2.2, with megatron-core's numbers of
    warm-up passes.
"""

from ckpt_tools import LlamaConfig

from trainer.config import TrainConfig
from trainer.memory import element_bytes


def stage_bytes(config: TrainConfig, model: LlamaConfig, stage: int, num_microbatches: int) -> int:
    """The most that activations take on a rank of pipeline stage `stage`."""
    chunks = config.layout.chunks(model.num_layers)[stage]
    kept = max(chunk_bytes(config, model, len(layers)) for layers in chunks)
    passes = passes_in_flight(config, stage, len(chunks), num_microbatches)
    longest = max(map(len, chunks))
    last = head_bytes(config, model) if stage == config.pipeline_model_parallel_size - 1 else 0
    return passes * kept + working_set_bytes(config, model, longest) + last


def passes_in_flight(config: TrainConfig, stage: int, num_chunks: int, num_microbatches: int) -> int:
    """Forward passes of a model chunk that wait for their backward pass, at most."""
    stages = config.pipeline_model_parallel_size
    if num_chunks == 1:
        return min(stages - stage, num_microbatches)
    warmup = 2 * (stages - stage - 1) + (num_chunks - 1) * stages
    return min(warmup + 1, num_chunks * num_microbatches)


def layer_bytes(config: TrainConfig, model: LlamaConfig) -> int:
    """What one layer keeps of one micro-batch where nothing is computed again."""
    beside_norms = (
        _tokens(config) * (4 * model.hidden_size * element_bytes(config) + 8) // _split_along_sequence(config)
    )
    return beside_norms + _attention(config, model) + _log_sum_exp(config, model) + _mlp(config, model)


def chunk_bytes(config: TrainConfig, model: LlamaConfig, num_layers: int) -> int:
    """What `num_layers` layers keep of one micro-batch until their backward pass."""
    whole = layer_bytes(config, model)
    if config.recompute_granularity == "full":
        count = config.recompute_num_layers
        if config.recompute_method == "uniform":
            return -(-num_layers // count) * hidden_bytes(config, model)
        again = min(count, num_layers)
        return again * hidden_bytes(config, model) + (num_layers - again) * whole
    return num_layers * (whole - sum(spared for spared, _ in _recomputed(config, model)))


def working_set_bytes(config: TrainConfig, model: LlamaConfig, num_layers: int) -> int:
    """What exists besides while layers are computed again."""
    if config.recompute_granularity == "full":
        together = min(config.recompute_num_layers, num_layers) if config.recompute_method == "uniform" else 1
        return together * layer_bytes(config, model) - hidden_bytes(config, model)  # the first input is the kept one
    return max((needed for _, needed in _recomputed(config, model)), default=0)


def head_bytes(config: TrainConfig, model: LlamaConfig) -> int:
    """What the final norm, the head and the loss keep of one micro-batch."""
    tp = config.tensor_model_parallel_size
    e, h = element_bytes(config), model.hidden_size
    logits = model.padded_vocab_size(tp, config.make_vocab_size_divisible_by) // tp * e
    return _tokens(config) * (h * e + 4) // _split_along_sequence(config) + _tokens(config) * (h * e + logits)


def hidden_bytes(config: TrainConfig, model: LlamaConfig) -> int:
    """The residual stream of one micro-batch, as layers and stages hand it on."""
    return _tokens(config) * model.hidden_size * element_bytes(config) // _split_along_sequence(config)


def _recomputed(config: TrainConfig, model: LlamaConfig) -> list[tuple[int, int]]:
    """Of each part that selective recomputation names: what a layer spares, and what computing it again needs."""
    if config.recompute_granularity != "selective":
        return []
    rows = _log_sum_exp(config, model)
    queries = _tokens(config) * model.num_attention_heads * model.kv_channels * element_bytes(config)
    mlp = _mlp(config, model)
    parts = {"core_attn": (rows, rows + queries // config.tensor_model_parallel_size), "mlp": (mlp, mlp)}
    return [parts[module] for module in sorted(set(config.recompute_modules))]


def _attention(config: TrainConfig, model: LlamaConfig) -> int:
    channels = 3 * (model.num_attention_heads + model.num_query_groups) * model.kv_channels
    return _tokens(config) * channels * element_bytes(config) // config.tensor_model_parallel_size


def _log_sum_exp(config: TrainConfig, model: LlamaConfig) -> int:
    return _tokens(config) * 4 * model.num_attention_heads // config.tensor_model_parallel_size


def _mlp(config: TrainConfig, model: LlamaConfig) -> int:
    return _tokens(config) * 3 * model.ffn_hidden_size * element_bytes(config) // config.tensor_model_parallel_size


def _tokens(config: TrainConfig) -> int:
    return config.micro_batch_size * config.seq_length


def _split_along_sequence(config: TrainConfig) -> int:
    return config.tensor_model_parallel_size if config.sequence_parallel else 1
