"""`verify`: whether two checkpoints hold the same model, whatever their formats and layouts."""

import itertools
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ckpt_tools.checkpoint import Checkpoint, QkvOrder
from ckpt_tools.config import LlamaConfig
from ckpt_tools.errors import UsageError
from ckpt_tools.opening import open_checkpoint
from ckpt_tools.storage.files import Array, Buffer

COMPARED_BYTES = 1 << 20
"""Of a block: small, because comparing makes a few copies of it."""


@dataclass(frozen=True, slots=True)
class Difference:
    """A field of the architecture or a tensor that the two have not in common."""

    name: str
    a: Any
    """The value in the first: of a tensor, that of its first element that differs."""
    b: Any
    index: tuple[int, ...] | None = None
    """Of a tensor: where its first element lies that differs."""
    count: int | None = None
    """Of a tensor: how many elements differ."""
    max_abs: float | None = None
    """Of a tensor: by how much at most; infinite or not a number where values are."""

    def __str__(self) -> str:
        if self.index is None:
            return f"{self.name}: {self.a} in the first, {self.b} in the second"
        at = ", ".join(map(str, self.index))
        return (
            f"{self.name}: {self.count} elements differ, by {self.max_abs:.3g} at most; [{at}] is {self.a} and {self.b}"
        )


def verify(
    a: str | Path,
    b: str | Path,
    *,
    tolerance: float = 0.0,
    limit: int = 10,
    config: str | Path | None = None,
    qkv_order: QkvOrder | None = None,
    reference: str | Path | None = None,
    progress: bool = False,
) -> list[Difference]:
    """The first differences between two checkpoints: none if they hold the same model.

    Tensors of one type must be the same bits, tensors of two types the same numbers. With a tolerance, each element
    may differ by so much.

    Args:
        a: Anything that `open_checkpoint` opens.
        b: Another.
        tolerance: Largest absolute difference that passes.
        limit: Differences to find before stopping.
        config: A Hugging Face folder that states the architecture, for checkpoints that do not.
        qkv_order: See `open_checkpoint`; for the one of the two that asks for it.
        reference: Likewise.
        progress: Show a bar on stderr, if that is a terminal.

    Raises:
        CheckpointError: One of them cannot be read.
        UsageError: The tolerance is negative or not finite.
    """
    if not 0 <= tolerance < math.inf:  # so that not-a-number fails too
        raise UsageError(f"tolerance is {tolerance}: it must be a finite number, 0 or more")
    known = LlamaConfig.from_hf(config) if config else None
    first = open_checkpoint(a, known, qkv_order=qkv_order, reference=reference)
    with first, open_checkpoint(b, known, qkv_order=qkv_order, reference=reference) as second:
        fields = first.config.differences(second.config)
        if fields:
            return [Difference(name, *values) for name, values in fields.items()]
        total = sum(prod(first.shape(name)) * first.tensor_dtype(name).itemsize for name in first.names())
        hidden = not (progress and sys.stderr.isatty())
        with tqdm(total=total, unit="B", unit_scale=True, disable=hidden, desc="verify", leave=False) as bar:
            return list(itertools.islice(_tensor_differences(first, second, tolerance, bar.update), limit))


def _tensor_differences(
    first: Checkpoint, second: Checkpoint, tolerance: float, advance: Callable[[int], object]
) -> Iterator[Difference]:
    buffers = Buffer(), Buffer()
    for name in first.names():
        found = _Found(name)
        for row, one, other in _blocks(name, first, second, buffers):
            found.add(row, one, other, tolerance)
            advance(one.nbytes)
        if found.count:
            yield found.difference(len(first.shape(name)))


def _blocks(
    name: str, first: Checkpoint, second: Checkpoint, buffers: tuple[Buffer, Buffer]
) -> Iterator[tuple[int, Array, Array]]:
    """The same rows of both, each in its own type: (first row, block, block)."""
    height, *rest = first.shape(name)
    width = rest[0] if rest else 1
    step = max(1, COMPARED_BYTES // (width * first.tensor_dtype(name).itemsize))
    for row in range(0, height, step):
        rows = slice(row, min(row + step, height))
        yield row, _read(first, name, rows, buffers[0]), _read(second, name, rows, buffers[1])


def _read(checkpoint: Checkpoint, name: str, rows: slice, buffer: Buffer) -> Array:
    """Rows of a tensor as a matrix, a vector as a column."""
    _, *rest = checkpoint.shape(name)
    block = buffer.array(checkpoint.tensor_dtype(name), rows.stop - rows.start, rest[0] if rest else 1)
    checkpoint.read(name, (rows,), out=block if rest else block[:, 0])
    return block


class _Found:
    """What differs in one tensor, block after block."""

    def __init__(self, name: str) -> None:
        self.name, self.count, self.max_abs = name, 0, 0.0
        self._index: tuple[int, int] = (0, 0)
        self._values: tuple[float, float] = (0.0, 0.0)

    def add(self, row: int, one: Array, other: Array, tolerance: float) -> None:
        same_type = one.dtype == other.dtype
        if same_type and np.array_equal(_bits(one), _bits(other)):
            return
        with np.errstate(invalid="ignore"):
            distance = np.abs(one.astype(np.float64) - other.astype(np.float64))
        same = (one == other) | (np.isnan(one) & np.isnan(other))  # infinities too, whose distance is no number
        apart = ~(distance <= tolerance) & ~same
        if same_type and not tolerance:
            apart = _bits(one) != _bits(other)
        if not apart.any():
            return
        if not self.count:
            at = tuple(int(n) for n in np.argwhere(apart)[0])
            self._index, self._values = (row + at[0], at[1]), (float(one[at]), float(other[at]))
        self.count += int(apart.sum())
        self.max_abs = float(np.maximum(self.max_abs, distance[apart].max()))

    def difference(self, dimensions: int) -> Difference:
        return Difference(self.name, *self._values, self._index[:dimensions], self.count, self.max_abs)


def _bits(block: Array) -> Array:
    return block.view(f"u{block.dtype.itemsize}")
