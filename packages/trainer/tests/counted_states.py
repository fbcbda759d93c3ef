"""Run by every rank: the bytes that megatron-core's wrapper and optimizer really take, in several layouts, as JSON."""

import itertools
import json
import sys

import torch
from ckpt_tools import open_checkpoint
from llama_model import parallel

CASES = {
    "data parallel, fp32": (1, torch.float32, False, None),
    "data parallel, distributed optimizer, fp32": (1, torch.float32, True, None),
    "data parallel, distributed optimizer, bf16": (1, torch.bfloat16, True, None),
    "data parallel, distributed optimizer, buckets": (1, torch.bfloat16, True, 5000),
    "tensor parallel, bf16": (2, torch.bfloat16, False, None),
    "tensor parallel, distributed optimizer, bf16": (2, torch.bfloat16, True, None),
}
"""Name to tensor-parallel size, type, distributed optimizer, elements of a bucket."""


def counted(folder, tp, dtype, distributed, bucket_size):
    """What this rank holds after a step."""
    parallel.initialize(tensor_model_parallel_size=tp)
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    kinds = dict(params_dtype=dtype, bf16=dtype == torch.bfloat16)
    with open_checkpoint(folder) as checkpoint:
        model = parallel.build_model(checkpoint.config, transformer_options={"calculate_per_token_loss": True, **kinds})
    wrapping = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=distributed,
        overlap_grad_reduce=bucket_size is not None,
        bucket_size=bucket_size,
    )
    wrapped = DistributedDataParallel(model.config, wrapping, model)
    rules = OptimizerConfig(optimizer="adam", lr=1e-3, use_distributed_optimizer=distributed, **kinds)
    optimizer = get_megatron_optimizer(rules, [wrapped])
    wrapped.zero_grad_buffer()
    tokens = torch.arange(8).view(1, 8)
    wrapped(tokens, labels=tokens).sum().backward()
    wrapped.finish_grad_sync() if bucket_size is not None else wrapped.start_grad_sync()
    optimizer.step()
    said = {
        "weights": storage_bytes(model.parameters()),
        "gradients": storage_bytes(p.main_grad for p in model.parameters()),
        "moments": tensor_bytes(optimizer, ("exp_avg", "exp_avg_sq")),
        "masters": masters(optimizer, model),
        "buckets": [list(pair) for buffer in wrapped.buffers for pair in buffer.bucket_indices],
    }
    parallel.destroy()
    return said


def storage_bytes(tensors):
    """Bytes of what lies behind the tensors, padding among it, each storage once."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def tensor_bytes(optimizer, names):
    state = torch_optimizer(optimizer).state.values()
    return sum(values[name].nbytes for values in state for name in names)


def masters(optimizer, model):
    """Bytes of the fp32 copies that the optimizer updates; none where it updates the weights themselves."""
    mine = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    updated = itertools.chain.from_iterable(group["params"] for group in torch_optimizer(optimizer).param_groups)
    return sum(p.nbytes for p in updated if p.untyped_storage().data_ptr() not in mine)


def torch_optimizer(optimizer):
    inner = getattr(optimizer, "chained_optimizers", [optimizer])
    assert len(inner) == 1
    return inner[0].optimizer


if __name__ == "__main__":
    torch.distributed.init_process_group("gloo")  # once: the cases' groups come and go within it
    said = {name: counted(sys.argv[1], *case) for name, case in CASES.items()}
    every = [None, None]
    torch.distributed.all_gather_object(every, said)
    if torch.distributed.get_rank() == 0:
        print(json.dumps(every))
    torch.distributed.destroy_process_group()
