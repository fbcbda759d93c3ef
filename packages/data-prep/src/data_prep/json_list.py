"""The objects of one JSON list, decoded one by one from a window of the text: memory does not grow with the list."""

import json
from collections.abc import Iterator
from typing import TextIO

from data_prep.errors import DataError

_CHUNK = 1 << 20
_FINAL = ("Expecting ',' delimiter", "Expecting ':' delimiter", "Invalid control character")
"""Errors about a character that is there, and not about the end of the text."""
_LARGEST_RECORD = 1 << 30
"""Characters of one record: beyond it, the file is taken for broken rather than read on."""


def list_items(file: str, opened: TextIO) -> Iterator[tuple[int, object]]:
    """(line where it begins, value) of each item.

    Args:
        file: Its name, for messages.
        opened: The text, from the list's bracket.

    Raises:
        DataError: It is no JSON; the line is named.
    """
    window = _Window(file, opened)
    window.take("[")
    if window.peek() == "]":
        window.take("]")
    else:
        while True:
            window.peek()
            yield window.line, window.value()
            if window.peek() != ",":
                break
            window.take(",")
        window.take("]")
    if window.peek():
        raise DataError(f"{file}, line {window.line} is not JSON: something follows the list")


class _Window:
    """A moving part of a JSON text: as much as the next value needs."""

    def __init__(self, file: str, opened: TextIO) -> None:
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
            except (ValueError, RecursionError) as error:  # broken, or not all of it is here
                broken = len(self._text) > _LARGEST_RECORD or self._is_final(error)
                if broken or not self._read(max(_CHUNK, len(self._text))):
                    line = self.line + getattr(error, "lineno", 1) - 1
                    raise DataError(f"{self._file}, line {line} is not JSON: {getattr(error, 'msg', error)}") from None
                continue
            self._advance(end)
            return value

    def _is_final(self, error: Exception) -> bool:
        """Whether more of the text would not mend it."""
        if not isinstance(error, json.JSONDecodeError):
            return True
        return error.msg.startswith(_FINAL) and error.pos < len(self._text)

    def _advance(self, end: int) -> None:
        self.line += self._text.count("\n", 0, end)
        self._text, self._at = self._text[end:], 0

    def _read(self, size: int = _CHUNK) -> bool:
        more = self._opened.read(size)
        self._text += more
        return bool(more)
