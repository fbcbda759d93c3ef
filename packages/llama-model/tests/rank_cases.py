"""What the ranks of the parallel tests run; imported by their processes, which adapt megatron-core for good."""

import os
from pathlib import Path

import torch
from ckpt_tools import Layout, open_checkpoint
from llama_model import generate, load_weights, parallel
from torch import distributed

LR, WEIGHT_DECAY, BETAS, EPS, CLIP = 3e-3, 0.1, (0.9, 0.95), 1e-6, 0.5
LAYERS = 4  # of every model here


class Groups:
    """megatron-core's groups for a case, taken down after it."""

    def __init__(self, layout, **options):
        chunks = len(layout.chunks(LAYERS)[0])
        self.sizes = dict(
            tensor_model_parallel_size=layout.tensor_model_parallel_size,
            pipeline_model_parallel_size=layout.pipeline_model_parallel_size,
            virtual_pipeline_model_parallel_size=chunks if chunks > 1 else None,
            **options,
        )

    def __enter__(self):
        parallel.initialize(**self.sizes)

    def __exit__(self, *_):
        parallel.destroy()


def tensor_parallel(size):
    return Groups(Layout(tensor_model_parallel_size=size))


def build(folder, divisible_by=1, recompute=None, **options):
    with open_checkpoint(folder) as checkpoint:
        model = parallel.build_model(
            checkpoint.config,
            transformer_options=options,
            make_vocab_size_divisible_by=divisible_by,
            recompute=recompute,
        )
        load_weights(model, checkpoint)
    return model


def build_chunks(folder, layout, recompute=None, **options):
    """This rank's chunks, none of whose weights is drawn and then overwritten."""
    options = {"perform_initialization": False, **options}
    with open_checkpoint(folder) as checkpoint:
        chunks = parallel.build_chunks(checkpoint.config, layout, transformer_options=options, recompute=recompute)
        for chunk in chunks:
            load_weights(chunk, checkpoint)
    return chunks


def gradient_errors(model, gradients, grads):
    """Each gradient's largest difference from its shard of the expected ones, relative to their largest."""
    errors = {}
    with open_checkpoint(gradients) as expected:
        for name, grad in grads.items():
            size, rank = model.tensor_model_parallel_size, model.tensor_model_parallel_rank
            name = model.canonical_name(name)
            shard = expected.read_shard(name, rank, size, padded_vocab_size=model.padded_vocab_size)
            shard = torch.from_numpy(shard)
            if "embed" in name or "output_layer" in name:  # rows of padding never have a gradient
                first = rank * len(shard)
                shard[max(0, expected.config.vocab_size - first) :] = 0
            scale = torch.from_numpy(expected.read(name)).abs().max()
            errors[name] = ((grad - shard).abs().max() / scale).item()
    return errors


def parity(tp, folder, gradients, tokens, labels, divisible_by=1, **options):
    """Logits and loss as every rank has them, and how far its gradients are off."""
    with tensor_parallel(tp):
        model = build(folder, divisible_by, **options)
        with torch.no_grad():
            logits = model(tokens)
        loss = model(tokens, labels=labels)
        loss.sum().backward()
        return logits.numpy(), loss.detach().numpy(), gradient_errors(model, gradients, summed_gradients(model))


def summed_gradients(model):
    """Every gradient, those of parameters that saw parts of the sequence summed, as finalize_model_grads does."""
    for parameter in model.parameters():
        if getattr(parameter, "sequence_parallel", False):
            distributed.all_reduce(parameter.grad)
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def loss_and_gradients(tp, folder, tokens, inputs, **options):
    """The loss of each token, and every gradient by its name; `inputs` go to the model."""
    with tensor_parallel(tp):
        model = build(folder, **options)
        loss = model(tokens, **inputs)
        loss.sum().backward()
        return loss.detach(), summed_gradients(model)


def shared_head_loss(x, weight, labels, factors, dtype, padding=0):
    """`head_loss` over a vocabulary that the ranks share: losses, gradient of x, gradient of this rank's rows."""
    from llama_model.parallel.loss import head_loss

    rank, size = distributed.get_rank(), distributed.get_world_size()
    whole = torch.cat((weight, torch.full((padding, weight.shape[1]), 1e4)))
    rows = len(whole) // size
    x = x.to(dtype).requires_grad_()
    mine = whole[rank * rows : (rank + 1) * rows].to(dtype).requires_grad_()
    true_rows = max(0, min(rows, len(weight) - rank * rows))
    loss = head_loss(x, mine, labels, true_rows=true_rows, first_row=rank * rows, group=distributed.group.WORLD)
    (loss * factors.to(loss.dtype)).sum().backward()
    distributed.all_reduce(x.grad)
    return loss.detach(), x.grad, mine.grad


def fresh(layout, config, seed):
    """This rank's fresh weights under their canonical names."""
    with Groups(layout, seed=seed):
        chunks = parallel.build_chunks(config, layout)
        return {
            chunk.canonical_name(name): parameter.detach()
            for chunk in chunks
            for name, parameter in chunk.named_parameters()
        }


def timeouts(timeout):
    """How long a collective may take in megatron-core's groups."""
    with Groups(Layout(pipeline_model_parallel_size=2), timeout=timeout):
        from megatron.core import parallel_state

        groups = (
            parallel_state.get_pipeline_model_parallel_group(),
            parallel_state.get_tensor_model_parallel_group(),
            parallel_state.get_data_parallel_group(),
        )
        return [group._get_backend(torch.device("cpu")).options._timeout for group in groups]


def padding(tp, folder, tokens, labels, divisible_by, honour=True):
    """Loss and logits with padding rows that would win every softmax."""
    with tensor_parallel(tp):
        model = build(folder, divisible_by)
        rows = model.output_layer.weight.shape[0]
        true = max(0, min(rows, model.architecture.vocab_size - model.tensor_model_parallel_rank * rows))
        with torch.no_grad():
            model.output_layer.weight[true:] = 1e4
            model.embedding.word_embeddings.weight[true:] = 1e4
        if not honour:
            model.output_layer._true_rows = rows
        loss = model(tokens, labels=labels)
        loss.sum().backward()
        padding_grad = model.output_layer.weight.grad[true:].abs().sum().item()
        return model(tokens).detach().numpy(), loss.detach().numpy(), padding_grad, rows - true


def continuations(tp, folder, prompts, new, **options):
    with tensor_parallel(tp):
        model = build(folder).eval()
        out = [[] for _ in prompts]
        for step in generate(model, prompts, max_new_tokens=new, **options):
            for row, token in zip(step.rows, step.tokens, strict=True):
                out[row].append(token)
        return out


# --- training ----------------------------------------------------------------------------------------------------


class Trainer:
    """megatron-core's own data-parallel wrapper, optimizer and schedule around our model."""

    def __init__(self, folder, layout, *, distributed_optimizer=False, overlap=False, dtype="float32", **options):
        from megatron.core import parallel_state
        from megatron.core.distributed import (
            DistributedDataParallel,
            DistributedDataParallelConfig,
            finalize_model_grads,
        )
        from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

        kinds = dict(params_dtype=getattr(torch, dtype), bf16=dtype == "bfloat16", fp16=dtype == "float16")
        self.dp_size = parallel_state.get_data_parallel_world_size()
        self.dp_rank = parallel_state.get_data_parallel_rank()
        self.dp_group = parallel_state.get_data_parallel_group()
        self.chunks = build_chunks(folder, layout, calculate_per_token_loss=True, **kinds, **options)
        self.options = self.chunks[0].config
        wrapping = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            use_distributed_optimizer=distributed_optimizer,
            overlap_grad_reduce=overlap,
        )
        self.wrapped = [
            DistributedDataParallel(self.options, wrapping, chunk, disable_bucketing=number > 0)
            for number, chunk in enumerate(self.chunks)
        ]
        rules = OptimizerConfig(
            optimizer="adam", lr=LR, min_lr=LR, weight_decay=WEIGHT_DECAY, adam_beta1=BETAS[0], adam_beta2=BETAS[1],
            adam_eps=EPS, clip_grad=CLIP, use_distributed_optimizer=distributed_optimizer, initial_loss_scale=2.0**8,
            **kinds,
        )  # fmt: skip
        self.optimizer = get_megatron_optimizer(rules, self.wrapped)
        for group in self.optimizer.param_groups:
            group["weight_decay"] = WEIGHT_DECAY * group["wd_mult"]
        self.options.finalize_model_grads_func = finalize_model_grads
        if overlap:
            self.options.no_sync_func = self.wrapped[0].no_sync
        self.options.grad_scale_func = self.optimizer.scale_loss

    def step(self, tokens, labels):
        """One step over a global batch [rows, s], one row a micro-batch: (loss a token, gradient norm)."""
        from megatron.core.pipeline_parallel import get_forward_backward_func

        rows = range(self.dp_rank, len(tokens), self.dp_size)
        mine = [(tokens[row : row + 1], labels[row : row + 1]) for row in rows]
        for chunk in self.wrapped:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        reports = get_forward_backward_func()(
            forward_step_func=forward_step, data_iterator=[iter(mine) for _ in self.wrapped], model=self.wrapped,
            num_microbatches=len(mine), seq_length=tokens.shape[1], micro_batch_size=1,
        )  # fmt: skip
        updated, norm, _ = self.optimizer.step()
        assert updated
        total = torch.stack([report["sums"] for report in reports]).sum(0) if reports else torch.zeros(2)
        distributed.all_reduce(total)
        return (total[0] / total[1]).item(), float(norm)

    def state(self, is_loading):
        from megatron.core import parallel_state

        metadata = {
            "distrib_optim_sharding_type": "fully_reshardable",
            "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
        }
        model = self.chunks[0].sharded_state_dict(metadata=metadata)
        return {"model": model, "optimizer": self.optimizer.sharded_state_dict(model, is_loading, metadata=metadata)}


def forward_step(batches, model):
    tokens, labels = next(batches)

    def sums(loss):
        count = (labels != -100).sum().int()
        return loss.float().sum(), count, {"sums": torch.stack([loss.detach().float().sum(), count.float()])}

    return model(tokens, labels=labels), sums


def train(layout, folder, batches, weights, **options):
    """Loss and gradient norm of every step; how far the weights are from the expected ones at the end."""
    with Groups(layout):
        trainer = Trainer(folder, layout, **options)
        history = [trainer.step(*batch) for batch in batches]
        errors = {}
        with open_checkpoint(weights) as expected:
            for chunk in trainer.chunks:
                errors |= weight_errors(chunk, expected)
        return history, errors


def weight_errors(model, expected):
    """How far each parameter is from its shard of the expected ones."""
    errors = {}
    size, rank = model.tensor_model_parallel_size, model.tensor_model_parallel_rank
    for name, parameter in model.named_parameters():
        name = model.canonical_name(name)
        shard = torch.from_numpy(expected.read_shard(name, rank, size))
        true = len(shard)
        if "embed" in name or "output_layer" in name:  # padding rows are never trained
            true = min(true, expected.config.vocab_size - rank * true)
        errors[name] = (parameter.detach().float() - shard)[:true].abs().max().item()
    return errors


def resume(tp, folder, batches, home, **options):
    """Whether training goes on from a distributed checkpoint bit for bit, the optimizer's state with it."""
    from torch.distributed import barrier

    with tensor_parallel(tp):
        from megatron.core import dist_checkpointing

        half = len(batches) // 2
        layout = Layout(tensor_model_parallel_size=tp)
        straight = Trainer(folder, layout, **options)
        for batch in batches[:half]:
            straight.step(*batch)
        if distributed.get_rank() == 0:
            os.makedirs(home)
        barrier()
        dist_checkpointing.save(straight.state(is_loading=False), home)
        after = [straight.step(*batch) for batch in batches[half:]]
        resumed = Trainer(folder, layout, **options)
        state = dist_checkpointing.load(resumed.state(is_loading=True), home)
        resumed.chunks[0].load_state_dict(state["model"])
        with torch.no_grad():
            resumed.optimizer.load_state_dict(state["optimizer"])
        again = [resumed.step(*batch) for batch in batches[half:]]
        pairs = zip(straight.chunks[0].parameters(), resumed.chunks[0].parameters(), strict=True)
        return after == again, all(torch.equal(a, b) for a, b in pairs)


# --- checkpoints ---------------------------------------------------------------------------------------------------


def save(tp, folder, home, divisible_by=1):
    """Writes the model as megatron-core's distributed checkpoint; returns the names of its tensors and objects."""
    with tensor_parallel(tp):
        from megatron.core import dist_checkpointing

        model = build(folder, divisible_by)
        if distributed.get_rank() == 0:
            Path(home).mkdir()
        distributed.barrier()
        state = parallel.sharded_state_dict(model)
        keys = sorted({entry.key for entry in state.values()})
        dist_checkpointing.save(state, str(home))
        return keys


def gpt_model(config, vocab):
    """megatron-core's own GPTModel of the same architecture."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer.transformer_config import TransformerConfig

    options = TransformerConfig(
        num_layers=config.num_layers, hidden_size=config.hidden_size, ffn_hidden_size=config.ffn_hidden_size,
        num_attention_heads=config.num_attention_heads, num_query_groups=config.num_query_groups,
        layernorm_epsilon=config.layernorm_epsilon, normalization="RMSNorm", gated_linear_unit=True,
        activation_func=torch.nn.functional.silu, add_bias_linear=False, hidden_dropout=0.0, attention_dropout=0.0,
        use_cpu_initialization=True, bias_activation_fusion=False, bias_dropout_fusion=False,
        masked_softmax_fusion=False, gradient_accumulation_fusion=False, persist_layer_norm=False,
        apply_rope_fusion=False, cuda_graph_scope=[],
        tensor_model_parallel_size=torch.distributed.get_world_size(_tp_group()),
    )  # fmt: skip
    return GPTModel(
        options, get_gpt_layer_local_spec(normalization="RMSNorm"), vocab, config.max_position_embeddings,
        share_embeddings_and_output_weights=False, position_embedding_type="rope",
        rotary_base=int(config.rotary_base),
    )  # fmt: skip


def _tp_group():
    from megatron.core import parallel_state

    return parallel_state.get_tensor_model_parallel_group()


def both_ways(tp, folder, ours, theirs, tokens, divisible_by=1):
    """GPTModel loads our folder strictly and computes; what it saves loads strictly into a fresh model of ours.

    Returns GPTModel's logits, ours after the way back, the keys that GPTModel saves, and whether it had to learn.
    """
    with tensor_parallel(tp):
        from megatron.core import dist_checkpointing
        from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region as gather

        with open_checkpoint(folder) as checkpoint:
            config = checkpoint.config
        gpt = gpt_model(config, config.padded_vocab_size(tp, divisible_by)).eval()
        s = tokens.shape[1]
        positions, mask = torch.arange(s)[None].expand_as(tokens), torch.ones(1, 1, s, s).triu(1).bool()
        with torch.no_grad():
            fresh = gather(gpt(tokens, positions, mask))[..., : config.vocab_size]
            state = dist_checkpointing.load(gpt.sharded_state_dict(), str(ours), strict="raise_all")
            gpt.load_state_dict(state, strict=True)
            loaded = gather(gpt(tokens, positions, mask))[..., : config.vocab_size]
        if distributed.get_rank() == 0:
            Path(theirs).mkdir()
        distributed.barrier()
        saved = gpt.sharded_state_dict()
        keys = sorted({entry.key for entry in saved.values()})
        dist_checkpointing.save(saved, str(theirs))
        model = parallel.build_model(config, make_vocab_size_divisible_by=divisible_by)
        state = dist_checkpointing.load(parallel.sharded_state_dict(model), str(theirs), strict="raise_all")
        model.load_state_dict(state, strict=True)
        with torch.no_grad():
            back = model(tokens)
        return loaded.numpy(), back.numpy(), keys, (fresh - loaded).abs().max().item()


def refused(call):
    """The message of the RequestError that a mistaken use of the package ends in."""
    from ckpt_tools import LlamaConfig
    from llama_model import RequestError

    small = dict(num_layers=2, hidden_size=16, ffn_hidden_size=24, num_attention_heads=4, kv_channels=4, vocab_size=9)
    config = LlamaConfig(num_query_groups=2, **small)
    calls = {
        "groups": lambda: parallel.build_model(LlamaConfig(num_query_groups=1, **small)),
        "fixed": lambda: parallel.build_model(config, transformer_options={"hidden_size": 32}),
        "unheeded": lambda: parallel.build_model(config, transformer_options={"recompute_granularity": "full"}),
        "another layout": lambda: parallel.build_chunks(config, Layout()),
    }
    try:
        with tensor_parallel(2):
            calls[call]()
    except RequestError as error:
        return str(error)
    return None


def three_of_two():
    """The message of asking two processes for a layout of three."""
    from llama_model import RequestError

    try:
        parallel.initialize(tensor_model_parallel_size=3)
    except RequestError as error:
        return str(error)
    return None


def virtual_of_one_stage():
    """The message of asking for two chunks of a stage where there is no pipeline."""
    from llama_model import RequestError

    try:
        parallel.initialize(virtual_pipeline_model_parallel_size=2)
    except RequestError as error:
        return str(error)
    return None
