"""Weights on disk: LLaMA checkpoints of Hugging Face and Megatron, read slice by slice, converted, compared.

No torch. Names are imported on first use, so that `import ckpt_tools` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ckpt_tools.checkpoint import Checkpoint, Part
    from ckpt_tools.config import LlamaConfig
    from ckpt_tools.conversion import convert, reshard
    from ckpt_tools.errors import CheckpointError, UsageError
    from ckpt_tools.formats.companions import tokenizer_files
    from ckpt_tools.formats.distributed import check_distributed_metadata
    from ckpt_tools.inspection import inspect
    from ckpt_tools.layout import Layout
    from ckpt_tools.opening import open_checkpoint
    from ckpt_tools.shard_rules import ShardRule, sharding
    from ckpt_tools.verification import Difference, verify
    from ckpt_tools.writing import Summary, write_checkpoint

_HOME = {
    "Checkpoint": "checkpoint",
    "CheckpointError": "errors",
    "Difference": "verification",
    "Layout": "layout",
    "LlamaConfig": "config",
    "Part": "checkpoint",
    "ShardRule": "shard_rules",
    "Summary": "writing",
    "UsageError": "errors",
    "check_distributed_metadata": "formats.distributed",
    "convert": "conversion",
    "inspect": "inspection",
    "open_checkpoint": "opening",
    "reshard": "conversion",
    "sharding": "shard_rules",
    "tokenizer_files": "formats.companions",
    "verify": "verification",
    "write_checkpoint": "writing",
}

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "Difference",
    "Layout",
    "LlamaConfig",
    "Part",
    "ShardRule",
    "Summary",
    "UsageError",
    "check_distributed_metadata",
    "convert",
    "inspect",
    "open_checkpoint",
    "reshard",
    "sharding",
    "tokenizer_files",
    "verify",
    "write_checkpoint",
]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'ckpt_tools' has no attribute {name!r}")
    return getattr(import_module(f"ckpt_tools.{_HOME[name]}"), name)
