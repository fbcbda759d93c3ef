"""Weights from disk into the network: any format that ckpt-tools opens, each rank only its slices."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ckpt_tools import Checkpoint, LlamaConfig, open_checkpoint
from ckpt_tools.dtypes import WEIGHT_DTYPES
from npu_kernels import Device
from npu_kernels import device as find_device

from llama_model.errors import ModelError, RequestError
from llama_model.model import LlamaModel


def load_model(
    path: str | Path,
    *,
    device: Device | torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
    config: LlamaConfig | None = None,
) -> LlamaModel:
    """The model at `path` on one device, ready to compute: in eval mode, its weights without gradients.

    Args:
        path: A Hugging Face folder, a Megatron checkpoint, or a training run (its latest checkpoint).
        device: Where it goes; the machine's accelerator unless given ("cpu", "cuda:1", a `npu_kernels.Device`).
        dtype: The type of the weights, "float32", "float16" or "bfloat16" or torch's; the checkpoint's unless given.
        config: The architecture, for checkpoints that do not state it.

    Raises:
        CheckpointError: There is no checkpoint, or a broken one.
        RequestError: No such dtype.
        KernelError: No such device.
    """
    place = _torch_device(device)
    with open_checkpoint(path, config) as checkpoint:
        wanted = _torch_dtype(checkpoint.dtype if dtype is None else dtype)
        with torch.device("meta"):  # nothing is allocated or initialised twice
            model = LlamaModel(checkpoint.config)
        model = model.to(wanted).to_empty(device=place)
        load_weights(model, checkpoint)
    return model.eval().requires_grad_(False)


@torch.no_grad()
def load_weights(
    model: LlamaModel, checkpoint: Checkpoint, parameters: Iterable[tuple[str, torch.nn.Parameter]] | None = None
) -> None:
    """Fills every parameter of `model` from `checkpoint`, cast to the parameter's type.

    A rank reads its own slices; layers are found by their number in the whole model. Padding rows of the vocabulary are
    copies of the last true row.

    Args:
        model: Of any tensor-parallel and pipeline layout.
        checkpoint: Of any format and layout.
        parameters: Those to fill, with the model's names for them, each taken when the one before it is full; all
            unless given.

    Raises:
        ModelError: The checkpoint's architecture is not the model's.
        CheckpointError: A tensor is missing or broken.
    """
    for name, (ours, theirs) in model.architecture.differences(checkpoint.config).items():
        raise ModelError(f"{name} is {ours} in the model, {theirs} in {checkpoint.path}")
    for name, parameter in model.named_parameters() if parameters is None else parameters:
        canonical = model.canonical_name(name)
        # Read into the parameter's own memory where the host can reach it; a copy passes through the host otherwise.
        on_host = parameter.data if parameter.device.type == "cpu" else torch.empty_like(parameter, device="cpu")
        checkpoint.read_shard(
            canonical,
            model.tensor_model_parallel_rank,
            model.tensor_model_parallel_size,
            padded_vocab_size=model.padded_vocab_size,
            out=_as_numpy(on_host),
        )
        if parameter.device.type != "cpu":
            parameter.copy_(on_host)


def _as_numpy(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    """The tensor's memory as an array; numpy's own types have no bfloat16."""
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(WEIGHT_DTYPES["bfloat16"])
    return tensor.numpy()


def _torch_device(device: Device | torch.device | str | None) -> torch.device:
    if isinstance(device, torch.device):
        return device
    if isinstance(device, Device):
        return device.torch_device()
    kind, _, index = (device or "").partition(":")
    return find_device(kind or None).torch_device(int(index) if index.isdigit() else None)


def _torch_dtype(dtype: torch.dtype | str) -> torch.dtype:
    name = str(dtype).removeprefix("torch.")
    if name not in WEIGHT_DTYPES:
        raise RequestError(f"no weights of type {name}: choose from {', '.join(WEIGHT_DTYPES)}")
    found: torch.dtype = getattr(torch, name)
    return found
