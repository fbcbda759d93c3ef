"""Files as streams of bytes, whatever they are packed in, and what is no data at all."""

import bz2
import contextlib
import gzip
import lzma
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from data_prep.errors import DataError

PACKED = (".gz", ".zst", ".xz", ".bz2")
"""Suffixes of compressed files; the suffix before them says what is inside."""

_BLOCK = 1 << 20


class Opened:
    """A stream of bytes, and how much of the file on disk has been read for it."""

    def __init__(self, stream: Any, raw: IO[bytes]) -> None:
        self._stream, self._raw = stream, raw

    def read(self, size: int, /) -> bytes:
        """At most `size` bytes; none at the end."""
        content: bytes = self._stream.read(size)
        return content

    def done(self) -> int:
        """Bytes of the file that have been read."""
        return self._raw.tell()


@contextlib.contextmanager
def opened(path: Path, member: str | None, packing: str) -> Iterator[Opened]:
    """The bytes of a file, of a member of a zip, or of what a compressed one holds.

    Args:
        path: The file.
        member: The name in a zip; None if it is none.
        packing: One of `PACKED`, or "".

    Raises:
        DataError: What is compressed is broken; the file is named.
    """
    named = f"{path}/{member}" if member else str(path)
    try:
        with contextlib.ExitStack() as stack:
            raw = stack.enter_context(path.open("rb"))
            stream: Any = raw
            if member is not None:
                stream = stack.enter_context(stack.enter_context(zipfile.ZipFile(raw)).open(member))
            yield Opened(_unpacked(stream, packing, stack), raw)
    except (zlib.error, lzma.LZMAError, EOFError, gzip.BadGzipFile, zipfile.BadZipFile, NotImplementedError) as error:
        raise DataError(f"{named} is broken: {error}") from None
    except RuntimeError as error:  # zipfile's word for a password
        if member is None:
            raise
        raise DataError(f"{named} cannot be unpacked: {error}") from None


def _unpacked(raw: IO[bytes], packing: str, stack: contextlib.ExitStack) -> Any:
    if packing == ".zst":
        import pyarrow as pa

        return _Zstandard(stack.enter_context(pa.CompressedInputStream(raw, "zstd")))
    openers: dict[str, Any] = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}
    return stack.enter_context(openers[packing](raw, "rb")) if packing else raw


class _Zstandard:
    """Arrow's reader, whose errors are those of a broken file."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def read(self, size: int) -> bytes:
        try:
            return bytes(self._stream.read(size))
        except OSError as error:
            raise EOFError(str(error).splitlines()[0]) from None


@contextlib.contextmanager
def seekable(path: Path, member: str | None, packing: str) -> Iterator[Any]:
    """The same, as a file in which a reader can jump: what is packed is unpacked into a temporary one first."""
    if member is None and not packing:
        with path.open("rb") as file:
            yield file
        return
    with tempfile.TemporaryFile() as whole:
        with opened(path, member, packing) as stream:
            while block := stream.read(_BLOCK):
                whole.write(block)
        whole.seek(0)
        yield whole


def members(path: Path) -> list[str]:
    """The names of the files in a zip.

    Raises:
        DataError: It is none.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return [each.filename for each in archive.infolist() if not each.is_dir()]
    except zipfile.BadZipFile as error:
        check_head(path.name, path.open("rb").read(200))
        raise DataError(f"{path} is no zip file: {error}") from None


def check_head(named: str, head: bytes, *, text: bool = False) -> None:
    """Raises a DataError where a file is something that stands in for data.

    Args:
        named: The file.
        head: Its first bytes.
        text: It may be any text: a web page too.
    """
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip()[:100].lower()
    if start.startswith(b"version https://git-lfs"):
        raise DataError(f"{named} is a Git LFS pointer, not the data: fetch it with `git lfs pull`")
    if start.startswith((b"<!doctype html", b"<html")) and not text:
        raise DataError(f"{named} is an HTML page, not data: perhaps the download asked for a log-in")
