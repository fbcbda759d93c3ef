"""torch's zip file written front to back, in bounded memory: the tree of names first, then the tensors' bytes.

The records and their order are those of torch.save, which needs each tensor whole; this needs a block of it.
"""

import struct
import zlib
from pathlib import Path
from typing import Any

from ckpt_tools.storage.output import OutputStream
from ckpt_tools.storage.pickle_write import dumps

LIMIT = 0xFFFFFFFF
"""Sizes and offsets from here on are written in the 64-bit fields of zip64."""
ALIGNMENT = 64
HAS_DESCRIPTOR, IS_UTF8 = 0x0008, 0x0800


class TorchWriter:
    """A file for torch.load: `begin`, `append` and `end` for each slot of the tree, in its order, then `finish`.

    Args:
        path: The file.
        tree: What torch.load will return, with a `Slot` for each tensor (see `pickle_write.dumps`).
    """

    def __init__(self, path: Path, tree: Any) -> None:
        pickled, self._slots = dumps(tree)
        self._done = 0
        self._stream = OutputStream(path)
        self._zip = ZipStream(self._stream, path.stem)
        self._zip.record("data.pkl", pickled)
        self._zip.record(".format_version", b"1")
        self._zip.record(".storage_alignment", str(ALIGNMENT).encode())
        self._zip.record("byteorder", b"little")

    def begin(self, name: str) -> None:
        """The bytes of the next slot, which has this name, follow."""
        slot = self._slots[self._done]
        if slot.name != name:
            raise ValueError(f"{slot.name} comes before {name} in this file")
        self._zip.begin(f"data/{self._done}", slot.nbytes)

    def append(self, block: memoryview) -> None:
        """Bytes of the slot that was begun."""
        self._zip.append(block)

    def end(self) -> None:
        """The slot is whole."""
        self._zip.end()
        self._done += 1

    def finish(self) -> None:
        """Writes the directory; the file is then whole and on disk."""
        if self._done != len(self._slots):
            raise ValueError(f"{len(self._slots) - self._done} tensors were not written")
        self._zip.record("version", b"3\n")
        self._zip.record(".data/serialization_id", b"%020d%020d" % (self._done, self._zip.checksum()))
        self._zip.finish()
        self._stream.finish()

    def abandon(self) -> None:
        """Closes the file as it is."""
        self._stream.close()


class ZipStream:
    """Stored records of a zip file, aligned, written without seeking: sizes are told before, checksums after."""

    def __init__(self, stream: OutputStream, root: str) -> None:
        self._stream, self._root = stream, root
        self._directory: list[bytes] = []
        self._name, self._size, self._start, self._left, self._crc = b"", 0, 0, 0, 0

    def begin(self, name: str, size: int) -> None:
        """The record's bytes follow."""
        self._name, self._size, self._start = f"{self._root}/{name}".encode(), size, self._stream.at
        self._left, self._crc = size, 0
        extra = self._wide_fields()
        header_size = 30 + len(self._name) + len(extra) + 4
        padding = -(self._start + header_size) % ALIGNMENT
        extra += struct.pack("<2sH", b"FB", padding) + b"Z" * padding
        lengths = (len(self._name), len(extra))
        header = struct.pack("<4s5H3I2H", b"PK\3\4", 0, self._flags, 0, 0, 0, 0, 0, 0, *lengths)
        self._stream.write(header + self._name + extra)

    def append(self, block: memoryview) -> None:
        """Bytes of the record."""
        self._left -= len(block)
        if self._left < 0:
            raise ValueError(f"more bytes than {self._size} for {self._name.decode()}")
        self._crc = zlib.crc32(block, self._crc)
        self._stream.write(block)

    def end(self) -> None:
        """The record is whole: its checksum follows it, and its entry in the directory is kept for the end."""
        if self._left:
            raise ValueError(f"{self._left} bytes of {self._name.decode()} were not written")
        extra = self._wide_fields()
        if self._size:
            form = "<4sIQQ" if extra else "<4sIII"
            self._stream.write(struct.pack(form, b"PK\7\x08", self._crc, self._size, self._size))
        small, start = (LIMIT if self._size >= LIMIT else self._size), min(self._start, LIMIT)
        sizes = (self._crc, small, small, len(self._name), len(extra))
        entry = struct.pack("<4s6H3I5H2I", b"PK\1\2", 0, 0, self._flags, 0, 0, 0, *sizes, 0, 0, 0, 0, start)
        self._directory.append(entry + self._name + extra)

    def record(self, name: str, data: bytes) -> None:
        """A small record as a whole."""
        self.begin(name, len(data))
        self.append(memoryview(data))
        self.end()

    def checksum(self) -> int:
        """A number that depends on the names, sizes and checksums of all records so far."""
        return zlib.crc32(b"".join(self._directory))

    def finish(self) -> None:
        """Writes the directory, with its 64-bit end always, as torch does."""
        start, count = self._stream.at, len(self._directory)
        self._stream.write(b"".join(self._directory))
        end, size = self._stream.at, self._stream.at - start
        self._stream.write(struct.pack("<4sQHHIIQQQQ", b"PK\6\6", 44, 0x031E, 45, 0, 0, count, count, size, start))
        self._stream.write(struct.pack("<4sIQI", b"PK\6\7", 0, end, 1))
        few = min(count, 0xFFFF)
        last = struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, few, few, min(size, LIMIT), min(start, LIMIT), 0)
        self._stream.write(last)

    @property
    def _flags(self) -> int:
        return IS_UTF8 | HAS_DESCRIPTOR if self._size else IS_UTF8

    def _wide_fields(self) -> bytes:
        """The zip64 extra field, where the record is too large or lies too far for 32 bits."""
        fields = b""
        if self._size >= LIMIT:
            fields += struct.pack("<QQ", self._size, self._size)
        if self._start >= LIMIT:
            fields += struct.pack("<Q", self._start)
        return struct.pack("<HH", 1, len(fields)) + fields if fields else b""
