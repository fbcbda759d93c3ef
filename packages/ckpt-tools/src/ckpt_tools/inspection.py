"""`inspect`: what a checkpoint is, from its headers."""

from dataclasses import asdict
from math import prod
from pathlib import Path
from typing import Any

from ckpt_tools.config import LlamaConfig
from ckpt_tools.opening import open_checkpoint
from ckpt_tools.shard_rules import sharding


def inspect(path: str | Path, config: str | Path | None = None, *, tensors: bool = False) -> dict[str, Any]:
    """Format, architecture, layout, type and size of a checkpoint; None for what it does not say.

    Args:
        path: Anything that `open_checkpoint` opens.
        config: A Hugging Face folder that states the architecture, for checkpoints that do not.
        tensors: List the stored tensors too.

    Returns:
        `format`, `config` (the fields of `LlamaConfig`), `tensor_model_parallel_size`, `pipeline_model_parallel_size`,
        `dtype` (None where tensors differ in it), `parameters` (of the model, without padding) and `bytes` (of the
        model's tensors as stored, padding and what each rank repeats included). What else the format knows of its
        layout follows: `num_layers_per_virtual_pipeline_stage`, `num_layer_list`, `merge_mlp`, `naming` (see `Layout`).
        `tensors`, if asked for: of each stored tensor its `file` (relative to the folder), `name`, `shape`, `dtype`.

    Raises:
        CheckpointError: See `open_checkpoint`.
    """
    known = LlamaConfig.from_hf(config) if config else None
    with open_checkpoint(path, known) as checkpoint:
        dtypes = {tensor.dtype for tensor in checkpoint.stored_tensors}
        rules = sharding(checkpoint.config) if checkpoint.has_config else None
        layout = checkpoint.layout
        found: dict[str, Any] = {
            "format": checkpoint.format,
            "config": asdict(checkpoint.config) if checkpoint.has_config else None,
            "tensor_model_parallel_size": layout.tensor_model_parallel_size,
            "pipeline_model_parallel_size": layout.pipeline_model_parallel_size,
            "dtype": checkpoint.dtype if len(dtypes) == 1 else None,
            "parameters": sum(prod(rule.shape) for rule in rules.values()) if rules else None,
            "bytes": sum(tensor.nbytes for tensor in checkpoint.stored_tensors),
        }
        if layout.naming is not None:
            more = ("num_layers_per_virtual_pipeline_stage", "num_layer_list", "merge_mlp", "naming")
            found |= {name: getattr(layout, name) for name in more}
        if tensors:
            found["tensors"] = [
                {
                    "file": tensor.file.path.relative_to(checkpoint.path).as_posix(),
                    "name": tensor.name,
                    "shape": list(tensor.shape),
                    "dtype": tensor.dtype,
                }
                for tensor in checkpoint.stored_tensors
            ]
        return found
