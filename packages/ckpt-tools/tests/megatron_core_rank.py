"""One tensor-parallel rank of megatron-core's own GPTModel on a CPU: loads our file strictly, computes, saves its own.

    RANK=0 WORLD_SIZE=2 ... python megatron_core_rank.py MEGATRON_FOLDER TOKENS.pt OUT {float32,bfloat16}

OUT/logits_R.pt holds this rank's share of the logits, OUT/torch_dist what megatron-core's dist_checkpointing wrote of
the weights, cast to the type named last.
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


def build(args, layer_spec):
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
    )


def main(source, tokens_file, out, dtype):
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(1)
    pretend_cuda()
    from megatron.core import dist_checkpointing, parallel_state
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    CudaRNGStatesTracker.fork = lambda *_: contextlib.nullcontext()  # there is no dropout to draw for

    torch.distributed.init_process_group("gloo")
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=world)
    saved = torch.load(source / f"iter_0000001/mp_rank_{rank:02d}/model_optim_rng.pt", weights_only=False)
    model = build(saved["args"], get_gpt_layer_local_spec(normalization="RMSNorm"))
    missing, unexpected = model.load_state_dict(saved["model"], strict=False)
    assert not unexpected, unexpected
    assert all(name.endswith("_extra_state") for name in missing), missing
    model.eval()
    tokens = torch.load(tokens_file)
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    s = tokens.shape[1]
    mask = torch.ones(1, 1, s, s).triu(1).bool()
    with torch.no_grad():
        torch.save(model(tokens, positions, mask), out / f"logits_{rank}.pt")
    model.to(getattr(torch, dtype.name))
    folder = out / "torch_dist"
    folder.mkdir(exist_ok=True)
    torch.distributed.barrier()
    metadata = {"singleton_local_shards": False}
    dist_checkpointing.save(model.sharded_state_dict(metadata=metadata), str(folder), content_metadata=metadata)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
