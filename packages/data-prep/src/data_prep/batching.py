"""What travels from a reader to whoever works on it, and how much of it at a time."""

from typing import Protocol

from data_prep.rows import Rows

BATCH_BYTES = 2 << 20
"""A batch ends with the record that reaches it."""
BATCH_ROWS = 8192
BLOCK = 1 << 20
"""Bytes that are read at a time."""


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
