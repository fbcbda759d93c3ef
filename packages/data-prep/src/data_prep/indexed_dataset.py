r"""Megatron's indexed dataset: `P.bin` holds token ids one after another, `P.idx` where each sequence lies.

`.idx`, little-endian: 9 bytes `MMIDIDX\0\0`; u64 version 1; u8 dtype code; u64 sequences; u64 length of the document
index; int32 lengths; int64 byte offsets; int64 document index (begins with 0; each value counts the sequences so far).
"""

import difflib
import glob
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.errors import DataError

MAGIC = b"MMIDIDX\x00\x00"
_LEGACY = b"TNTIDX\x00\x00"
DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
"""Codes of the integer types. Codes 6 and 7 are floats, which Megatron-LM and AscendSpeed give to each other's type."""
HEADER = struct.Struct("<9sQBQQ")

_PIECE = 1 << 20
"""Tokens that are handled at a time where all of them could be many."""


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
                raise missing(file)
        self.dtype, count, documents = _read_header(index)
        raw = np.memmap(index, np.uint8, mode="r").view(np.ndarray)
        bounds = np.cumsum([HEADER.size, 4 * count, 8 * count, 8 * documents])
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

    def span(self, begin: int, end: int) -> np.ndarray:
        """The ids of sequences `begin` to `end`, one after another."""
        if begin >= end:
            return np.empty(0, self.dtype)
        offsets = self._offsets[begin:end]
        sizes = self.sequence_lengths[begin:end].astype(np.int64) * self.dtype.itemsize
        if (offsets == offsets[0] + np.cumsum(sizes) - sizes).all():
            first = int(offsets[0]) // self.dtype.itemsize
            return self._ids[first : first + int(sizes.sum()) // self.dtype.itemsize]
        return np.concatenate([self[number] for number in range(begin, end)])

    def pieces(self, tokens: int = _PIECE) -> Iterator[tuple[int, int]]:
        """(begin, end) of sequences in a row that hold about so many tokens together, from the first to the last."""
        begin = before = 0
        step = max(1, tokens // 8)
        while begin < len(self):
            ends = before + np.cumsum(self.sequence_lengths[begin : begin + step], dtype=np.int64)
            end = begin + max(1, int(np.searchsorted(ends, before + tokens, side="right")))
            before = int(ends[end - begin - 1])
            yield begin, end
            begin = end

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self[number] for number in range(len(self)))

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process maps the files itself."""
        return IndexedDataset, (self.prefix,)

    @property
    def offsets(self) -> np.ndarray:
        """[sequences] int64: where each sequence begins in the `.bin`, in bytes."""
        return self._offsets


def missing(file: Path) -> DataError:
    """The error that a data set is not there, with the nearest name of those that are."""
    names = sorted({each.name.removesuffix(".idx") for each in file.parent.glob("*.idx")})
    near = difflib.get_close_matches(file.name.removesuffix(file.suffix), names, 1, cutoff=0.7)
    return DataError(f"no such data set: {file}" + (f"; perhaps you meant {file.parent / near[0]}" if near else ""))


def _read_header(index: Path) -> tuple[np.dtype[Any], int, int]:
    """dtype, number of sequences, length of the document index."""
    with index.open("rb") as file:
        head = file.read(HEADER.size)
    if head.startswith(_LEGACY):
        raise DataError(f"{index} is of the lazy or cached kind: write it again with --dataset-impl mmap")
    if not head.startswith(MAGIC) or len(head) < HEADER.size:
        raise DataError(f"{index} is no index of an indexed dataset")
    _, version, code, count, documents = HEADER.unpack(head)
    if version != 1 or code not in DTYPES:
        raise DataError(f"{index} has version {version} and dtype code {code}, which hold no token ids")
    size = index.stat().st_size
    if size < HEADER.size + 12 * count + 8 * documents:
        raise DataError(f"{index} is truncated: {count} sequences need more than its {size} bytes")
    return np.dtype(DTYPES[code]), count, documents


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
