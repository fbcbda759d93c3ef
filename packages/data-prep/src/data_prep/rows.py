"""Records as columns, and the words for those that cannot be used.

A record comes with what names it in a message: its file, and its line or row there.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import compress
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data_prep.errors import DataError

Record = dict[str, Any]


class Bad(NamedTuple):
    """A record that cannot be used."""

    at: int
    """Its place in the batch; -1 where it was never a record (a line that is no JSON)."""
    message: str


class BadRecordsError(DataError):
    """Records that cannot be used; the message is the first one's."""

    def __init__(self, bad: Sequence[Bad]) -> None:
        super().__init__(bad[0].message)
        self.bad = list(bad)

    def __reduce__(self) -> tuple[Any, ...]:
        return BadRecordsError, (self.bad,)


def no_column(where: str, name: str, there: Collection[str]) -> DataError:
    """The error that a column is missing."""
    return DataError(f"{where} has no column {name!r}: it has {', '.join(map(str, there)) or 'none'}")


@dataclass(frozen=True)
class Rows:
    """Some records of one file, in their order.

    Attributes:
        file: As messages name it.
        unit: "line" or "row".
        numbers: [records] where each stands, in that unit, from 1.
        content: A table, or a list of records.
        bad: What reading them found to be none.
    """

    file: str
    unit: str
    numbers: Sequence[int]
    content: pa.RecordBatch | list[Record]
    bad: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.numbers)

    def where(self, at: int) -> str:
        """The words that name a record."""
        return f"{self.file}, {self.unit} {self.numbers[at]}"

    def without(self, bad: Sequence[Bad]) -> "Rows":
        """The records but for `bad` ones."""
        keep = np.ones(len(self), bool)
        keep[[each.at for each in bad]] = False
        content: pa.RecordBatch | list[Record]
        if isinstance(self.content, list):
            content = list(compress(self.content, keep))
        else:
            content = self.content.filter(pa.array(keep))
        return Rows(self.file, self.unit, list(compress(self.numbers, keep)), content)

    def has(self, name: str) -> bool:
        """Whether any record has this column."""
        if isinstance(self.content, list):
            return any(name in record for record in self.content)
        return name in self.content.schema.names

    def values(self, name: str, default: Any = None) -> list[Any]:
        """[records] whatever a column holds; `default` where it is missing."""
        if isinstance(self.content, list):
            return [record.get(name, default) for record in self.content]
        if name not in self.content.schema.names:
            return [default] * len(self)
        values: list[Any] = self.content.column(name).to_pylist()
        return values

    def need(self, *names: str) -> None:
        """Sees to it that all records have these columns.

        Raises:
            BadRecordsError: Some have not; they are named.
        """
        for name in names:
            if isinstance(self.content, list):
                self.check(self.content, partial(_absence, name))
            elif name not in self.content.schema.names:
                raise no_column(self.file, name, self.content.schema.names)

    def texts(self, name: str, *, default: str | None = None) -> pa.Array:
        """[records] string: a column's texts, without nulls.

        Args:
            name: Of the column.
            default: The text of records that lack the column; without it, they are bad.

        Raises:
            BadRecordsError: The column is missing, null, no text, or no text that UTF-8 can hold; they are named.
        """
        if default is None or (self.has(name) and not isinstance(self.content, list)):
            self.need(name)
        if isinstance(self.content, list):
            values = [record.get(name, default) for record in self.content]
            return self.column(name, values)
        if name not in self.content.schema.names:
            return pa.array([default] * len(self), pa.string())
        column = _as_string(self.content.column(name))
        return self.column(name, _pythons(self.content.column(name))) if column is None else column

    def column(self, name: str, values: Sequence[Any]) -> pa.Array:
        """[records] string: `values` as texts without nulls; `name` says what they are.

        Raises:
            BadRecordsError: Some are none; the records are named.
        """
        try:
            made = pa.array(values, pa.string())
            if not made.null_count:
                return made
        except (pa.ArrowException, UnicodeEncodeError, TypeError):
            pass
        self.check(values, lambda value: text_complaint(name, value))
        raise AssertionError("one of them is bad")

    def check(self, values: Sequence[Any], complaint: Callable[[Any], str | None]) -> None:
        """Raises a BadRecordsError that names each record of whose value `complaint` says something."""
        bad = [Bad(at, f"{self.where(at)}{said}") for at, value in enumerate(values) if (said := complaint(value))]
        if bad:
            raise BadRecordsError(bad)


def text_complaint(name: str, value: object) -> str | None:
    """What is wrong with a value that should be a text; None if nothing is."""
    if isinstance(value, bytes):
        return f": {name!r} is not UTF-8"
    if not isinstance(value, str):
        return f": {name!r} is {'null' if value is None else type(value).__name__}, not text"
    try:
        value.encode()
    except UnicodeEncodeError:  # JSON's escapes can spell it: "\ud800"
        return f": {name!r} holds half of a surrogate pair, which is no text"
    return None


def _absence(name: str, record: Record) -> str | None:
    return None if name in record else f" has no column {name!r}: it has {', '.join(map(str, record)) or 'none'}"


def _as_string(column: pa.Array) -> pa.Array | None:
    """A text column of any of Arrow's kinds as plain strings; None where it holds nulls, no text, or broken UTF-8."""
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
        return None
    if column.null_count:
        return None
    try:
        plain = column if column.type == pa.string() else pc.cast(column, pa.string())
        plain.validate(full=True)  # files may hold anything
    except pa.ArrowInvalid:
        return None
    return plain


def _pythons(column: pa.Array) -> list[Any]:
    """The values of a column; bytes where they should be text and are not UTF-8."""
    try:
        values: list[Any] = column.to_pylist()
    except UnicodeDecodeError:
        values = [_text_or_bytes(value) for value in pc.cast(column, pa.binary()).to_pylist()]
    return values


def _text_or_bytes(value: bytes | None) -> str | bytes | None:
    try:
        return None if value is None else value.decode()
    except UnicodeDecodeError:
        return value
