"""Files read by position into buffers that the caller reuses, and tensors as byte ranges of such files."""

import codecs
import json
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from ckpt_tools.dtypes import ITEM_SIZE, WEIGHT_DTYPES, DType
from ckpt_tools.errors import CheckpointError

BLOCK_BYTES = 4 << 20
"""How much is read at once: large enough for disk speed, small enough that memory does not grow with a model."""

MAX_JSON_BYTES = 64 << 20

Array = np.ndarray[Any, Any]


class Buffer:
    """Memory that one block after the other is read into."""

    def __init__(self) -> None:
        self._bytes = np.empty(BLOCK_BYTES, np.uint8)

    def array(self, dtype: DType, rows: int, columns: int) -> Array:
        """The buffer's beginning as a matrix, which the next call uses again; it grows where a single row needs it."""
        nbytes = rows * columns * dtype.itemsize
        if nbytes > len(self._bytes):
            self._bytes = np.empty(nbytes, np.uint8)
        return self._bytes[:nbytes].view(dtype).reshape(rows, columns)


class File:
    """A file that is open for reading.

    Raises:
        CheckpointError: It does not exist, or a page or a pointer was downloaded in its place.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a pipe would wait for its writer
        except FileNotFoundError:
            raise CheckpointError(f"{path} does not exist") from None
        if not stat.S_ISREG(os.fstat(self._fd).st_mode):
            self.close()
            raise CheckpointError(f"{path} is not a file")
        self.size = os.fstat(self._fd).st_size
        try:
            refuse_stand_ins(path, os.pread(self._fd, 512, 0))
        except BaseException:
            self.close()
            raise

    def read_into(self, view: memoryview, offset: int) -> None:
        """Fills `view` with the bytes from `offset` on.

        Raises:
            CheckpointError: The file ends before, or `offset` lies before its beginning.
        """
        if offset < 0:
            raise CheckpointError(f"{self.path} is broken: it refers to bytes before its own beginning")
        while view:
            got = os.preadv(self._fd, [view], offset)
            if not got:
                raise CheckpointError(f"{self.path} is truncated: {len(view)} bytes are missing at {offset}")
            view, offset = view[got:], offset + got

    def read(self, offset: int, size: int) -> bytes:
        """`size` bytes from `offset` on."""
        data = bytearray(size)
        self.read_into(memoryview(data), offset)
        return bytes(data)

    def close(self) -> None:
        """Closes the file; no more reading."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


@dataclass(frozen=True, slots=True)
class DiskTensor:
    """A tensor of one or two dimensions, row by row in a byte range of a file. A vector is a column of rows."""

    file: File
    start: int
    """Byte offset of its first element."""
    dtype: str
    shape: tuple[int, ...]
    name: str
    """What the file calls it."""
    row_stride: int | None = None
    """Elements from one row to the next, where its rows are parts of longer ones."""

    @property
    def where(self) -> str:
        """File and name, for errors."""
        return f"{self.name} in {self.file.path}"

    @property
    def nbytes(self) -> int:
        """Bytes of all its elements."""
        return prod(self.shape) * ITEM_SIZE[self.dtype]

    @property
    def numpy_dtype(self) -> DType:
        """Its element type.

        Raises:
            CheckpointError: It is none that weights have.
        """
        if self.dtype not in WEIGHT_DTYPES:
            raise CheckpointError(f"{self.where} is of {self.dtype}: weights are {', '.join(WEIGHT_DTYPES)}")
        return WEIGHT_DTYPES[self.dtype]

    def read_rows(self, first_row: int, first_column: int, out: Array, scratch: Buffer) -> None:
        """Copies the rectangle that begins at (first_row, first_column) and has the shape of `out` into `out`.

        Args:
            first_row: Row in this tensor.
            first_column: Column in this tensor; 0 for a vector.
            out: [rows, columns], of any float type: elements are cast to it.
            scratch: Memory to read into where bytes cannot go straight to `out`.
        """
        dtype = self.numpy_dtype
        width = self.shape[1] if len(self.shape) == 2 else 1
        rows, columns = out.shape
        row_bytes = (self.row_stride or width) * dtype.itemsize
        start = self.start + first_row * row_bytes
        if out.dtype == dtype and row_bytes == columns * dtype.itemsize and out.flags.c_contiguous:
            self.file.read_into(_bytes_of(out), start)
            return
        narrow = out.dtype == dtype and 2 * columns <= width
        if narrow or self.row_stride is not None:  # reading the rest of each row would cost more than the calls
            start += first_column * dtype.itemsize
            for n in range(rows):
                self._read_row(start + n * row_bytes, out[n], scratch)
            return
        step = max(1, BLOCK_BYTES // max(row_bytes, 1))
        for n in range(0, rows, step):
            block = scratch.array(dtype, min(step, rows - n), width)
            self.file.read_into(_bytes_of(block), start + n * row_bytes)
            cast(block[:, first_column : first_column + columns], out[n : n + step], self.where)

    def _read_row(self, start: int, out: Array, scratch: Buffer) -> None:
        dtype = self.numpy_dtype
        if out.dtype == dtype and out.strides[0] == dtype.itemsize:
            self.file.read_into(_bytes_of(out), start)
            return
        row = scratch.array(dtype, 1, len(out))
        self.file.read_into(_bytes_of(row), start)
        cast(row[0], out, self.where)


def _bytes_of(array: Array) -> memoryview:
    return array.reshape(-1).view(np.uint8).data


def cast(block: Array, out: Array, where: str) -> None:
    """Copies `block` into `out`, of its own type or of another.

    Raises:
        CheckpointError: A number of `where` would become infinity.
    """
    with np.errstate(over="ignore"):
        np.copyto(out, block, casting="unsafe")
    if out.dtype != block.dtype and not np.array_equal(np.isfinite(out), np.isfinite(block)):
        raise CheckpointError(f"{where} has values that {out.dtype.name} cannot hold")


PAGES = (b"<!doctype html", b"<html", b"<!--", b"<?xml")
"""How pages begin."""


def refuse_stand_in(path: Path) -> None:
    """Refuses a file that is a web page or a Git-LFS pointer: see `refuse_stand_ins`."""
    with path.open("rb") as stream:
        refuse_stand_ins(path, stream.read(512))


def refuse_stand_ins(path: Path, head: bytes) -> None:
    """Refuses what is often found in place of a file that was to be downloaded.

    Raises:
        CheckpointError: `head`, the file's first bytes, is that of a web page or of a Git-LFS pointer.
    """
    if head.startswith(b"version https://git-lfs.github.com/spec/"):
        raise CheckpointError(f"{path} is a Git-LFS pointer, not the file itself: run `git lfs pull`")
    if head.removeprefix(codecs.BOM_UTF8).lstrip()[:15].lower().startswith(PAGES):
        raise CheckpointError(
            f"{path} is an HTML or XML page, not the file itself: download it again, from /resolve/ instead of /blob/"
        )


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        CheckpointError: There is no such file, or it holds something else.
    """
    try:
        with path.open("rb") as stream:
            data = stream.read(MAX_JSON_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(f"{path} does not exist") from None
    refuse_stand_ins(path, data[:512])
    return parse_json(data, str(path))


def parse_json(data: bytes, where: str) -> dict[str, Any]:
    """The object in JSON text; `where` names it in errors."""
    if len(data) > MAX_JSON_BYTES:
        raise CheckpointError(f"{where} is larger than {MAX_JSON_BYTES >> 20} MiB")
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where} is not JSON: {error}") from None
    if type(value) is not dict:
        raise CheckpointError(f"{where} holds a JSON {type(value).__name__}, not an object")
    return value


def plain_name(folder: Path, name: object, named_by: Path) -> Path:
    """`name` in `folder`, refusing names that lead out of it.

    Raises:
        CheckpointError: `named_by`, an index, names something else than a file of this folder.
    """
    if type(name) is not str or not name or name in (".", "..") or "/" in name or "\\" in name or "\0" in name:
        raise CheckpointError(f"{named_by} names {name!r}, which is not a file of its own folder")
    if not (folder / name).is_file():
        raise CheckpointError(f"{named_by} names {name}, which does not exist: download or copy it too")
    return folder / name


def close_all(files: Sequence[File]) -> None:
    """Closes every one of them."""
    for file in files:
        file.close()
