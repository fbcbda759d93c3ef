"""Files of lines: the reader finds the ends of lines only, whoever gets a batch takes them apart."""

import json
from collections.abc import Iterator
from dataclasses import dataclass

from data_prep import batching
from data_prep.batching import Batch
from data_prep.errors import DataError
from data_prep.opening import Opened, opened
from data_prep.rows import Record, Rows
from data_prep.sources import Source

LONGEST_LINE = 1 << 30
"""Bytes beyond which a line is taken for a broken file rather than read on."""
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class LineBatch:
    """Whole lines of a file, as bytes."""

    file: str
    kind: str
    first: int
    content: bytes
    end: int
    read_bytes: int

    def rows(self, skip_bad: bool) -> Rows:
        """The lines, taken apart."""
        numbers: list[int] = []
        records: list[Record] = []
        bad: list[str] = []
        for number, line in enumerate(self._lines(), self.first):
            if not line.strip(b"\r\n" if self.kind == ".txt" else None):
                continue
            try:
                records.append(self._record(line))
                numbers.append(number)
            except _NoRecordError as error:
                bad.append(f"{self.file}, line {number} {error}")
                if not skip_bad:
                    raise DataError(bad[0]) from None
        return Rows(self.file, "line", numbers, records, bad)

    def _lines(self) -> Iterator[bytes]:
        """A lone CR ends a line of text, as upstream reads it; it is white space in JSON."""
        content = self.content
        if self.kind == ".txt" and b"\r" in content:
            content = content.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        begin = 0
        while begin < len(content):  # one by one: a line may be as large as can be
            end = content.find(b"\n", begin)
            end = len(content) if end < 0 else end
            yield content[begin:end]
            begin = end + 1

    def _record(self, line: bytes) -> Record:
        try:
            text = line.decode()
            record = {"text": text} if self.kind == ".txt" else json.loads(text)
        except UnicodeDecodeError as error:
            raise _NoRecordError(f"is not UTF-8: {error.reason} ({line[error.start : error.start + 4]!r})") from None
        except (ValueError, RecursionError) as error:  # numbers of thousands of digits are no number to Python
            raise _NoRecordError(f"is not JSON: {error}") from None
        if not isinstance(record, dict):
            raise _NoRecordError(f"holds a {type(record).__name__}, not an object")
        return record


class _NoRecordError(Exception):
    """What is wrong with a line."""


def line_batches(source: Source) -> Iterator[Batch]:
    """A line belongs to the part that its first byte lies in."""
    with opened(source.path, source.member, source.packing) as stream:
        number, at, last = _skip(stream, source.begin if source.aligned else max(source.begin - 1, 0), source.kind)
        rest = b""
        if source.begin and not source.aligned:  # the line that the byte before it lies in began earlier
            while b"\n" not in rest and (more := stream.read(batching.BLOCK)):
                rest += more
            head, newline, rest = rest.partition(b"\n")
            at += len(head + newline)
            number += _count(head + newline, source.kind, last)
        elif not source.begin:
            rest = stream.read(batching.BLOCK)
            if rest.startswith(_BOM):
                rest, at = rest[3:], 3
        while source.end is None or at < source.end:
            limit = None if source.end is None else source.end - at
            try:
                content, rest = _whole_lines(stream, rest, limit, source.kind)
            except _NoRecordError as error:
                raise DataError(f"{source.name}, line {number} {error}") from None
            if not content:
                return
            at += len(content)
            yield LineBatch(source.name, source.kind, number, content, at, stream.done())
            number += _count(content, source.kind)


def _whole_lines(stream: Opened, rest: bytes, limit: int | None, kind: str) -> tuple[bytes, bytes]:
    """About `BATCH_BYTES` of whole lines, none of which begins at `limit` or behind it, and what was read beyond."""
    size = batching.BATCH_BYTES if limit is None else min(batching.BATCH_BYTES, limit)
    blocks, have, cut = [rest], len(rest), _last_end(rest, kind)
    while have < size or not cut:
        more = stream.read(max(size - have, batching.BLOCK))
        if not more:
            cut = have
            break
        cut = have + _last_end(more, kind) if _last_end(more, kind) else cut
        blocks.append(more)
        have += len(more)
        if not cut and have > LONGEST_LINE:
            raise _NoRecordError(f"does not end within {have} bytes: this is no file of lines")
    content = b"".join(blocks)
    if limit is not None and have > limit:
        return _cut_behind(stream, content, limit)
    return content[:cut], content[cut:]


def _last_end(block: bytes, kind: str) -> int:
    """Where the last line that surely ends in `block` does; 0 if none does."""
    cut = block.rfind(b"\n") + 1
    return max(cut, block.rfind(b"\r", 0, -1) + 1) if kind == ".txt" and not cut else cut


def _cut_behind(stream: Opened, content: bytes, limit: int) -> tuple[bytes, bytes]:
    """The lines that begin before `limit`, the last of them whole."""
    cut = content.find(b"\n", limit - 1)
    while cut < 0 and (more := stream.read(batching.BLOCK)):
        at = len(content)
        content += more
        cut = content.find(b"\n", at)
    return (content, b"") if cut < 0 else (content[: cut + 1], content[cut + 1 :])


def _skip(stream: Opened, size: int, kind: str) -> tuple[int, int, bytes]:
    """(number of the line there, the byte, the byte before it) once `size` bytes are behind."""
    number, at, last = 1, 0, b""
    while at < size and (block := stream.read(min(batching.BLOCK, size - at))):
        number += _count(block, kind, last)
        at += len(block)
        last = block[-1:]
    return number, at, last


def _count(content: bytes, kind: str, last: bytes = b"") -> int:
    """The lines that end in `content`; `last` is the byte before it, which may be half of a CRLF."""
    count = content.count(b"\n")
    if kind == ".txt" and b"\r" in last + content:
        count += content.count(b"\r") - (last + content).count(b"\r\n")
    return count
