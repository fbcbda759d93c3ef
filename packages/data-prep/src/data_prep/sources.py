"""Raw files as a stream of records: parquet, jsonl, json, csv, txt; a file, several, or a folder of them.

Each record comes with the words that name it in a message: its file, and its line or row there.
"""

import csv
import json
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

from data_prep.errors import DataError

Record = dict[str, Any]
Located = tuple[str, Record]
SUFFIXES = (".parquet", ".jsonl", ".json", ".csv", ".txt")

_CHUNK = 1 << 20
_LARGEST_RECORD = 1 << 30
"""Characters of one record of a JSON list: beyond it, the file is taken for broken rather than read on."""


def files_of(inputs: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """The files to read, in order, and the files of a folder that are left out.

    A folder stands for its files of the most frequent known kind, by name.

    Raises:
        DataError: An input is missing, or of no known kind.
    """
    chosen: list[Path] = []
    skipped: list[Path] = []
    for path in inputs:
        if path.is_dir():
            inside = sorted(file for file in path.iterdir() if file.is_file() and not file.name.startswith("."))
            kinds = Counter(file.suffix for file in inside if file.suffix in SUFFIXES)
            if not kinds:
                raise DataError(f"{path} holds no {', '.join(SUFFIXES)} file")
            kind = max(SUFFIXES, key=lambda suffix: kinds[suffix])
            chosen += [file for file in inside if file.suffix == kind]
            skipped += [file for file in inside if file.suffix != kind]
        elif not path.exists():
            raise DataError(f"no such input: {path}")
        elif path.suffix not in SUFFIXES:
            raise DataError(f"{path} is of no known kind: {', '.join(SUFFIXES)}")
        else:
            chosen.append(path)
    return chosen, skipped


def records(file: Path, columns: Collection[str]) -> Iterator[Located]:
    """(where it stands, record) pairs of one file.

    Args:
        file: One of the known kinds.
        columns: What will be asked of a record. Only parquet saves the reading of others.

    Raises:
        DataError: The file or a record is broken; file and line are named.
    """
    try:
        if file.suffix == ".parquet":
            yield from _parquet(file, columns)
        else:
            readers = {".jsonl": _json, ".json": _json, ".csv": _csv, ".txt": _txt}
            yield from readers[file.suffix](file)
    except UnicodeDecodeError as error:
        found = f"{error.reason} ({error.object[error.start : error.start + 4]!r})"
        raise DataError(f"{file}, line {_broken_line(file)} is not UTF-8: {found}") from None


def _broken_line(file: Path) -> int:
    """The number of the first line that is not UTF-8."""
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError:
                return number
    raise AssertionError("only for a file that is not UTF-8")


def _parquet(file: Path, columns: Collection[str]) -> Iterator[Located]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        opened = pq.ParquetFile(file, pre_buffer=False, buffer_size=_CHUNK)  # memory stays flat in the row groups' size
        there = opened.schema_arrow.names
        if absent := [name for name in columns if name not in there and name != "input"]:
            raise no_column(str(file), absent[0], there)
        wanted = [name for name in there if name in columns]
        number = 0
        for batch in opened.iter_batches(batch_size=1024, columns=wanted, use_threads=False):
            for row in batch.to_pylist():
                number += 1
                yield f"{file}, row {number}", row
    except pa.ArrowException as error:
        raise DataError(f"{file} is no parquet file: {str(error).splitlines()[0]}") from None


def no_column(where: str, name: str, there: Collection[str]) -> DataError:
    """The error that a column is missing."""
    return DataError(f"{where} has no column {name!r}: it has {', '.join(map(str, there)) or 'none'}")


def _json(file: Path) -> Iterator[Located]:
    """One list of objects, or one object a line: whichever the file begins with, as upstream reads either suffix."""
    with file.open(encoding="utf-8-sig", newline="\n") as opened:
        head = opened.read(_CHUNK)
        while head.isspace() and (more := opened.read(_CHUNK)):
            head = more
        opened.seek(0)
        yield from _list_items(file, opened) if head.lstrip().startswith("[") else _lines(file, opened)


def _lines(file: Path, opened: TextIO) -> Iterator[Located]:
    for number, line in enumerate(opened, 1):
        if not line.strip():
            continue
        where = f"{file}, line {number}"
        try:
            record = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise DataError(f"{where} is not JSON: {error}") from None
        yield where, _object(where, record)


def _object(where: str, record: object) -> Record:
    if not isinstance(record, dict):
        raise DataError(f"{where} holds a {type(record).__name__}, not an object")
    return record


def _list_items(file: Path, opened: TextIO) -> Iterator[Located]:
    """The objects of one JSON list, decoded one by one from a window of the file."""
    window, number = _Window(file, opened), 0
    window.take("[")
    if window.peek() == "]":
        window.take("]")
    else:
        while True:
            number += 1
            where = f"{file}, line {window.line}"
            yield where, _object(where, window.value())
            if window.peek() != ",":
                break
            window.take(",")
        window.take("]")
    if window.peek():
        raise DataError(f"{file}, line {window.line} is not JSON: something follows the list")


class _Window:
    """A moving part of a JSON text: as much as the next value needs."""

    def __init__(self, file: Path, opened: TextIO) -> None:
        self._file, self._opened = file, opened
        self._text, self._at, self._decoder = "", 0, json.JSONDecoder()
        self.line = 1

    def peek(self) -> str:
        """The next character that is no space; "" at the end."""
        while True:
            while self._at < len(self._text) and self._text[self._at] in " \t\r\n":
                self._at += 1
            self._advance(self._at)
            if self._text:
                return self._text[0]
            if not self._read():
                return ""

    def take(self, wanted: str) -> None:
        """Steps over one character."""
        if (found := self.peek()) != wanted:
            what = f"{found!r} where {wanted!r} was expected" if found else f"it ends before {wanted!r}"
            raise DataError(f"{self._file}, line {self.line} is not JSON: {what}")
        self._advance(1)

    def value(self) -> object:
        """The value that begins at the next character."""
        self.peek()
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text)
            except (json.JSONDecodeError, RecursionError) as error:  # broken, or not all of it is here
                if len(self._text) > _LARGEST_RECORD or not self._read(max(_CHUNK, len(self._text))):
                    line = self.line + getattr(error, "lineno", 1) - 1
                    raise DataError(f"{self._file}, line {line} is not JSON: {getattr(error, 'msg', error)}") from None
                continue
            self._advance(end)
            return value

    def _advance(self, end: int) -> None:
        self.line += self._text.count("\n", 0, end)
        self._text, self._at = self._text[end:], 0

    def _read(self, size: int = _CHUNK) -> bool:
        more = self._opened.read(size)
        self._text += more
        return bool(more)


def _csv(file: Path) -> Iterator[Located]:
    """Rows under a header. Cells are text as they stand: `NA` and `null` too, where upstream crashes."""
    csv.field_size_limit(_LARGEST_RECORD)  # of the process: documents are longer than the module's 128 KiB
    with file.open(encoding="utf-8-sig", newline="") as lines:
        rows = csv.reader(lines, strict=True)
        try:
            header = next(rows, [])
            if twice := [name for name, times in Counter(header).items() if times > 1]:
                raise DataError(f"{file}: its header names the column {twice[0]!r} twice")
            for row in rows:
                where = f"{file}, line {rows.line_num}"
                if len(row) != len(header) and row:
                    raise DataError(f"{where} has {len(row)} cells, the header {len(header)}")
                if row:
                    yield where, dict(zip(header, row, strict=True))
        except csv.Error as error:
            raise DataError(f"{file}, line {rows.line_num} is not CSV: {error}") from None


def _txt(file: Path) -> Iterator[Located]:
    """One document a line. A lone CR ends a line too, as upstream reads it; form feed and U+2028 do not."""
    with file.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if text := line.rstrip("\n"):
                yield f"{file}, line {number}", {"text": text}
