"""Weights on disk: LLaMA checkpoints of Hugging Face and Megatron, read slice by slice, converted, compared.

No torch. Names are imported on first use, so that `import ckpt_tools` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ckpt_tools.checkpoint import Checkpoint
    from ckpt_tools.config import LlamaConfig
    from ckpt_tools.convert import Summary, convert
    from ckpt_tools.errors import CheckpointError, UsageError
    from ckpt_tools.inspection import inspect
    from ckpt_tools.opening import open_checkpoint
    from ckpt_tools.sharding import ShardRule, sharding
    from ckpt_tools.verify import Difference, verify
    from ckpt_tools.writing import Layout, write_checkpoint

_HOME = {
    "Checkpoint": "checkpoint",
    "CheckpointError": "errors",
    "Difference": "verify",
    "Layout": "writing",
    "LlamaConfig": "config",
    "ShardRule": "sharding",
    "Summary": "convert",
    "UsageError": "errors",
    "convert": "convert",
    "inspect": "inspection",
    "open_checkpoint": "opening",
    "sharding": "sharding",
    "verify": "verify",
    "write_checkpoint": "writing",
}

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "Difference",
    "Layout",
    "LlamaConfig",
    "ShardRule",
    "Summary",
    "UsageError",
    "convert",
    "inspect",
    "open_checkpoint",
    "sharding",
    "verify",
    "write_checkpoint",
]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'ckpt_tools' has no attribute {name!r}")
    return getattr(import_module(f"ckpt_tools.{_HOME[name]}"), name)
