"""Raw files as a stream of records: parquet, jsonl, json (one list), csv, txt; a file, several, or a folder of them."""

import csv
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from data_prep.errors import DataError

Record = dict[str, Any]
SUFFIXES = (".parquet", ".jsonl", ".json", ".csv", ".txt")


def files_of(inputs: Sequence[Path]) -> list[Path]:
    """The files to read, in order; a folder stands for those of its most frequent known kind.

    Raises:
        DataError: One is missing, or of no known kind.
    """
    files: list[Path] = []
    for path in inputs:
        if path.is_dir():
            inside = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES)
            if not inside:
                raise DataError(f"{path} holds no {', '.join(SUFFIXES)} file")
            kind = Counter(file.suffix for file in inside).most_common(1)[0][0]
            files += [file for file in inside if file.suffix == kind]
        elif not path.exists():
            raise DataError(f"no such input: {path}")
        elif path.suffix not in SUFFIXES:
            raise DataError(f"{path} is of no known kind: {', '.join(SUFFIXES)}")
        else:
            files.append(path)
    return files


def records(file: Path) -> Iterator[tuple[str, Record]]:
    """(where it stands, record) pairs of one file.

    Raises:
        DataError: The file or a record is broken; file and line are named.
    """
    readers = {".parquet": _parquet, ".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".txt": _txt}
    try:
        yield from readers[file.suffix](file)
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8: {error.reason} at byte {error.start}") from None


def _parquet(file: Path) -> Iterator[tuple[str, Record]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        number = 0
        for batch in pq.ParquetFile(file).iter_batches(batch_size=2048):
            for row in batch.to_pylist():
                number += 1
                yield f"{file}, row {number}", row
    except pa.ArrowInvalid as error:
        raise DataError(f"{file} is no parquet file: {str(error).splitlines()[0]}") from None


def _jsonl(file: Path) -> Iterator[tuple[str, Record]]:
    with file.open(encoding="utf-8-sig", newline="\n") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield _record(line, f"{file}, line {number}")


def _record(text: str, where: str) -> tuple[str, Record]:
    try:
        record = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{where} is not JSON: {error}") from None
    if not isinstance(record, dict):
        raise DataError(f"{where} holds a {type(record).__name__}, not an object")
    return where, record


def _json(file: Path) -> Iterator[tuple[str, Record]]:
    try:
        content = json.loads(file.read_text("utf-8-sig"))
    except json.JSONDecodeError as error:
        raise DataError(f"{file} is not JSON: {error}") from None
    if not isinstance(content, list) or not all(isinstance(record, dict) for record in content):
        raise DataError(f"{file} must hold one list of objects")
    yield from ((f"{file}, item {number}", record) for number, record in enumerate(content, 1))


def _csv(file: Path) -> Iterator[tuple[str, Record]]:
    with file.open(encoding="utf-8-sig", newline="") as lines:
        rows = csv.DictReader(lines)
        for row in rows:
            yield f"{file}, line {rows.line_num}", dict(row)


def _txt(file: Path) -> Iterator[tuple[str, Record]]:
    with file.open(encoding="utf-8-sig") as lines:  # universal newlines: a lone CR ends a line, as upstream reads it
        for number, line in enumerate(lines, 1):
            if text := line.rstrip("\n"):
                yield f"{file}, line {number}", {"text": text}
