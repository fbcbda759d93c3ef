r"""Megatron's indexed dataset: `P.bin` holds token ids one after another, `P.idx` where each sequence lies.

`.idx`, little-endian: 9 bytes `MMIDIDX\0\0`; u64 version 1; u8 dtype code; u64 sequences; u64 length of the document
index; int32 lengths; int64 byte offsets; int64 document index (begins with 0; each value counts the sequences so far).
"""

import contextlib
import fcntl
import glob
import hashlib
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from data_prep.errors import DataError

MAGIC = b"MMIDIDX\x00\x00"
_LEGACY = b"TNTIDX\x00\x00"
_DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
_INT32 = 4
_HEADER = struct.Struct("<9sQBQQ")
_BLOCK = 1 << 20
"""Numbers handled at a time where a whole index could be large."""


@dataclass(frozen=True, slots=True)
class Block:
    """Some documents in a row, as they are written.

    Attributes:
        ids: [tokens] int32, of all sequences, one after another.
        lengths: [sequences] int32, the tokens of each.
        documents: [documents] int64, the sequences of each.
    """

    ids: np.ndarray
    lengths: np.ndarray
    documents: np.ndarray


class IndexedDataset:
    """A data set on disk, memory-mapped: `len()` sequences, `[i]` the ids of one (read-only, of type `dtype`).

    Args:
        prefix: `P_{key}_document`, with or without `.bin` or `.idx`. `P` alone stands for its `text`, its `input_ids`
            (instruction data), or the only key it has.

    Attributes:
        prefix: The full prefix.
        dtype: Of the ids.
        sequence_lengths: [sequences] int32.
        document_indices: [documents + 1] int64: document d is sequences `[d]` to `[d + 1]`.

    Raises:
        DataError: A file is missing, broken, or of another format (named).
    """

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = find_prefix(prefix)
        index, data = Path(f"{self.prefix}.idx"), Path(f"{self.prefix}.bin")
        for file in (index, data):
            if not file.is_file():
                raise DataError(f"no such data set: {file}")
        self.dtype, count, documents = _read_header(index)
        raw = np.memmap(index, np.uint8, mode="r").view(np.ndarray)
        bounds = np.cumsum([_HEADER.size, 4 * count, 8 * count, 8 * documents])
        self.sequence_lengths = raw[bounds[0] : bounds[1]].view(np.int32)
        self._offsets = raw[bounds[1] : bounds[2]].view(np.int64)
        self.document_indices = raw[bounds[2] : bounds[3]].view(np.int64)
        if not documents or self.document_indices[0] != 0 or self.document_indices[-1] != count:
            raise DataError(f"{index} is broken: its document index does not go from 0 to its {count} sequences")
        size = data.stat().st_size
        if count and int(self._offsets[-1]) + int(self.sequence_lengths[-1]) * self.dtype.itemsize > size:
            raise DataError(f"{data} is truncated: its index goes beyond its {size} bytes")
        ids = size // self.dtype.itemsize
        self._ids = np.memmap(data, self.dtype, "r", shape=(ids,)).view(np.ndarray) if ids else np.empty(0, self.dtype)

    def __len__(self) -> int:
        return len(self.sequence_lengths)

    def __getitem__(self, number: int) -> np.ndarray:
        begin = int(self._offsets[number]) // self.dtype.itemsize
        return self._ids[begin : begin + int(self.sequence_lengths[number])]

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self[number] for number in range(len(self)))

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process maps the files itself."""
        return IndexedDataset, (self.prefix,)

    @property
    def offsets(self) -> np.ndarray:
        """[sequences] int64: where each sequence begins in the `.bin`, in bytes."""
        return self._offsets


def _read_header(index: Path) -> tuple[np.dtype[Any], int, int]:
    """dtype, number of sequences, length of the document index."""
    with index.open("rb") as file:
        head = file.read(_HEADER.size)
    if head.startswith(_LEGACY):
        raise DataError(f"{index} is of the lazy or cached kind: write it again with --dataset-impl mmap")
    if not head.startswith(MAGIC) or len(head) < _HEADER.size:
        raise DataError(f"{index} is no index of an indexed dataset")
    _, version, code, count, documents = _HEADER.unpack(head)
    if version != 1 or code not in _DTYPES:
        raise DataError(f"{index} has version {version} and dtype code {code}, which hold no token ids")
    size = index.stat().st_size
    if size < _HEADER.size + 12 * count + 8 * documents:
        raise DataError(f"{index} is truncated: {count} sequences need more than its {size} bytes")
    return np.dtype(_DTYPES[code]), count, documents


def find_prefixes(prefix: str | Path) -> list[Path]:
    """The full prefixes that `prefix` stands for: itself, or all keys of `P`; none where it is none."""
    path = _without_suffix(prefix)
    if Path(f"{path}.idx").exists():
        return [path]
    return sorted(_without_suffix(file) for file in glob.glob(f"{glob.escape(str(path))}_*_document.idx"))


def find_prefix(prefix: str | Path) -> Path:
    """The one full prefix that `prefix` stands for, for a reader of one pair of files; itself where there is none.

    Raises:
        DataError: `P` has several keys, none of them the obvious one.
    """
    path, found = _without_suffix(prefix), find_prefixes(prefix)
    if len(found) <= 1:
        return found[0] if found else path
    for key in ("text", "packed_input_ids"):
        if (choice := Path(f"{path}_{key}_document")) in found:
            return choice
    raise DataError(f"{path} has several keys: name one of {', '.join(each.name for each in found)}")


def _without_suffix(prefix: str | Path) -> Path:
    path = Path(prefix)
    return path.with_suffix("") if path.suffix in (".bin", ".idx") else path


class IndexedWriter:
    """Writes one data set, in int32 as every LLaMA-2 recipe does, in hidden files beside its place.

    Memory does not grow with the data: lengths and documents go to files as they come.

    Args:
        prefix: Full prefix of the pair. Its folder must exist.

    Attributes:
        tokens, sequences, documents: Written so far.
        sha256: Of the `.bin` and the `.idx`, by suffix, once they are complete.

    Raises:
        DataError: Another process is writing the same data set.
    """

    def __init__(self, prefix: Path) -> None:
        self.prefix = prefix
        self.tokens = self.sequences = self.documents = 0
        self.sha256: dict[str, str] = {}
        self._data_hash = hashlib.sha256()
        self._parts = {suffix: prefix.with_name(f".{prefix.name}{suffix}.part") for suffix in (".bin", ".idx", ".doc")}
        self._files: dict[str, BinaryIO] = {}
        try:
            for suffix, part in self._parts.items():
                self._files[suffix] = _open_locked(part)
        except BaseException:
            self._close()
            raise
        self._files[".idx"].write(bytes(_HEADER.size))
        self._files[".doc"].write(np.zeros(1, np.int64).tobytes())

    def add(self, block: Block) -> None:
        """Appends a block of documents."""
        data = np.ascontiguousarray(block.ids, "<i4").tobytes()
        self._data_hash.update(data)
        self._files[".bin"].write(data)
        self._files[".idx"].write(np.ascontiguousarray(block.lengths, "<i4").tobytes())
        ends = self.sequences + np.cumsum(block.documents, dtype="<i8")
        self._files[".doc"].write(ends.tobytes())
        self.tokens += len(block.ids)
        self.sequences += len(block.lengths)
        self.documents += len(block.documents)

    def finish(self) -> None:
        """Completes both files, still beside their places."""
        index = self._files[".idx"]
        offset = 0
        for lengths in self._numbers(".idx", "<i4", _HEADER.size, self.sequences):
            ends = offset + 4 * np.cumsum(lengths, dtype="<i8")
            index.write((ends - 4 * lengths.astype("<i8")).tobytes())
            offset = int(ends[-1])
        for documents in self._numbers(".doc", "<i8", 0, self.documents + 1):
            index.write(documents.tobytes())
        index.seek(0)
        index.write(_HEADER.pack(MAGIC, 1, _INT32, self.sequences, self.documents + 1))
        for suffix in (".bin", ".idx"):
            self._files[suffix].flush()
            os.fsync(self._files[suffix].fileno())
        self.sha256 = {".bin": self._data_hash.hexdigest(), ".idx": sha256_of(self._parts[".idx"])}

    def _numbers(self, suffix: str, dtype: str, begin: int, count: int) -> Iterator[np.ndarray]:
        """Numbers that were written to a part, read back in blocks through a second handle."""
        self._files[suffix].flush()
        with self._parts[suffix].open("rb") as file:
            file.seek(begin)
            while count:
                block = np.frombuffer(file.read(min(count, _BLOCK) * np.dtype(dtype).itemsize), dtype)
                count -= len(block)
                yield block

    def put(self, suffix: str) -> None:
        """Moves one finished file (".bin" or ".idx") to its place, over what is there."""
        self._parts[suffix].replace(f"{self.prefix}{suffix}")

    def discard(self) -> None:
        """Closes and removes what was not moved to its place."""
        for suffix in self._files:
            self._parts[suffix].unlink(missing_ok=True)
        self._close()

    def _close(self) -> None:
        for file in self._files.values():
            with contextlib.suppress(OSError):  # a full disk refuses what is still buffered; it is not wanted any more
                file.close()


def _open_locked(part: Path) -> BinaryIO:
    """`part`, empty; what a killed run left there is overwritten, what a living one writes is not."""
    file = os.fdopen(os.open(part, os.O_RDWR | os.O_CREAT, 0o666), "r+b")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise DataError(f"another run is writing {part}: wait for it, or choose another --output-prefix") from None
    except OSError:
        pass  # a file system without locks
    file.truncate()
    return file


def sha256_of(file: Path) -> str:
    """sha256 of a file's bytes, read in blocks."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
