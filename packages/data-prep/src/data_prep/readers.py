"""Each kind of file as a stream of batches; files of lines and tables have modules of their own."""

import csv
import io
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

from data_prep import batching
from data_prep.batching import Batch
from data_prep.errors import DataError
from data_prep.json_list import list_items
from data_prep.lines import line_batches
from data_prep.opening import Opened, opened
from data_prep.rows import Record, Rows
from data_prep.sources import TABLES, Source


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
    if source.kind in TABLES:
        from data_prep.tables import table_batches

        return table_batches(source, columns, optional)
    if source.kind in ("lines", ".txt"):
        return line_batches(source)
    return _record_batches(source, skip_bad=skip_bad)


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
            if size >= batching.BATCH_BYTES or len(records) == batching.BATCH_ROWS:
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
    return io.BufferedReader(_Raw(stream), batching.BLOCK)


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
