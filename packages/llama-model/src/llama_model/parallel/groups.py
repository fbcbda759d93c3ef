"""Process groups and seeds: from torchrun's variables to megatron-core's parallel state, and back to nothing."""

import os
from datetime import timedelta

import torch
from npu_kernels import Device
from npu_kernels import device as find_device
from torch import distributed
from torch._C._distributed_c10d import HashStore

from llama_model.errors import RequestError
from llama_model.parallel.adaptor import adapt
from llama_model.parallel.host_memory import keep_freed_memory

_made_here = False
"""Whether the process group was made by `initialize`, and so is `destroy`'s to end."""


def initialize(
    *,
    tensor_model_parallel_size: int = 1,
    pipeline_model_parallel_size: int = 1,
    virtual_pipeline_model_parallel_size: int | None = None,
    device: Device | None = None,
    seed: int = 1234,
    timeout: timedelta | None = None,
) -> Device:
    """The device, after everything that megatron-core wants at a start: adaptor, process groups, seeds.

    The world comes from torchrun's variables (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT); without them it
    is this process alone. A process group that exists already is used. On a CPU, see `keep_freed_memory`.

    Args:
        tensor_model_parallel_size: Ranks that share each layer.
        pipeline_model_parallel_size: Stages; what is left of the world is data parallel.
        virtual_pipeline_model_parallel_size: Model chunks of each stage in an interleaved schedule; none unless given.
        device: Where this rank computes; the machine's accelerator unless given. Its current chip becomes LOCAL_RANK.
        seed: Of torch's generator, the same on all ranks, and of megatron-core's, one per tensor-parallel rank.
        timeout: How long a collective may take before it fails, in every group that is made here; torch's and
            megatron-core's own defaults unless given.

    Raises:
        RequestError: The world does not divide into the layout, or a virtual pipeline has no stages.
        ModelError: megatron.core was imported too early; see `adapt`.
    """
    device = find_device() if device is None else device
    adapt(device)
    if device.type == "cpu":
        keep_freed_memory()
    device.set_current(int(os.environ.get("LOCAL_RANK", "0")))
    _join_world(device, timeout)
    world = distributed.get_world_size()
    part = tensor_model_parallel_size * pipeline_model_parallel_size
    if world % part:
        destroy()
        raise RequestError(
            f"{world} processes do not divide into tensor_model_parallel_size {tensor_model_parallel_size} x "
            f"pipeline_model_parallel_size {pipeline_model_parallel_size} = {part}"
        )
    if virtual_pipeline_model_parallel_size is not None and pipeline_model_parallel_size == 1:
        destroy()
        raise RequestError(
            f"virtual_pipeline_model_parallel_size {virtual_pipeline_model_parallel_size} needs a "
            "pipeline_model_parallel_size of 2 or more"
        )
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size,
        pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size,
        # It takes parts of a minute as well.
        **({} if timeout is None else {"distributed_timeout_minutes": timeout / timedelta(minutes=1)}),
    )
    model_parallel_cuda_manual_seed(seed)
    torch.manual_seed(seed)
    distributed.barrier()  # no rank may take its groups down while another still connects to them
    return device


def _join_world(device: Device, timeout: timedelta | None) -> None:
    global _made_here
    if distributed.is_initialized():
        return
    if "RANK" in os.environ:
        distributed.init_process_group(device.collective_backend, timeout=timeout)
    else:
        distributed.init_process_group(
            device.collective_backend, timeout=timeout, store=HashStore(), rank=0, world_size=1
        )
    _made_here = True


def destroy() -> None:
    """Takes megatron-core's groups down, and the process group if `initialize` made it. Afterwards `initialize` can be
    called again, with another layout.
    """
    global _made_here
    from megatron.core import parallel_state

    # megatron-core forgets most of its groups without closing their sockets. None in its list is the whole world.
    for group in set(parallel_state._global_process_group_list or ()) - {None}:
        distributed.destroy_process_group(group)
    parallel_state.destroy_model_parallel()
    if _made_here and distributed.is_initialized():
        distributed.destroy_process_group()
    _made_here = False
