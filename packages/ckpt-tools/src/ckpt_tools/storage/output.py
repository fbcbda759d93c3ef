"""Files that are written from front to back, and tensors whose bytes come later."""

import json
import os
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from ckpt_tools.dtypes import ITEM_SIZE


@dataclass(frozen=True, slots=True, eq=False)
class Slot:
    """A tensor of a file to write, whose bytes come later."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all its elements."""
        return prod(self.shape) * ITEM_SIZE[self.dtype]


class OutputStream:
    """A new file; `at` counts the bytes written. Errors of the system name the file."""

    def __init__(self, path: Path) -> None:
        self.at = 0
        self._path = path
        self._file = path.open("xb", buffering=0)

    def write(self, data: bytes | memoryview) -> None:
        """Writes all of `data`: one call of the system may write less (Linux stops at 2 GiB)."""
        view = memoryview(data)
        try:
            while view:
                written = self._file.write(view)
                view = view[written:]
                self.at += written or 0
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self._path)) from None

    def finish(self) -> None:
        """Closes the file after its bytes are on disk."""
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self._path)) from None
        finally:
            self._file.close()

    def close(self) -> None:
        """Closes the file as it is."""
        self._file.close()


def write_file(path: Path, data: bytes) -> None:
    """A new small file with this content, on disk."""
    stream = OutputStream(path)
    try:
        stream.write(data)
    except BaseException:
        stream.close()
        raise
    stream.finish()


def encode_json(value: dict[str, Any]) -> bytes:
    """The bytes of a JSON file that people read."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
