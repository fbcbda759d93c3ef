"""One rank of megatron-core's own GPTModel on a CPU: loads our file strictly, computes, saves its own.

    RANK=0 WORLD_SIZE=2 ... python megatron_core_rank.py MEGATRON_FOLDER TOKENS.pt OUT {float32,bfloat16} PP CHUNKS

PP pipeline stages hold CHUNKS chunks each (of a virtual pipeline, where there are several); the other ranks are
tensor-parallel. OUT/logits_R.pt holds a last stage's share of the logits, OUT/torch_dist what megatron-core's
dist_checkpointing wrote of the weights, cast to the type named.
"""

import contextlib
import os
import sys
from pathlib import Path

import torch


def pretend_cuda():
    """Names of torch.cuda that megatron-core calls without asking, for this process alone."""
    torch.cuda.current_device = lambda: torch.device("cpu")
    torch.cuda.synchronize = lambda *_: None
    torch.cuda.empty_cache = lambda: None
    torch.Tensor.cuda = lambda self, *_, **__: self


def build(args, layer_spec, vp_stage=None):
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.transformer import TransformerConfig

    config = TransformerConfig(
        num_layers=args.num_layers,
        hidden_size=args.hidden_size,
        ffn_hidden_size=args.ffn_hidden_size,
        num_attention_heads=args.num_attention_heads,
        num_query_groups=args.num_query_groups,
        kv_channels=args.kv_channels,
        normalization=args.normalization,
        layernorm_epsilon=args.norm_epsilon,
        gated_linear_unit=args.swiglu,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=args.add_bias_linear,
        tensor_model_parallel_size=args.tensor_model_parallel_size,
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=args.virtual_pipeline_model_parallel_size,
        pipeline_dtype=torch.float32,
        use_cpu_initialization=True,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        apply_rope_fusion=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
    )
    return GPTModel(
        config,
        layer_spec,
        vocab_size=args.padded_vocab_size,
        max_sequence_length=args.max_position_embeddings,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        position_embedding_type=args.position_embedding_type,
        rotary_percent=args.rotary_percent,
        rotary_base=args.rotary_base,
        parallel_output=True,
        pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
        post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
        vp_stage=vp_stage,
    )


def load(model, state):
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected, unexpected
    assert all(name.endswith("_extra_state") for name in missing), missing
    return model.eval()


def run_pipeline(chunks, tokens, parallel_state):
    """The output of the last chunk: each stage's first one, then each stage's second one, and so on."""
    stages, stage = (
        parallel_state.get_pipeline_model_parallel_world_size(),
        parallel_state.get_pipeline_model_parallel_rank(),
    )
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    mask = torch.ones(1, 1, tokens.shape[1], tokens.shape[1]).triu(1).bool()
    output = None
    for turn, model in enumerate(chunks):
        if stage or turn:
            hidden = torch.empty(tokens.shape[1], tokens.shape[0], model.config.hidden_size)
            torch.distributed.recv(hidden, parallel_state.get_pipeline_model_parallel_prev_rank())
            model.set_input_tensor(hidden)
        output = model(tokens, positions, mask)
        if stage < stages - 1 or turn < len(chunks) - 1:
            torch.distributed.send(output, parallel_state.get_pipeline_model_parallel_next_rank())
    return output


def main(source, tokens_file, out, dtype, pp, chunks):
    rank, world, pp, chunks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), int(pp.name), int(chunks.name)
    torch.set_num_threads(1)
    pretend_cuda()
    from megatron.core import dist_checkpointing, parallel_state
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    CudaRNGStatesTracker.fork = lambda *_: contextlib.nullcontext()  # there is no dropout to draw for

    torch.distributed.init_process_group("gloo")
    virtual = {"virtual_pipeline_model_parallel_size": chunks} if chunks > 1 else {}
    parallel_state.initialize_model_parallel(world // pp, pp, **virtual)
    tp_rank, stage = parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_pipeline_model_parallel_rank()
    name = f"mp_rank_{tp_rank:02d}" + (f"_{stage:03d}" if pp > 1 else "")
    saved = torch.load(source / f"iter_0000001/{name}/model_optim_rng.pt", weights_only=False)
    spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    if chunks > 1:
        models = [load(build(saved["args"], spec, v), saved[f"model{v}"]) for v in range(chunks)]
    else:
        models = [load(build(saved["args"], spec), saved["model"])]
    with torch.no_grad():
        logits = run_pipeline(models, torch.load(tokens_file), parallel_state)
    if stage == pp - 1:
        torch.save(logits, out / f"logits_{rank}.pt")
    if pp == 1:
        save_distributed(models[0].to(getattr(torch, dtype.name)), out / "torch_dist", dist_checkpointing)
    torch.distributed.destroy_process_group()


def save_distributed(model, folder, dist_checkpointing):
    folder.mkdir(exist_ok=True)
    torch.distributed.barrier()
    metadata = {"singleton_local_shards": False}
    dist_checkpointing.save(model.sharded_state_dict(metadata=metadata), str(folder), content_metadata=metadata)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
