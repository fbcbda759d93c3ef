"""Writes indexed datasets: see `indexed_dataset` for the bytes."""

import contextlib
import fcntl
import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from data_prep.errors import DataError
from data_prep.indexed_dataset import DTYPES, HEADER, MAGIC

_BLOCK = 1 << 20
"""Numbers, or bytes, handled at a time where all of them could be many."""
CODES = {np.dtype(kind).name: code for code, kind in DTYPES.items()}


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


class IndexedWriter:
    """Writes one data set in hidden files beside its place.

    Memory does not grow with the data: lengths and documents go to files as they come.

    Args:
        prefix: Full prefix of the pair. Its folder must exist.
        dtype: Of the ids: int32 as in every LLaMA-2 recipe, or another name of `CODES`.
        resume: What `state` of a killed run says: the files that it left are continued.

    Attributes:
        tokens, sequences, documents: Written so far.
        sha256: Of the `.bin` and the `.idx`, by suffix, once they are complete.

    Raises:
        DataError: Another process is writing the same data set, or what it should continue is not there.
    """

    def __init__(self, prefix: Path, dtype: str = "int32", resume: dict[str, int] | None = None) -> None:
        self.prefix = prefix
        self.tokens = self.sequences = self.documents = self._ended = 0
        self.sha256: dict[str, str] = {}
        self.dtype = np.dtype(DTYPES[CODES[dtype]]).newbyteorder("<")
        self._data_hash = hashlib.sha256()
        self._parts = {suffix: prefix.with_name(f".{prefix.name}{suffix}.part") for suffix in (".bin", ".idx", ".doc")}
        self._files: dict[str, BinaryIO] = {}
        try:
            for suffix, part in self._parts.items():
                self._files[suffix] = _open_locked(part)
            self._continue(resume) if resume else self._begin()
        except BaseException:
            self._close()
            raise

    def _begin(self) -> None:
        for file in self._files.values():
            file.truncate()
        self._files[".idx"].write(bytes(HEADER.size))
        self._files[".doc"].write(np.zeros(1, np.int64).tobytes())

    def _continue(self, state: dict[str, int]) -> None:
        """What was written behind the state is cut off, and the rest hashed once more."""
        self.tokens, self.sequences = state["tokens"], state["sequences"]
        self.documents, self._ended = state["documents"], state["ended"]
        sizes = {
            ".bin": self.tokens * self.dtype.itemsize,
            ".idx": HEADER.size + 4 * self.sequences,
            ".doc": 8 * (self.documents + 1),
        }
        for suffix, size in sizes.items():
            file = self._files[suffix]
            if file.seek(0, os.SEEK_END) < size:
                raise DataError(f"{self._parts[suffix]} is shorter than when it was noted: leave --resume out")
            file.truncate(size)
            file.seek(size)
        with self._parts[".bin"].open("rb") as content:
            while block := content.read(_BLOCK):
                self._data_hash.update(block)

    def state(self) -> dict[str, int]:
        """What is written and safe on the disk, for `resume`."""
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
        counts = {"tokens": self.tokens, "sequences": self.sequences}
        return {**counts, "documents": self.documents, "ended": self._ended}

    def add(self, block: Block) -> None:
        """Appends a block: ids, bounds of sequences and of documents, which may run ahead of each other."""
        data = np.ascontiguousarray(block.ids, self.dtype).data
        self._data_hash.update(data)
        self._files[".bin"].write(data)
        self._files[".idx"].write(np.ascontiguousarray(block.lengths, "<i4").data)
        ends = self._ended + np.cumsum(block.documents, dtype="<i8")
        self._files[".doc"].write(ends.data)
        self.tokens += len(block.ids)
        self.sequences += len(block.lengths)
        self.documents += len(block.documents)
        self._ended = int(ends[-1]) if len(ends) else self._ended

    def finish(self) -> None:
        """Completes both files, still beside their places."""
        index = self._files[".idx"]
        offset, size = 0, self.dtype.itemsize
        for lengths in self._numbers(".idx", "<i4", HEADER.size, self.sequences):
            ends = offset + size * np.cumsum(lengths, dtype="<i8")
            index.write((ends - size * lengths.astype("<i8")).tobytes())
            offset = int(ends[-1])
        for documents in self._numbers(".doc", "<i8", 0, self.documents + 1):
            index.write(documents.tobytes())
        index.seek(0)
        code = CODES[self.dtype.name]
        index.write(HEADER.pack(MAGIC, 1, code, self.sequences, self.documents + 1))
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
    """`part`, as a killed run may have left it; what a living one writes is not touched."""
    file = os.fdopen(os.open(part, os.O_RDWR | os.O_CREAT, 0o666), "r+b")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise DataError(f"another run is writing {part}: wait for it, or choose another --output-prefix") from None
    except OSError:
        pass  # a file system without locks
    return file


def sha256_of(file: Path) -> str:
    """sha256 of a file's bytes, read in blocks."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
