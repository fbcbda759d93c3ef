"""Exact SentencePiece ids of many texts at once, each distinct chunk encoded once.

A chunk is a run of spaces, or one newline, and what follows it up to the next of either. In a vocabulary where no piece
holds a space behind another character, and none holds a newline beside another, BPE never merges across the beginning
of a chunk: the ids of a text are those of its chunks, one after another. `independent` says whether that is so.

Texts go through Arrow and numpy as columns: the places of all chunks, the distinct ones among them, and their ids
gathered, without a Python object a chunk.
"""

import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

_SPACE, _NEWLINE = 32, 10
_BPE = 2
_LONGEST_KEY = 128
"""Bytes of a chunk that is kept: longer ones hardly come twice."""
_CACHE_BYTES = 24 << 20
_ENTRY_BYTES = 220
"""What an entry of the cache takes in Python's memory, besides its key and its ids."""
_AT_ONCE = 4096
"""New chunks that the library gets at once: it hands back an array for each."""
_LEARNT = 1 << 17
"""Bytes of text to be met before the share of new chunks says anything about it; and that are tried by themselves."""
_GIVE_UP = 0.4
"""Share of the bytes in chunks met for the first time above which the library alone is as fast."""
_PAUSE = 15
"""Batches that the library then gets whole, before the cache is tried again."""


EncodeRows = Callable[[Sequence[str]], Sequence[np.ndarray]]
"""Ids of each of some texts, int32."""


@dataclass
class Counts:
    """How the cache did: chunks looked up, and those of them that the library had to encode."""

    chunks: int = 0
    misses: int = 0
    bypassed_bytes: int = 0
    """Bytes of text that went to the library whole."""

    def take(self) -> "Counts":
        """The counts so far; they begin anew."""
        taken = Counts(self.chunks, self.misses, self.bypassed_bytes)
        self.chunks = self.misses = self.bypassed_bytes = 0
        return taken

    def add(self, other: "Counts") -> None:
        """Adds what another process counted."""
        self.chunks += other.chunks
        self.misses += other.misses
        self.bypassed_bytes += other.bypassed_bytes


def independent(proto: bytes, pieces: Sequence[str]) -> bool:
    """Whether a text of this model may be cut before each run of spaces.

    Args:
        proto: The model as it is serialized: only BPE without normalization is known to keep chunks apart.
        pieces: Its pieces by id.
    """
    trainer, normalizer = dict[int, Any](), dict[int, Any]()
    for number, value in _fields(proto):
        if number in (2, 3) and isinstance(value, bytes):
            (trainer if number == 2 else normalizer).update(_fields(value))
    folds = normalizer.get(2) or not normalizer.get(3, 1) or normalizer.get(4, 1) or not normalizer.get(5, 1)
    if trainer.get(3, 1) != _BPE or trainer.get(24, 0) or folds:
        return False
    return "▁" in pieces and not space_inside(pieces)


def space_inside(pieces: Sequence[str]) -> bool:
    """Whether a piece holds a space behind another character."""
    return re.search("[^▁\0]▁", "\0".join(pieces)) is not None


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(number, value) of fields of a protobuf message, but for those of number 1.

    SentencePiece's own reader of it needs another library.
    """
    at = 0
    while at < len(message):
        while message[at] == 10 and message[at + 1] < 128 and at + 2 + message[at + 1] < len(message):
            at += 2 + message[at + 1]  # a short field 1: the pieces, which nobody asks for
        tag, at = _varint(message, at)
        if tag & 7 == 0:
            value, at = _varint(message, at)
            yield tag >> 3, value
        else:
            size, at = _varint(message, at) if tag & 7 == 2 else ({1: 8, 5: 4}[tag & 7], at)
            yield tag >> 3, message[at : at + size]
            at += size


def _varint(message: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at


@dataclass(frozen=True)
class Encoded:
    """Ids of some texts.

    Attributes:
        ids: [tokens] int32, of all texts, one after another.
        lengths: [texts] int64, the tokens of each.
        before: [texts] int64, the tokens up to the asked place of each text; empty if none was asked for.
    """

    ids: np.ndarray
    lengths: np.ndarray
    before: np.ndarray


class OddChunkError(Exception):
    """A text holds something that must not be encoded by chunks."""


NO_PLACES = np.empty(0, np.int64)


class ChunkEncoder:
    """SentencePiece on the distinct chunks of the texts.

    Args:
        encode_rows: Ids of each of some texts, by a library for whose vocabulary `independent` holds.
        space_id: The id of `▁` by itself.
        cut_newlines: Each newline is a piece by itself, wherever it stands: a text may be cut before it, too.
        odd: What a chunk may not hold: special tokens, and `▁`, which is a space to the model.
    """

    def __init__(self, encode_rows: EncodeRows, space_id: int, cut_newlines: bool, odd: Collection[str]) -> None:
        self.counts = Counts()
        self._odd = re.compile(b"|".join(re.escape(token.encode()) for token in odd))
        self._encode_rows, self._cut_newlines = encode_rows, cut_newlines
        self._space = np.array([space_id], "<i4").tobytes()
        self._young: dict[bytes, bytes] = {}
        self._old: dict[bytes, bytes] = {}
        self._bytes = self._pause = self._met = 0
        self._tried = False

    def encode(self, texts: pa.Array, places: np.ndarray = NO_PLACES) -> Encoded | None:
        """Ids of texts of which none is empty; None where the library alone is as fast.

        Args:
            texts: [texts] string. Together below 2 GiB.
            places: [texts] int64: a byte of each text behind a newline; with `cut_newlines` only.

        Raises:
            OddChunkError: A text holds what no chunk may.
        """
        size = texts.nbytes
        if self._pause or not self._pays(texts, size):
            self._pause -= 1
            self.counts.bypassed_bytes += size
            return None
        done = self._encode(texts, places, size)
        self.counts.bypassed_bytes += 0 if done else size
        return done

    def _pays(self, texts: pa.Array, size: int) -> bool:
        """Whether a part of the texts, at the beginning and after each pause, says that the cache is worth a try."""
        if self._tried or size < 2 * _LEARNT:
            return True
        part, chunks = texts.slice(0, max(1, len(texts) * _LEARNT * 5 // (4 * size))), self.counts.chunks
        self._tried = self._encode(part, NO_PLACES, part.nbytes) is not None
        self.counts.chunks = chunks  # they are looked up once more
        return self._tried

    def _encode(self, texts: pa.Array, places: np.ndarray, size: int) -> Encoded | None:
        joined = pc.binary_join_element_wise(pa.scalar(" "), texts, pa.scalar(""))  # SentencePiece's own dummy prefix
        starts = np.frombuffer(joined.buffers()[1], np.int32)[: len(texts) + 1]
        cuts = self._cuts(np.frombuffer(joined.buffers()[2], np.uint8)[: starts[-1]], starts[:-1])
        bounds = pa.py_buffer(np.append(cuts, starts[-1]))
        chunks = pa.Array.from_buffers(pa.binary(), len(cuts), [None, bounds, joined.buffers()[2]]).dictionary_encode()
        table = self._table(chunks.dictionary, size)
        if table is None:
            return None
        self.counts.chunks += len(cuts)
        gathered = table.take(chunks.indices)
        ends = np.frombuffer(gathered.buffers()[1], np.int32)[: len(cuts) + 1] // 4
        ids = np.frombuffer(gathered.buffers()[2], np.int32) if ends[-1] else np.empty(0, np.int32)
        first = ends[np.append(np.searchsorted(cuts, starts[:-1]), len(cuts))].astype(np.int64)
        before = NO_PLACES
        if len(places):  # joined has one space more before each text; the byte before the place is the newline
            before = ends[np.searchsorted(cuts, starts[:-1] + places)] + 1 - first[:-1]
        return Encoded(ids[: ends[-1]], np.diff(first), before)

    def learnt(self, most: int) -> list[tuple[str, list[int]]]:
        """Texts that each are a chunk which was met, with their ids; at most so many."""
        found = []
        for key, ids in islice(chain(self._young.items(), self._old.items()), most):
            if key[0] == _SPACE and len(key) > 1:
                found.append((key[1:].decode(), np.frombuffer(ids, "<i4").tolist()))
        return found

    def _cuts(self, data: np.ndarray, starts: np.ndarray) -> np.ndarray:
        """[chunks] int32: where each begins."""
        space = data == _SPACE
        cut = space.copy()
        cut[1:] &= ~space[:-1]
        if self._cut_newlines:
            cut |= data == _NEWLINE
        cut[starts] = True
        return np.flatnonzero(cut).astype(np.int32)

    def _table(self, distinct: pa.Array, size: int) -> pa.Array | None:
        """[chunks] binary: the ids of each distinct chunk as int32; None where too many are new."""
        keys: list[bytes] = distinct.to_pylist()
        found = list(map(self._young.get, keys))
        new = [at for at, ids in enumerate(found) if ids is None]
        if self._old:
            new = [at for at in new if not self._found_in_old(keys[at], at, found)]
        self._met += size
        if any(map(self._odd.search, [keys[at] for at in new])):
            raise OddChunkError
        if new and self._met > _LEARNT and sum(len(keys[at]) for at in new) > _GIVE_UP * size:
            self._pause, self._tried = _PAUSE, False
            return None
        for at, ids in zip(new, self._encode_chunks([keys[at] for at in new]), strict=True):
            found[at] = ids
            if len(keys[at]) <= _LONGEST_KEY:
                self._keep(keys[at], ids)
        self.counts.misses += len(new)
        return pa.array(found, pa.binary())

    def _found_in_old(self, key: bytes, at: int, found: list[bytes | None]) -> bool:
        ids = found[at] = self._old.get(key)
        if ids is not None:
            self._keep(key, ids)
        return ids is not None

    def _encode_chunks(self, chunks: list[bytes]) -> Iterator[bytes]:
        """A chunk's leading space is what the library puts before a text; before a newline it is one piece too many."""
        for at in range(0, len(chunks), _AT_ONCE):
            some = chunks[at : at + _AT_ONCE]
            rows = self._encode_rows([chunk.removeprefix(b" ").decode() for chunk in some])
            for chunk, row in zip(some, rows, strict=True):
                if chunk == b" ":
                    yield self._space
                else:
                    yield (row[1:] if chunk[0] == _NEWLINE else row).tobytes()

    def _keep(self, key: bytes, ids: bytes) -> None:
        """Bounds the cache by halves: when the young one is full it becomes the old one, whose entries are dropped."""
        self._bytes += len(key) + len(ids) + _ENTRY_BYTES
        if self._bytes > _CACHE_BYTES // 2:
            self._old, self._young, self._bytes = self._young, {}, 0
        self._young[key] = ids


def flat(rows: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Ids of some texts as ids [tokens] int32 of all, and lengths [rows] int64."""
    lengths = np.fromiter(map(len, rows), np.int64, len(rows))
    return np.concatenate([np.empty(0, np.int32), *rows]), lengths
