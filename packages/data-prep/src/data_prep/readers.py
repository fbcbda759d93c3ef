"""Each kind of file as a stream of batches.

A batch travels to whoever works on it as it lies in the file, and becomes rows there: of files of lines the reader only
finds the ends of lines.
"""

import csv
import io
import json
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import pyarrow as pa

from data_prep.errors import DataError
from data_prep.json_list import list_items
from data_prep.opening import Opened, opened, seekable
from data_prep.rows import Record, Rows, no_column
from data_prep.sources import Source

BATCH_BYTES = 2 << 20
"""A batch ends with the record that reaches it."""
BATCH_ROWS = 8192
_BLOCK = 1 << 20
_BOM = b"\xef\xbb\xbf"


class Batch(Protocol):
    """Some records of a file, in their order."""

    @property
    def end(self) -> int:
        """Where the next batch begins, on the source's axis."""

    @property
    def read_bytes(self) -> int:
        """About how much of the file has been read, for a progress bar."""

    def rows(self, skip_bad: bool) -> Rows:
        """The records.

        Args:
            skip_bad: Whether what is none is left out, and noted in `Rows.bad`.

        Raises:
            DataError: Something is no record; it is named.
        """


def batches(source: Source, columns: Collection[str], optional: Collection[str], *, skip_bad: bool) -> Iterator[Batch]:
    """The batches of a source, from `source.begin` to `source.end`.

    Args:
        source: What to read.
        columns: Asked of each record. Only tables save the reading of others.
        optional: Read where they are there.
        skip_bad: Whether what is no record is left out, where the file can be read on behind it.

    Raises:
        DataError: The file or a record is broken; file and line are named.
    """
    if source.kind in (".parquet", ".arrow"):
        return _tables(source, columns, optional)
    if source.kind in ("lines", ".txt"):
        return _line_batches(source)
    return _record_batches(source, skip_bad=skip_bad)


@dataclass(frozen=True)
class TableBatch:
    """Rows of a table."""

    file: str
    first: int
    table: pa.RecordBatch
    end: int
    read_bytes: int

    def __reduce__(self) -> tuple[Any, ...]:
        """Of a slice, Arrow's own pickles hold the whole."""
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, self.table.schema) as writer:
            writer.write_batch(self.table)
        return _table_batch, (self.file, self.first, sink.getvalue().to_pybytes(), self.end, self.read_bytes)

    def rows(self, skip_bad: bool) -> Rows:
        """The rows."""
        return Rows(self.file, "row", range(self.first, self.first + len(self.table)), self.table)


def _table_batch(file: str, first: int, content: bytes, end: int, read_bytes: int) -> TableBatch:
    with pa.ipc.open_stream(content) as reader:
        return TableBatch(file, first, reader.read_next_batch(), end, read_bytes)


def count_rows(source: Source) -> int:
    """The number of rows of a table, without reading them where the file says it."""
    with seekable(source.path, source.member, source.packing) as file:
        try:
            if source.kind == ".parquet":
                import pyarrow.parquet as pq

                return int(pq.ParquetFile(file).metadata.num_rows)
            return sum(len(batch) for batch in _arrow(file))
        except pa.ArrowException as error:
            raise _no_table(source, error) from None


def _no_table(source: Source, error: Exception) -> DataError:
    return DataError(f"{source.name} is no {source.kind[1:]} file: {str(error).splitlines()[0]}")


def _tables(source: Source, columns: Collection[str], optional: Collection[str]) -> Iterator[Batch]:
    at = 0
    with seekable(source.path, source.member, source.packing) as file:
        try:
            for table in _parquet(source, file, columns, optional) if source.kind == ".parquet" else _arrow(file):
                there = table.schema.names
                _check_columns(source, columns, there)
                low, high = max(source.begin - at, 0), len(table)
                if source.end is not None:
                    high = min(high, source.end - at)
                wanted = [name for name in there if name in columns or name in optional]
                if low < high:
                    part = table.slice(low, high - low).select(wanted)
                    yield from _slices(source.name, at + low, part, file.tell())
                at += len(table)
                if source.end is not None and at >= source.end:
                    return
        except pa.ArrowException as error:
            raise _no_table(source, error) from None


def _check_columns(source: Source, columns: Collection[str], there: Collection[str]) -> None:
    if absent := [name for name in columns if name not in there]:
        raise no_column(source.name, absent[0], there)


def _slices(file: str, first: int, table: pa.RecordBatch, read_bytes: int) -> Iterator[Batch]:
    """The rows in batches of about `BATCH_BYTES`."""
    rows = max(1, min(BATCH_ROWS, len(table) * BATCH_BYTES // max(table.nbytes, 1)))
    for at in range(0, len(table), rows):
        part = table.slice(at, rows)
        yield TableBatch(file, first + at + 1, part, first + at + len(part), read_bytes)


def _parquet(
    source: Source, file: Any, columns: Collection[str], optional: Collection[str]
) -> Iterator[pa.RecordBatch]:
    """Batches of as many rows as hold `BATCH_BYTES` on an average, so that memory stays flat in their size."""
    import pyarrow.parquet as pq

    whole = pq.ParquetFile(file, pre_buffer=False, buffer_size=_BLOCK)
    _check_columns(source, columns, whole.schema_arrow.names)
    wanted = [name for name in whole.schema_arrow.names if name in columns or name in optional]
    facts, at = whole.metadata, 0
    for group in range(facts.num_row_groups):
        count = facts.row_group(group).num_rows
        if source.begin < at + count and (source.end is None or at < source.end):
            about = _bytes_of(facts.row_group(group), wanted) // max(count, 1) + 1
            rows = max(1, min(BATCH_ROWS, BATCH_BYTES // about))
            yield from whole.iter_batches(rows, row_groups=[group], columns=wanted, use_threads=False)
        elif count:
            yield from _unread(whole.schema_arrow, count)
        at += count
    if not facts.num_row_groups:
        yield from _unread(whole.schema_arrow, 0)


def _unread(schema: pa.Schema, count: int) -> Iterator[pa.RecordBatch]:
    """Stands for rows of other parts: as many, and nothing in them."""
    columns = [pa.nulls(count, pa.null()) for _ in schema.names]
    yield pa.RecordBatch.from_arrays(columns, schema.names)


def _bytes_of(group: Any, wanted: Collection[str]) -> int:
    columns = (group.column(number) for number in range(group.num_columns))
    return sum(each.total_uncompressed_size for each in columns if each.path_in_schema.split(".")[0] in wanted)


def _arrow(file: Any) -> Iterator[pa.RecordBatch]:
    """Both of Arrow's forms: with a footer, and as a stream, as Hugging Face's datasets are cached."""
    if file.read(6) == b"ARROW1":
        reader = pa.ipc.open_file(file)
        for number in range(reader.num_record_batches):
            yield reader.get_batch(number)
        return
    file.seek(0)
    yield from pa.ipc.open_stream(file)


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
        except (json.JSONDecodeError, RecursionError) as error:
            raise _NoRecordError(f"is not JSON: {error}") from None
        if not isinstance(record, dict):
            raise _NoRecordError(f"holds a {type(record).__name__}, not an object")
        return record


class _NoRecordError(Exception):
    """What is wrong with a line."""


def _line_batches(source: Source) -> Iterator[Batch]:
    """A line belongs to the part that its first byte lies in."""
    with opened(source.path, source.member, source.packing) as stream:
        number, at, last = _skip(stream, source.begin if source.aligned else max(source.begin - 1, 0), source.kind)
        rest = b""
        if source.begin and not source.aligned:  # the line that the byte before it lies in began earlier
            while b"\n" not in rest and (more := stream.read(_BLOCK)):
                rest += more
            head, newline, rest = rest.partition(b"\n")
            at += len(head + newline)
            number += _count(head + newline, source.kind, last)
        elif not source.begin:
            rest = stream.read(_BLOCK)
            if rest.startswith(_BOM):
                rest, at = rest[3:], 3
        while source.end is None or at < source.end:
            content, rest = _whole_lines(stream, rest, None if source.end is None else source.end - at, source.kind)
            if not content:
                return
            at += len(content)
            yield LineBatch(source.name, source.kind, number, content, at, stream.done())
            number += _count(content, source.kind)


def _whole_lines(stream: Opened, rest: bytes, limit: int | None, kind: str) -> tuple[bytes, bytes]:
    """About `BATCH_BYTES` of whole lines, none of which begins at `limit` or behind it, and what was read beyond."""
    size = BATCH_BYTES if limit is None else min(BATCH_BYTES, limit)
    blocks, have, cut = [rest], len(rest), _last_end(rest, kind)
    while have < size or not cut:
        more = stream.read(max(size - have, _BLOCK))
        if not more:
            cut = have
            break
        cut = have + _last_end(more, kind) if _last_end(more, kind) else cut
        blocks.append(more)
        have += len(more)
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
    while cut < 0 and (more := stream.read(_BLOCK)):
        at = len(content)
        content += more
        cut = content.find(b"\n", at)
    return (content, b"") if cut < 0 else (content[: cut + 1], content[cut + 1 :])


def _skip(stream: Opened, size: int, kind: str) -> tuple[int, int, bytes]:
    """(number of the line there, the byte, the byte before it) once `size` bytes are behind."""
    number, at, last = 1, 0, b""
    while at < size and (block := stream.read(min(_BLOCK, size - at))):
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


@dataclass(frozen=True)
class RecordBatch:
    """Records of a file that only its reader can take apart."""

    file: str
    numbers: list[int]
    records: list[Record]
    bad: list[str]
    end: int
    read_bytes: int

    def rows(self, skip_bad: bool) -> Rows:
        """The records."""
        return Rows(self.file, "line", self.numbers, self.records, self.bad)


def _record_batches(source: Source, *, skip_bad: bool) -> Iterator[Batch]:
    numbers: list[int] = []
    records: list[Record] = []
    bad: list[str] = []
    size = at = 0
    with opened(source.path, source.member, source.packing) as stream:
        for number, found in _json_list(source, stream) if source.kind == "list" else _csv(source, stream):
            at += 1
            if at <= source.begin:
                continue
            if isinstance(found, str):
                bad.append(f"{source.name}, line {number} {found}")
                if not skip_bad:
                    raise DataError(bad[0])
            else:
                numbers.append(number)
                records.append(found)
                size += 64 + sum(len(value) for value in found.values() if isinstance(value, str))
            if size >= BATCH_BYTES or len(records) == BATCH_ROWS:
                yield RecordBatch(source.name, numbers, records, bad, at, stream.done())
                numbers, records, bad, size = [], [], [], 0
        if records or bad:
            yield RecordBatch(source.name, numbers, records, bad, at, stream.done())


def _json_list(source: Source, stream: Opened) -> Iterator[tuple[int, Record | str]]:
    """The objects of one list; what is no object comes as the words that say so."""
    text = io.TextIOWrapper(_buffered(stream), encoding="utf-8-sig", newline="\n")
    try:
        for number, value in list_items(source.name, text):
            yield number, value if isinstance(value, dict) else f"holds a {type(value).__name__}, not an object"
    except UnicodeDecodeError as error:
        raise _not_utf8(source, error) from None


def _not_utf8(source: Source, error: UnicodeDecodeError) -> DataError:
    """Names the first line that is not UTF-8, which is looked for once more."""
    with opened(source.path, source.member, source.packing) as stream:
        for number, line in enumerate(_buffered(stream), 1):
            try:
                line.decode()
            except UnicodeDecodeError as found:
                words = f"{found.reason} ({line[found.start : found.start + 4]!r})"
                return DataError(f"{source.name}, line {number} is not UTF-8: {words}")
    return DataError(f"{source.name} is not UTF-8: {error}")


class _Raw(io.RawIOBase):
    """A stream as Python's text layer asks for it."""

    def __init__(self, stream: Opened) -> None:
        self._stream = stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        content = self._stream.read(len(buffer))
        buffer[: len(content)] = content
        return len(content)


def _buffered(stream: Opened) -> io.BufferedReader:
    return io.BufferedReader(_Raw(stream), _BLOCK)


def _csv(source: Source, stream: Opened) -> Iterator[tuple[int, Record | str]]:
    """Rows under a header. Cells are text as they stand: `NA` and `null` too, where upstream crashes."""
    csv.field_size_limit(1 << 30)  # of the process: documents are longer than the module's 128 KiB
    lines = io.TextIOWrapper(_buffered(stream), encoding="utf-8-sig", errors="surrogateescape", newline="")
    rows = csv.reader(lines, strict=True)
    try:
        header = next(rows, [])
        if twice := [name for name, times in Counter(header).items() if times > 1]:
            raise DataError(f"{source.name}: its header names the column {twice[0]!r} twice")
        for row in rows:
            if row:
                yield rows.line_num, _cells(header, row)
    except csv.Error as error:
        raise DataError(f"{source.name}, line {rows.line_num} is not CSV: {error}") from None


def _cells(header: list[str], row: list[str]) -> Record | str:
    if len(row) != len(header):
        return f"has {len(row)} cells, the header {len(header)}"
    for cell in row:
        if not cell.isascii() and any("\udc80" <= letter <= "\udcff" for letter in cell):
            return "is not UTF-8"
    return dict(zip(header, row, strict=True))
