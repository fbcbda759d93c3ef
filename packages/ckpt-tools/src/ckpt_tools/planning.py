"""What a format's writer plans: files, and the part of the model that each of their tensors holds."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from ckpt_tools.config import LlamaConfig
from ckpt_tools.layout import Layout
from ckpt_tools.shard_rules import View
from ckpt_tools.storage.files import Array
from ckpt_tools.storage.output import Slot


class TensorWriter(Protocol):
    """A file that tensors are written to one after the other, in the order in which they were announced."""

    def begin(self, name: str) -> None:
        """The next tensor's bytes follow."""

    def append(self, block: memoryview) -> None:
        """Bytes of the tensor that was begun."""

    def end(self) -> None:
        """The tensor is whole."""

    def finish(self) -> None:
        """The file is whole: it is closed and on disk."""

    def abandon(self) -> None:
        """The file will not be finished."""


@dataclass(frozen=True, slots=True)
class OutputFile:
    """A file to write."""

    path: str
    """Relative to the target's folder."""
    tensors: Mapping[str, tuple[str, View]]
    """Stored name to canonical name and part, in the order of the file."""
    open: Callable[[Path, Sequence[Slot]], TensorWriter]
    """Opens the file for these tensors, and the constants after them."""
    constants: Mapping[str, Array] = field(default_factory=dict)
    """Tensors that are no part of the model's weights: stored name to values."""


@dataclass(frozen=True, slots=True)
class Planned:
    """All that is to be written."""

    batches: Sequence[Sequence[OutputFile]]
    """Files of a batch are written side by side, so that what they share out is read once; batches in order."""
    texts: Mapping[str, bytes] = field(default_factory=dict)
    """Small files: path relative to the target's folder to content."""
    notes: tuple[str, ...] = ()
    """What is to be known of the result."""


Plan = Callable[[LlamaConfig, Layout, Mapping[str, str]], Planned]
"""A format's writer: config, layout and the type of each tensor to the files to write."""
