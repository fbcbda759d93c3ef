r"""Megatron's indexed dataset: `P.bin` holds token ids one after another, `P.idx` where each sequence lies.

`.idx`, little-endian: 9 bytes `MMIDIDX\0\0`; u64 version 1; u8 dtype code; u64 sequences; u64 length of the document
index; int32 lengths; int64 byte offsets; int64 document index (begins with 0; each value counts the sequences so far).
"""

import os
import struct
from array import array
from pathlib import Path

import numpy as np

from data_prep.errors import DataError

MAGIC = b"MMIDIDX\x00\x00"
_LEGACY = b"TNTIDX\x00\x00"
_DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
_INT32 = 4
_HEADER = 34


class IndexedDataset:
    """A data set on disk, memory-mapped: `len()` sequences, `[i]` the ids of one.

    Args:
        prefix: `P`, with or without its `.bin` or `.idx`; `P` alone finds `P_text_document`.

    Raises:
        DataError: A file is missing, broken, or of another format (named).
    """

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = find_prefix(prefix)
        index = Path(f"{self.prefix}.idx")
        data = Path(f"{self.prefix}.bin")
        for file in (index, data):
            if not file.exists():
                raise DataError(f"no such data set: {file}")
        with index.open("rb") as opened:
            head = opened.read(_HEADER)
        if head.startswith(_LEGACY):
            raise DataError(f"{index} is of the lazy or cached kind: write it with --dataset-impl mmap")
        if not head.startswith(MAGIC) or len(head) < _HEADER:
            raise DataError(f"{index} is no index of an indexed dataset")
        version, code, count, documents = struct.unpack("<QBQQ", head[len(MAGIC) :])
        if version != 1 or code not in _DTYPES:
            raise DataError(f"{index} has version {version} and dtype code {code}, which hold no token ids")
        if index.stat().st_size < _HEADER + 12 * count + 8 * documents:
            raise DataError(f"{index} is truncated: {count} sequences need more than its {index.stat().st_size} bytes")
        self.dtype = np.dtype(_DTYPES[code])
        raw = np.memmap(index, np.uint8, mode="r")
        at = _HEADER
        self.sequence_lengths = raw[at : at + 4 * count].view(np.int32)
        at += 4 * count
        self._offsets = raw[at : at + 8 * count].view(np.int64)
        at += 8 * count
        self.document_indices = raw[at : at + 8 * documents].view(np.int64)
        size = data.stat().st_size
        if count and int(self._offsets[-1]) + int(self.sequence_lengths[-1]) * self.dtype.itemsize > size:
            raise DataError(f"{data} is truncated: its index goes beyond its {size} bytes")
        self._ids = np.memmap(data, self.dtype, mode="r") if size else np.empty(0, self.dtype)

    def __len__(self) -> int:
        return len(self.sequence_lengths)

    def __getitem__(self, number: int) -> np.ndarray:
        begin = int(self._offsets[number]) // self.dtype.itemsize
        return self._ids[begin : begin + int(self.sequence_lengths[number])]


def find_prefix(prefix: str | Path) -> Path:
    """The prefix of one pair of files: as given, without a suffix, or `P_text_document` for `P`."""
    path = Path(prefix)
    if path.suffix in (".bin", ".idx"):
        path = path.with_suffix("")
    default = path.with_name(f"{path.name}_text_document")
    return default if not Path(f"{path}.idx").exists() and Path(f"{default}.idx").exists() else path


class IndexedWriter:
    """Writes one data set beside its place, in int32 as every LLaMA-2 recipe does; `commit` puts it there."""

    def __init__(self, prefix: Path) -> None:
        self.prefix = prefix
        self._parts = {suffix: prefix.with_name(f".{prefix.name}{suffix}.part") for suffix in (".bin", ".idx")}
        self._data = self._parts[".bin"].open("wb")
        self._lengths, self._documents = array("i"), array("q", [0])
        self.tokens = 0

    def add_document(self, ids: np.ndarray) -> None:
        """One document of one sequence."""
        self._data.write(np.ascontiguousarray(ids, np.int32).data)
        self._lengths.append(len(ids))
        self._documents.append(len(self._lengths))
        self.tokens += len(ids)

    @property
    def documents(self) -> int:
        """Written so far."""
        return len(self._lengths)

    def finish(self) -> None:
        """Completes both files beside their places."""
        _close(self._data)
        lengths = np.frombuffer(self._lengths, np.int32)
        offsets = np.zeros(len(lengths), np.int64)
        np.cumsum(4 * lengths[:-1].astype(np.int64), out=offsets[1:])
        with self._parts[".idx"].open("wb") as file:
            file.write(MAGIC + struct.pack("<QBQQ", 1, _INT32, len(lengths), len(self._documents)))
            for part in (lengths, offsets, np.frombuffer(self._documents, np.int64)):
                file.write(part.tobytes())
            _close(file)

    def commit(self) -> None:
        """Puts both files in place, the index last: readers refuse a `.bin` without it."""
        for suffix, part in self._parts.items():
            part.replace(f"{self.prefix}{suffix}")

    def discard(self) -> None:
        """Removes what was written beside the place."""
        self._data.close()
        for part in self._parts.values():
            part.unlink(missing_ok=True)


def _close(file) -> None:  # type: ignore[no-untyped-def]
    file.flush()
    os.fsync(file.fileno())
    file.close()
