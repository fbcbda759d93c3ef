"""torch's zip files (.pt, .bin, the items of a .distcp): tensors as byte ranges, everything else as inert data."""

import io
import struct
import zipfile
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

from ckpt_tools.dtypes import ITEM_SIZE
from ckpt_tools.errors import CheckpointError
from ckpt_tools.storage.files import DiskTensor, File
from ckpt_tools.storage.torch_pickle import TensorRef, loads
from ckpt_tools.storage.unpickle import PickleError, walk

MAX_PICKLE_BYTES = 256 << 20
Roots = Callable[[Mapping[Any, Any]], Collection[Any]]
LOCAL_HEADER = struct.Struct("<4s5H3I2H")
"""A zip record's header, before its name and its extra field, whose lengths are its last two numbers."""


def read_torch(
    file: File, start: int = 0, length: int | None = None, *, roots: Roots | None = None
) -> tuple[Any, dict[tuple[Any, ...], DiskTensor]]:
    """What torch.save wrote to a file, or to `length` bytes of it from `start` on: nothing but the pickle is read.

    Args:
        file: The file.
        start: The first byte.
        length: How many; default: all.
        roots: Chooses the keys of the tree, if that is a dictionary, whose tensors are of interest; default: all.

    Returns:
        The tree, and the tensors in it: path of keys to tensor.

    Raises:
        CheckpointError: Not torch's zip format, truncated, hostile, or a tensor that is not row-major.
    """
    length = file.size - start if length is None else length
    try:
        records = _records(file, start, length)
        tree = loads(_pickle(file, records))
    except PickleError as error:
        raise CheckpointError(f"{file.path}: {error}") from None
    tensors = {}
    for path, ref in _refs(file, tree, roots):
        name = ".".join(map(str, path))
        row_stride = None if ref.is_contiguous else ref.stride[0]
        tensors[path] = DiskTensor(file, _start(file, records, ref, name), ref.dtype, ref.shape, name, row_stride)
    return tree, tensors


def _refs(file: File, tree: Any, roots: Roots | None) -> Iterator[tuple[tuple[Any, ...], TensorRef]]:
    wanted = {key: tree[key] for key in roots(tree) if key in tree} if roots and type(tree) is dict else tree
    try:
        yield from walk(wanted, TensorRef)
    except PickleError as error:
        raise CheckpointError(f"{file.path}: {error}") from None


def _start(file: File, records: dict[str, tuple[int, int]], ref: TensorRef, name: str) -> int:
    """The byte of the file at which a tensor begins."""
    at, size = records.get(f"data/{ref.storage.key}", (0, -1))
    if size < ref.storage.numel * ITEM_SIZE[ref.storage.dtype]:
        raise CheckpointError(f"{file.path}: the bytes of {name} are missing or too few")
    if not (ref.is_contiguous or ref.is_columns):
        raise CheckpointError(f"{file.path}: {name} is a transposed view: save it again with .contiguous()")
    return at + ref.offset * ITEM_SIZE[ref.dtype]


def _pickle(file: File, records: dict[str, tuple[int, int]]) -> bytes:
    start, size = records.get("data.pkl", (0, -1))
    if not 0 <= size <= MAX_PICKLE_BYTES:
        raise CheckpointError(f"{file.path} has no data.pkl, or one above {MAX_PICKLE_BYTES >> 20} MiB")
    at, count = records.get("byteorder", (0, 0))
    if count and file.read(at, min(count, 16)) != b"little":
        raise CheckpointError(f"{file.path} is big-endian")
    return file.read(start, size)


def _records(file: File, start: int, length: int) -> dict[str, tuple[int, int]]:
    """The zip's records without the folder that they share: name to (first byte in the file, size)."""
    if start + length > file.size or file.read(start, min(4, length)) != b"PK\3\4":
        raise CheckpointError(f"{file.path} is truncated, or not in torch's zip format (torch 1.6 and later write it)")
    try:
        with zipfile.ZipFile(io.BufferedReader(_Window(file, start, length))) as archive:
            infos = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, struct.error, UnicodeError) as error:
        raise CheckpointError(f"{file.path} is truncated or not a zip file: {error}") from None
    records: dict[str, tuple[int, int]] = {}
    for info in infos:
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
            raise CheckpointError(f"{file.path}: {info.filename} is compressed or encrypted, which torch never does")
        header = LOCAL_HEADER.unpack(file.read(start + info.header_offset, LOCAL_HEADER.size))
        at = info.header_offset + LOCAL_HEADER.size + header[-2] + header[-1]
        name = info.filename.split("/", 1)[-1]
        if header[0] != b"PK\3\4" or at + info.file_size > length or name in records:
            raise CheckpointError(f"{file.path}: the zip's directory is wrong about {info.filename}")
        records[name] = start + at, info.file_size
    return records


class _Window(io.RawIOBase):
    """Part of a file as a seekable stream of its own, which is what `zipfile` wants."""

    def __init__(self, file: File, start: int, length: int) -> None:
        self._file, self._start, self._length, self._at = file, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        if self._at < 0:
            raise OSError("negative seek position")
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, into: Any) -> int:
        view = memoryview(into).cast("B")
        count = max(0, min(len(view), self._length - self._at))
        self._file.read_into(view[:count], self._start + self._at)
        self._at += count
        return count
