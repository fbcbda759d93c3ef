"""An open checkpoint: canonical tensors, any slice of which is read into a buffer."""

import contextlib
import itertools
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

import numpy as np

from ckpt_tools.config import LlamaConfig
from ckpt_tools.dtypes import DType
from ckpt_tools.errors import CheckpointError, UsageError
from ckpt_tools.layout import Layout
from ckpt_tools.shard_rules import Range, ShardRule, View, check_tensor_parallel, sharding
from ckpt_tools.storage.files import Array, Buffer, DiskTensor, File, close_all

QkvOrder = Literal["megatron", "ascendspeed"]
"""How the QKV rows of several query groups stand in a file: see `shard_rules.ascendspeed_qkv_view`."""

Part = Literal["weights", "main_weights", "exp_avg", "exp_avg_sq"]
"""What of each parameter: its weight, or what a run's optimizer keeps of it in fp32, which is the weight that it steps
and Adam's two moments.
"""


@dataclass(frozen=True, slots=True)
class Piece:
    """A rectangle of a canonical tensor, and where its elements lie. A vector is a column of rows."""

    rows: Range
    columns: Range
    tensor: DiskTensor
    tensor_row: int
    """The row of `tensor` that holds the first of `rows`."""
    tensor_column: int = 0
    """The column of `tensor` that holds the first of `columns`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Contents:
    """What a format's reader found in a folder: files are open, nothing but headers was read."""

    format: str
    config: LlamaConfig | None
    """The architecture, as far as the folder states it."""
    missing: str
    """What the folder does not say, when `config` is None: the end of an error."""
    files: Sequence[File]
    tensors: Sequence[DiskTensor]
    """The model's tensors as stored, one for each rank that holds a part."""
    place: Callable[[LlamaConfig, QkvOrder], Iterable[tuple[str, Piece]]]
    """Where each stored tensor belongs, its QKV rows in this order: canonical names and pieces."""
    tokenizer_files: Sequence[Path]
    layout: Layout = field(default_factory=Layout)
    qkv_is_ambiguous: Callable[[LlamaConfig], bool] = lambda _: False
    """Whether files of this layout may have their QKV rows in either order."""
    qkv_order: QkvOrder | None = None
    """The order that the files themselves state."""


class Checkpoint:
    """A checkpoint that is open for reading; `open_checkpoint` makes them. A context manager; not for several threads.

    Every tensor is addressed by its canonical name (see `ckpt_tools.shard_rules`), whatever the format and the layout.
    """

    path: Path
    """The folder that holds the files: of a run or a Megatron folder, the one that its tracker names."""
    format: str
    """ "hf", "megatron-core", "ascendspeed", "ascendspeed-flat", "deepspeed" or "torch_dist"."""
    layout: Layout
    """How the files are split over ranks (not at all, in formats that are not), and whose names their tensors have."""
    tokenizer_files: tuple[Path, ...]
    """The tokenizer's files, where the folder or its parent has them."""

    def __init__(
        self, path: Path, contents: Contents, config: LlamaConfig | None, qkv_order: QkvOrder | None = None
    ) -> None:
        self.path = path
        self.format = contents.format
        self.layout = contents.layout
        self.tokenizer_files = tuple(contents.tokenizer_files)
        self.stored_tensors = tuple(contents.tensors)
        self._missing = contents.missing
        self._files = contents.files
        self._scratch = Buffer()
        if not contents.tensors:
            raise CheckpointError(f"{path} holds no tensors of a model")
        self._config = _agreed(config, contents.config, path)
        self._rules = {} if self._config is None else sharding(self._config)
        ambiguous = self._config is not None and contents.qkv_is_ambiguous(self._config)
        if ambiguous and contents.qkv_order and qkv_order not in (None, contents.qkv_order):
            raise UsageError(f"the order of heads is given as {qkv_order}, {path} says {contents.qkv_order}")
        qkv_order = qkv_order or contents.qkv_order
        self._undecided = ambiguous and qkv_order is None
        self._tensors: dict[str, _Tensor] = {}
        if self._config is not None and not self._undecided:
            placed = contents.place(self._config, qkv_order if ambiguous and qkv_order else "megatron")
            self._tensors = _assemble(self._rules, placed, path)

    @property
    def config(self) -> LlamaConfig:
        """The architecture.

        Raises:
            UsageError: The folder does not say it, and it was not given.
        """
        if self._config is None:
            raise UsageError(f"{self.path} {self._missing}: give --config with a Hugging Face folder that says it")
        return self._config

    @property
    def has_config(self) -> bool:
        """Whether the architecture is known."""
        return self._config is not None

    @property
    def dtype(self) -> str:
        """The type that most weights have: "float32", "float16" or "bfloat16"."""
        sizes: Counter[str] = Counter()
        for tensor in self.stored_tensors:
            sizes[tensor.dtype] += prod(tensor.shape)
        return sizes.most_common(1)[0][0]

    @property
    def file_paths(self) -> list[Path]:
        """The files that hold the weights."""
        return [file.path for file in self._files]

    def names(self) -> list[str]:
        """The canonical names, in the order in which the model uses them."""
        self.config  # noqa: B018  (says what is missing)
        return list(self._rules)

    def shape(self, name: str) -> tuple[int, ...]:
        """The global shape of a tensor, vocabulary unpadded."""
        return self._tensor(name).shape

    def tensor_dtype(self, name: str) -> DType:
        """The element type that a tensor is stored in (bfloat16 is `ml_dtypes.bfloat16`)."""
        return self._tensor(name).dtype

    def read(self, name: str, index: tuple[slice, ...] = (), out: Array | None = None) -> Array:
        """A tensor, or a slice of it, read from just the bytes that hold it.

        Args:
            name: Canonical name.
            index: A slice of rows and, for a matrix, one of columns; steps of 1. Default: the whole.
            out: Array of the slice's shape to read into, of any float type: elements are cast to it.

        Returns:
            `out`, or a new array of the stored type.

        Raises:
            CheckpointError: No such tensor, bytes are missing, or values that the type of `out` cannot hold.
        """
        tensor = self._tensor(name)
        ranges = _ranges(index, tensor.shape, name)
        shape = tuple(stop - start for start, stop in ranges)
        out = np.empty(shape, tensor.dtype) if out is None else out
        if out.shape != shape:
            raise ValueError(f"{name}: a slice of shape {shape} was asked into an array of shape {out.shape}")
        rectangle = out if len(shape) == 2 else out[:, None]
        columns = ranges[1] if len(shape) == 2 else (0, 1)
        self._fill(tensor.pieces_of(ranges[0]), ranges[0], columns, rectangle)
        return out

    def shard_shape(self, name: str, tp_size: int, *, padded_vocab_size: int | None = None) -> tuple[int, ...]:
        """The shape of what a tensor-parallel rank holds of a tensor: see `read_shard`."""
        self._tensor(name)
        return self._rules[name].view(0, tp_size, padded_vocab_size).shape

    def read_shard(
        self,
        name: str,
        tp_rank: int,
        tp_size: int,
        *,
        padded_vocab_size: int | None = None,
        rows: Range | None = None,
        out: Array | None = None,
    ) -> Array:
        """What a tensor-parallel rank holds of a tensor, whatever layout it is stored in.

        Args:
            name: Canonical name.
            tp_rank: From 0.
            tp_size: Tensor-parallel size.
            padded_vocab_size: Rows of the vocabulary's tables with padding (default: the next multiple of `tp_size`).
                Padding rows are copies of the last true row.
            rows: Only these rows of the shard.
            out: Array of the shard's shape to read into, of any float type.

        Returns:
            `out`, or a new array of the stored type.

        Raises:
            CheckpointError: As for `read`; also where the model does not divide among the ranks.
        """
        dtype = self.tensor_dtype(name)
        check_tensor_parallel(self.config, tp_size)
        if not 0 <= tp_rank < tp_size:
            raise UsageError(f"there is no tensor-parallel rank {tp_rank} of {tp_size}")
        view = self._rules[name].view(tp_rank, tp_size, padded_vocab_size)
        if rows is not None:
            if not 0 <= rows[0] <= rows[1] <= view.shape[0]:
                raise ValueError(f"{name}: a shard of shape {view.shape} has no rows {rows[0]} to {rows[1]}")
            view = view.between(*rows)
        out = np.empty(view.shape, dtype) if out is None else out
        if out.shape != view.shape:
            raise ValueError(f"{name}: a shard of shape {view.shape} was asked into an array of shape {out.shape}")
        read_view(self, name, view, out)
        return out

    def close(self) -> None:
        """Closes the files."""
        close_all(self._files)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _tensor(self, name: str) -> "_Tensor":
        if name not in self._tensors:
            self.config  # noqa: B018  (says what is missing, where that is the reason)
            if self._undecided:
                raise UsageError(
                    f"{self.path} holds several KV heads on each rank, whose query heads may stand in Megatron's order "
                    "or in that of AscendSpeed's converter, which its files do not show: convert it with `ckpt-tools "
                    "convert`, --qkv-order, or --reference with a Hugging Face folder of the model it was made from"
                )
            raise CheckpointError(f"{self.path} has no tensor {name}")
        return self._tensors[name]

    def _fill(self, pieces: Iterable[Piece], rows: Range, columns: Range, out: Array) -> None:
        for piece in pieces:
            top, bottom = max(rows[0], piece.rows[0]), min(rows[1], piece.rows[1])
            left, right = max(columns[0], piece.columns[0]), min(columns[1], piece.columns[1])
            if top < bottom and left < right:
                part = out[top - rows[0] : bottom - rows[0], left - columns[0] : right - columns[0]]
                row = piece.tensor_row + top - piece.rows[0]
                column = piece.tensor_column + left - piece.columns[0]
                piece.tensor.read_rows(row, column, part, self._scratch)


def read_view(checkpoint: Checkpoint, name: str, view: View, out: Array) -> None:
    """Reads a view's rows into `out`, one range after the other, then repeats the last row as padding."""
    columns = () if view.columns is None else (slice(*view.columns),)
    at = 0
    for start, stop in view.rows:
        checkpoint.read(name, (slice(start, stop), *columns), out=out[at : at + stop - start])
        at += stop - start
    if view.padding:
        last = checkpoint.shape(name)[0] - 1
        checkpoint.read(name, (slice(last, last + 1), *columns), out=out[at : at + 1])
        out[at + 1 :] = out[at]


class _Tensor:
    """A canonical tensor and the pieces that make it up, by their first row."""

    def __init__(self, shape: tuple[int, ...], pieces: list[Piece]) -> None:
        self.shape = shape
        self.dtype = pieces[0].tensor.numpy_dtype
        self.pieces = sorted(pieces, key=lambda piece: (piece.rows, piece.columns))
        self._starts = [piece.rows[0] for piece in self.pieces]
        self._tallest = max(stop - start for start, stop in (piece.rows for piece in pieces))

    def pieces_of(self, rows: Range) -> list[Piece]:
        """The pieces that may hold some of the rows."""
        first = bisect_right(self._starts, rows[0] - self._tallest)
        return self.pieces[first : bisect_left(self._starts, rows[1])]


def _ranges(index: tuple[slice, ...], shape: tuple[int, ...], name: str) -> list[Range]:
    if len(index) > len(shape):
        raise ValueError(f"{name} has shape {shape}: {len(index)} slices are too many")
    slices = [*index, *(slice(None) for _ in shape[len(index) :])]
    ranges = []
    for wanted, size in zip(slices, shape, strict=True):
        start, stop, step = wanted.indices(size)
        if step != 1:
            raise ValueError(f"{name}: slices have steps of 1")
        ranges.append((start, max(start, stop)))
    return ranges


def _agreed(given: LlamaConfig | None, stated: LlamaConfig | None, path: Path) -> LlamaConfig | None:
    """The architecture that was given, checked against the one that the folder states."""
    if given is None or stated is None:
        return given or stated
    differences = given.differences(stated)
    for name, (ours, theirs) in differences.items():
        raise UsageError(f"{name} is {ours} in the configuration given, {theirs} in {path}")
    return given


def _assemble(rules: Mapping[str, ShardRule], placed: Iterable[tuple[str, Piece]], path: Path) -> dict[str, _Tensor]:
    """Every canonical tensor with its pieces, after checking that they are whole and of one type."""
    pieces: dict[str, list[Piece]] = {}
    for name, piece in placed:
        pieces.setdefault(name, []).append(piece)
    tensors = {}
    for name, rule in rules.items():
        if name not in pieces:
            raise CheckpointError(f"{path} lacks the tensor {name}")
        _check_cover(name, rule.shape, pieces[name], path)
        tensors[name] = _Tensor(rule.shape, pieces[name])
    return tensors


def _check_cover(name: str, shape: tuple[int, ...], pieces: Sequence[Piece], path: Path) -> None:
    """Pieces cover each element of the tensor once: their areas add up, and no two overlap."""
    dtypes = {piece.tensor.dtype: piece.tensor for piece in pieces}
    if len(dtypes) > 1:
        stated = " and ".join(f"{dtype} ({tensor.where})" for dtype, tensor in sorted(dtypes.items()))
        raise CheckpointError(f"{name} is stored in parts of different types: {stated}")
    area = sum((p.rows[1] - p.rows[0]) * (p.columns[1] - p.columns[0]) for p in pieces)
    if area != prod(shape) or _overlap(pieces):
        raise CheckpointError(f"{path}: the stored parts of {name} do not make up its shape {list(shape)}")


def _overlap(pieces: Sequence[Piece]) -> bool:
    """Whether two of the rectangles share an element."""
    bands: dict[Range, list[Range]] = {}
    for piece in pieces:
        bands.setdefault(piece.rows, []).append(piece.columns)
    return _ranges_overlap(list(bands)) or any(_ranges_overlap(columns) for columns in bands.values())


def _ranges_overlap(ranges: list[Range]) -> bool:
    ordered = sorted(ranges)
    return any(later[0] < earlier[1] for earlier, later in itertools.pairwise(ordered))


def view_pieces(tensor: DiskTensor, view: View) -> list[Piece]:
    """The pieces that a stored tensor with this view holds; its padding belongs to none.

    Raises:
        CheckpointError: The tensor has another shape.
    """
    if tensor.shape != view.shape:
        raise CheckpointError(f"{tensor.where} has shape {list(tensor.shape)}, expected {list(view.shape)}")
    pieces, at = [], 0
    for start, stop in view.rows:
        pieces.append(Piece((start, stop), view.columns or (0, 1), tensor, at))
        at += stop - start
    return pieces


@contextlib.contextmanager
def closing_on_error(files: list[File]) -> Iterator[None]:
    """Closes what was opened so far when opening the rest fails."""
    try:
        yield
    except BaseException:
        close_all(files)
        raise
