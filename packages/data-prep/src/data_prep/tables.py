"""parquet and Arrow files: rows in columns."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from data_prep import batching
from data_prep.batching import Batch
from data_prep.errors import DataError
from data_prep.opening import seekable
from data_prep.rows import Rows, no_column
from data_prep.sources import Source


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
        except (pa.ArrowException, OSError) as error:
            raise _no_table(source, error) from None


def _no_table(source: Source, error: Exception) -> Exception:
    """The words for a broken file; the disk's own errors, which have a number, stay what they are."""
    if isinstance(error, OSError) and error.errno is not None:
        return error
    return DataError(f"{source.name} is no {source.kind[1:]} file: {str(error).splitlines()[0]}")


def table_batches(source: Source, columns: Collection[str], optional: Collection[str]) -> Iterator[Batch]:
    """The batches of a table, from `source.begin` to `source.end`."""
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
        except (pa.ArrowException, OSError) as error:
            raise _no_table(source, error) from None


def _check_columns(source: Source, columns: Collection[str], there: Collection[str]) -> None:
    if absent := [name for name in columns if name not in there]:
        raise no_column(source.name, absent[0], there)


def _slices(file: str, first: int, table: pa.RecordBatch, read_bytes: int) -> Iterator[Batch]:
    """The rows in batches of about `BATCH_BYTES`."""
    rows = max(1, min(batching.BATCH_ROWS, len(table) * batching.BATCH_BYTES // max(_size(table), 1)))
    for at in range(0, len(table), rows):
        part = table.slice(at, rows)
        yield TableBatch(file, first + at + 1, part, first + at + len(part), read_bytes)


def _size(table: pa.RecordBatch) -> int:
    """Bytes of a table; older versions of Arrow cannot tell those of every type."""
    try:
        return int(table.nbytes)
    except pa.ArrowException:
        return int(table.get_total_buffer_size())


def _parquet(
    source: Source, file: Any, columns: Collection[str], optional: Collection[str]
) -> Iterator[pa.RecordBatch]:
    """Batches of as many rows as hold `BATCH_BYTES` on an average, so that memory stays flat in their size."""
    import pyarrow.parquet as pq

    whole = pq.ParquetFile(file, pre_buffer=False, buffer_size=batching.BLOCK)
    _check_columns(source, columns, whole.schema_arrow.names)
    wanted = [name for name in whole.schema_arrow.names if name in columns or name in optional]
    facts, at = whole.metadata, 0
    for group in range(facts.num_row_groups):
        count = facts.row_group(group).num_rows
        if source.begin < at + count and (source.end is None or at < source.end):
            about = _bytes_of(facts.row_group(group), wanted) // max(count, 1) + 1
            rows = max(1, min(batching.BATCH_ROWS, batching.BATCH_BYTES // about))
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
