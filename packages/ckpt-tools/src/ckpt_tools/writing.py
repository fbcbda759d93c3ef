"""`write_checkpoint`: a model's tensors, from wherever they can be read, into a new folder of any written format."""

import contextlib
import re
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Protocol

import numpy as np

from ckpt_tools.checkpoint import Checkpoint
from ckpt_tools.config import LlamaConfig
from ckpt_tools.dtypes import ITEM_SIZE, WEIGHT_DTYPES, DType
from ckpt_tools.errors import CheckpointError, UsageError
from ckpt_tools.formats import deepspeed, hf, megatron
from ckpt_tools.formats.companions import CONFIG, GENERATION_CONFIG, TOKENIZER_FILES
from ckpt_tools.layout import Layout
from ckpt_tools.opening import looks_like_checkpoint
from ckpt_tools.planning import OutputFile, Plan, Planned, TensorWriter
from ckpt_tools.shard_rules import EMBEDDING, Range, View, sharding
from ckpt_tools.storage.atomic import new_folder
from ckpt_tools.storage.files import BLOCK_BYTES, Array, Buffer, File, cast
from ckpt_tools.storage.output import Slot, encode_json, write_file
from ckpt_tools.storage.torch_read import read_torch

PLANS: Mapping[str, Plan] = {hf.FORMAT: hf.plan, **megatron.PLANS, deepspeed.FORMAT: deepspeed.plan}
"""The formats that are written."""

_COMPANIONS = map(re.escape, (CONFIG, GENERATION_CONFIG))
WRITTEN = re.compile("|".join((hf.WRITTEN, megatron.WRITTEN, deepspeed.WRITTEN, *_COMPANIONS)))
"""Every path, relative to the target's folder, that a conversion writes, whatever it copies."""
WRITTEN_KEYS = re.compile(r"args|checkpoint_version|iteration|model\d*|module|dp_world_size|qkv_order")
"""Of the dictionary in a rank's file."""


@dataclass(frozen=True, slots=True)
class Summary:
    """What was written."""

    path: Path
    format: str
    tensors: int
    """Tensors as stored: each rank's part counts."""
    bytes: int
    """Of these tensors."""
    seconds: float
    """Of wall time, until all was on disk under its name."""
    peak_rss: int
    """Bytes: the most memory that the process had resident so far, pages of mapped files included."""
    notes: tuple[str, ...] = ()
    """What is to be known of the result."""


class Progress(Protocol):
    """A progress bar, as tqdm makes them."""

    def reset(self, total: float | None = None) -> None:
        """So many bytes will be written."""

    def update(self, n: float | None = 1) -> bool | None:
        """So many more bytes were written."""


class Source(Protocol):
    """What tensors are read from, block by block: a `Checkpoint`, or arrays in memory."""

    def tensor_dtype(self, name: str) -> DType:
        """The element type of a tensor."""

    def read(self, name: str, index: tuple[slice, ...] = (), out: Array | None = None) -> Array:
        """A slice of a tensor, cast into `out`."""


def write_checkpoint(
    path: str | Path,
    config: LlamaConfig,
    tensors: Checkpoint | Mapping[str, Array],
    format: str,
    layout: Layout | None = None,
    *,
    dtype: str | None = None,
    files: Sequence[Path] = (),
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Summary:
    """What was written: a new folder that appears under its name whole or not at all.

    Args:
        path: The folder. It must not exist, or be empty, unless `overwrite`.
        config: The architecture.
        tensors: An open checkpoint, or canonical names to arrays of the global shapes (see `sharding`).
        format: "hf", "megatron-core", "ascendspeed", "ascendspeed-flat" or "deepspeed".
        layout: How to split the model over ranks; default: not at all.
        dtype: "float32", "float16" or "bfloat16" to cast every tensor; default: each stays as it is.
        files: Copied beside the weights under their own names: the tokenizer's.
        overwrite: Replace what is there, if nothing lies in it but a checkpoint like those that are written here.
        progress: A bar that is told of bytes.

    Raises:
        CheckpointError: A tensor is missing or broken, values do not fit `dtype`, or the target is not to be replaced.
        UsageError: No such format or type, or the model does not divide into the layout.
    """
    started = time.monotonic()
    if format not in PLANS:
        raise UsageError(f"{format!r} is no format that is written: choose from {', '.join(PLANS)}")
    if dtype is not None and dtype not in WEIGHT_DTYPES:
        raise UsageError(f"{dtype!r} is no type of weights: choose from {', '.join(WEIGHT_DTYPES)}")
    source = tensors if isinstance(tensors, Checkpoint) else _Arrays(tensors, config)
    dtypes = {name: dtype or source.tensor_dtype(name).name for name in sharding(config)}
    planned = PLANS[format](config, layout or Layout(), dtypes)
    sizes = [*_sizes(planned, dtypes)]
    if progress is not None:
        progress.reset(total=sum(sizes))
    check = partial(_check_replaceable, copied={file.name for file in files})
    with new_folder(Path(path), overwrite=overwrite, check=check) as folder:
        copier = _Copier(source, dtypes, progress.update if progress is not None else lambda _: None)
        for batch in planned.batches:
            _write_batch(folder, batch, copier, dtypes)
        _write_companions(folder, {**planned.texts, CONFIG: encode_json(config.to_hf(dtypes[EMBEDDING]))}, files)
    seconds = time.monotonic() - started
    return Summary(Path(path), format, len(sizes), sum(sizes), seconds, _peak_rss(), planned.notes)


def _sizes(planned: Planned, dtypes: Mapping[str, str]) -> Iterator[int]:
    """Bytes of each tensor that is written."""
    for file in (file for batch in planned.batches for file in batch):
        yield from (prod(view.shape) * ITEM_SIZE[dtypes[name]] for name, view in file.tensors.values())
        yield from (values.nbytes for values in file.constants.values())


def _peak_rss() -> int:
    """VmHWM: unlike getrusage's ru_maxrss, it does not begin with the memory of the process that started this one."""
    status = Path("/proc/self/status").read_text("ascii", "replace")
    return int(status.partition("VmHWM:")[2].split()[0]) << 10


def _check_replaceable(target: Path, copied: Collection[str]) -> None:
    """Refuses to delete what a conversion cannot have written, or would not write again: notes, a training run.

    Raises:
        CheckpointError: Naming what is in the way.
    """
    inside = (path.relative_to(target).as_posix() for path in target.rglob("*"))
    stranger = next((name for name in inside if name not in copied and not WRITTEN.fullmatch(name)), None)
    if stranger is not None:
        why = "would not be written again" if stranger in TOKENIZER_FILES else "ckpt-tools does not write"
        raise CheckpointError(
            f"{target} holds {stranger}, which {why}, and --overwrite would delete: "
            "move it away, or choose another target"
        )
    for file in target.rglob("*.pt"):
        if keys := _trained_keys(file):
            raise CheckpointError(
                f"{file} holds {keys[0]}, which ckpt-tools does not write, and --overwrite would delete a training "
                "run's state: move it away, or choose another target"
            )
    if target.exists() and not looks_like_checkpoint(target):
        raise CheckpointError(
            f"{target} exists and is no checkpoint, which --overwrite does not replace: choose another target"
        )


def _trained_keys(path: Path) -> list[str]:
    """What a rank's file holds beside what a conversion writes: an optimizer, random states. None if it is broken."""
    try:
        with contextlib.closing(File(path)) as file:
            tree, _ = read_torch(file, roots=lambda _: [])
    except CheckpointError:
        return []
    return [str(key) for key in tree if not WRITTEN_KEYS.fullmatch(str(key))] if type(tree) is dict else []


def _write_companions(folder: Path, texts: Mapping[str, bytes], files: Sequence[Path]) -> None:
    """A file that travels with the model takes the place of one that the format would make up."""
    copied = {file.name: file for file in files}
    for name, content in texts.items():
        if name not in copied:
            write_file(folder / name, content)
    for name, file in copied.items():
        with file.open("rb") as stream:
            write_file(folder / name, stream.read())


def _write_batch(folder: Path, batch: Sequence[OutputFile], copier: "_Copier", dtypes: Mapping[str, str]) -> None:
    """Writes files side by side: for each canonical tensor the parts of it that they hold."""
    writers: list[TensorWriter] = []
    try:
        for file in batch:
            path = folder / file.path
            path.parent.mkdir(parents=True, exist_ok=True)
            slots = [Slot(stored, dtypes[name], view.shape) for stored, (name, view) in file.tensors.items()]
            constants = [Slot(stored, values.dtype.name, values.shape) for stored, values in file.constants.items()]
            writers.append(file.open(path, [*slots, *constants]))
        for name, targets in _targets(batch, writers).items():
            copier.copy(name, targets)
        for file, writer in zip(batch, writers, strict=True):
            copier.write_constants(file.constants, writer)
            writer.finish()
    except BaseException:
        for writer in writers:
            writer.abandon()
        raise


@dataclass(frozen=True, slots=True)
class _Target:
    """A stored tensor, and the file that it goes to."""

    stored: str
    view: View
    writer: TensorWriter


def _targets(batch: Sequence[OutputFile], writers: Sequence[TensorWriter]) -> dict[str, list[_Target]]:
    """For each canonical tensor, in the order of the files, the stored tensors that hold parts of it."""
    targets: dict[str, list[_Target]] = {}
    for file, writer in zip(batch, writers, strict=True):
        for stored, (name, view) in file.tensors.items():
            targets.setdefault(name, []).append(_Target(stored, view, writer))
    return targets


class _Copier:
    """Copies canonical tensors block by block to all that hold a part of them; a block is read once for all."""

    def __init__(self, source: Source, dtypes: Mapping[str, str], advance: Callable[[int], object]) -> None:
        self._source, self._dtypes, self._advance = source, dtypes, advance
        self._block, self._part = Buffer(), Buffer()

    def copy(self, name: str, targets: Sequence[_Target]) -> None:
        """Writes every target's part of the tensor."""
        same_rows: dict[tuple[tuple[Range, ...], int], list[_Target]] = {}
        for target in targets:
            same_rows.setdefault((target.view.rows, target.view.padding), []).append(target)
        for (rows, padding), group in same_rows.items():
            for target in group:
                target.writer.begin(target.stored)
            for block in self._blocks(name, rows, padding, _columns(group)):
                self._append(block, group)
            for target in group:
                target.writer.end()

    def write_constants(self, constants: Mapping[str, Array], writer: TensorWriter) -> None:
        """Writes tensors that are in memory."""
        for stored, values in constants.items():
            writer.begin(stored)
            writer.append(values.view(np.uint8).data)
            writer.end()
            self._advance(values.nbytes)

    def _blocks(self, name: str, rows: Sequence[Range], padding: int, columns: Range | None) -> Iterator[Array]:
        """The rows one range after the other, then the last row as often as there is padding."""
        dtype = WEIGHT_DTYPES[self._dtypes[name]]
        width = columns[1] - columns[0] if columns else 1
        step = max(1, BLOCK_BYTES // (width * dtype.itemsize))
        index = (slice(*columns),) if columns else ()
        for start, stop in rows:
            for first in range(start, stop, step):
                last = min(first + step, stop)
                block = self._block.array(dtype, last - first, width)
                self._source.read(name, (slice(first, last), *index), out=block if columns else block[:, 0])
                yield block
        if padding:
            block = self._block.array(dtype, min(step, padding), width)
            self._source.read(name, (slice(-1, None), *index), out=block[:1] if columns else block[:1, 0])
            block[1:] = block[0]
            for first in range(0, padding, step):
                yield block[: min(step, padding - first)]

    def _append(self, block: Array, group: Sequence[_Target]) -> None:
        left = (_columns(group) or (0, 1))[0]
        for target in group:
            start, stop = target.view.columns or (0, 1)
            part = block[:, start - left : stop - left]
            if part.shape != block.shape:
                narrow = self._part.array(block.dtype, *part.shape)
                np.copyto(narrow, part)
                part = narrow
            target.writer.append(part.reshape(-1).view(np.uint8).data)
            self._advance(part.nbytes)


def _columns(group: Sequence[_Target]) -> Range | None:
    """The columns that the targets together hold."""
    ranges = [target.view.columns for target in group if target.view.columns]
    return (min(start for start, _ in ranges), max(stop for _, stop in ranges)) if ranges else None


class _Arrays:
    """Tensors in memory, read like those of a checkpoint."""

    def __init__(self, tensors: Mapping[str, Array], config: LlamaConfig) -> None:
        self._tensors = tensors
        rules = sharding(config)
        if unknown := sorted(tensors.keys() - rules.keys()):
            raise CheckpointError(f"{unknown[0]} is none of the model's tensors")
        for name, rule in rules.items():
            if name not in tensors:
                raise CheckpointError(f"the tensor {name} is missing")
            if tensors[name].shape != rule.shape:
                raise CheckpointError(f"{name} has shape {list(tensors[name].shape)}, expected {list(rule.shape)}")
            if tensors[name].dtype not in WEIGHT_DTYPES.values():
                raise CheckpointError(f"{name} is of {tensors[name].dtype}: weights are {', '.join(WEIGHT_DTYPES)}")

    def tensor_dtype(self, name: str) -> DType:
        """The element type of a tensor."""
        dtype: DType = self._tensors[name].dtype
        return dtype

    def read(self, name: str, index: tuple[slice, ...] = (), out: Array | None = None) -> Array:
        """A slice of a tensor, cast into `out`."""
        part = self._tensors[name][index]
        if out is None:
            return part.copy()
        cast(part, out, name)
        return out
