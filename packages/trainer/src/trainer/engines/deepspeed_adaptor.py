"""DeepSpeed as the engine uses it: imported without a compiler or talk, on the process groups that are there."""

import importlib
import logging
import os
import sys
import types
from typing import Any
from unittest import mock

import torch
from llama_model import parallel
from npu_kernels import Device


def imported(device: Device) -> Any:
    """The package, told which accelerator to use and not to compile anything."""
    os.environ.setdefault("DS_ACCELERATOR", device.type)  # else it looks for one, and talks about it
    os.environ.setdefault("LOCAL_RANK", "0")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    import deepspeed
    import deepspeed.ops
    from deepspeed.utils import logger

    logger.setLevel(logging.WARNING)
    _import_uncompiled("deepspeed.runtime.zero.muon.muon_optimizer")
    # Only inference uses it, and on a CPU starting the process group would compile it.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if device.type == "cpu":
        _set_norm_right()
    deepspeed.init_distributed(device.collective_backend, auto_mpi_discovery=False, verbose=False)
    return deepspeed


def _import_uncompiled(module: str) -> None:
    """Imports a module of DeepSpeed whose functions it would compile, and which is imported for its names only: torch's
    compiler takes seconds to load, and 100 MiB.
    """
    from deepspeed.runtime import compiler

    with mock.patch.object(compiler, "compile", return_value=lambda function: function):
        importlib.import_module(module)


def _set_norm_right() -> None:
    """Of the gradient under stage 1 in bfloat16: DeepSpeed takes it by `Tensor.norm` in fp32, on a CPU 3 % off of 2e8
    numbers. The other stages add up in fp64.
    """
    from deepspeed.runtime import bf16_optimizer, utils

    def exact(input_tensors: list[torch.Tensor], **options: Any) -> torch.Tensor:
        norm: torch.Tensor = utils.get_global_norm_of_tensors([parallel.l2_norm(input_tensors)], **options)
        return norm

    bf16_optimizer.get_global_norm_of_tensors = exact


def let_it_speak() -> None:
    """The reports that the user's JSON asks for, beside our own: stdout is the result's."""
    from deepspeed.utils import logger

    logger.setLevel(logging.INFO)
    for handler in logger.handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.setStream(sys.stderr)


class Groups:
    """megatron-core's process groups by the names that DeepSpeed asks for."""

    def __init__(self, parallel_state: types.ModuleType) -> None:
        self._state = parallel_state
        self.get_model_parallel_rank = parallel_state.get_tensor_model_parallel_rank
        self.get_model_parallel_world_size = parallel_state.get_tensor_model_parallel_world_size
        self.get_model_parallel_group = parallel_state.get_tensor_model_parallel_group

    def __getattr__(self, name: str) -> Any:
        return getattr(self._state, name)
