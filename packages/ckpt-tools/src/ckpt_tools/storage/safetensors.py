"""The safetensors file format: a JSON header, then the tensors' bytes."""

import itertools
import json
import struct
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any

from ckpt_tools.dtypes import ITEM_SIZE
from ckpt_tools.errors import CheckpointError
from ckpt_tools.storage.files import MAX_JSON_BYTES, DiskTensor, File, parse_json
from ckpt_tools.storage.output import OutputStream, Slot

DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}
MAX_DIMENSIONS = 64
CODES = {name: code for code, name in DTYPES.items()}


def read_safetensors(file: File) -> dict[str, DiskTensor]:
    """The tensors of a safetensors file: only its header is read, and checked against the file's size.

    Raises:
        CheckpointError: The file is not of this format, contradicts itself, or is truncated.
    """
    if file.size < 8:
        raise CheckpointError(f"{file.path} is not a safetensors file: it has {file.size} bytes")
    (size,) = struct.unpack("<Q", file.read(0, 8))
    if size > min(file.size - 8, MAX_JSON_BYTES):
        raise CheckpointError(f"{file.path} is truncated or not a safetensors file: its header claims {size} bytes")
    header = parse_json(file.read(8, size), f"the header of {file.path}")
    header.pop("__metadata__", None)
    tensors = {name: _tensor(file, 8 + size, name, entry) for name, entry in header.items()}
    ordered = sorted(tensors.values(), key=lambda tensor: (tensor.start, tensor.nbytes))
    for one, other in itertools.pairwise(ordered):
        if one.start + one.nbytes > other.start:
            raise CheckpointError(f"{file.path}: {one.name} and {other.name} share bytes, which is never so")
    return tensors


def _tensor(file: File, base: int, name: str, entry: Any) -> DiskTensor:
    try:
        dtype, shape, (start, stop) = DTYPES[entry["dtype"]], tuple(entry["shape"]), entry["data_offsets"]
    except (KeyError, TypeError, ValueError):
        raise CheckpointError(f"{file.path}: the header's entry for {name} is malformed: {str(entry)[:100]}") from None
    if len(shape) > MAX_DIMENSIONS or any(type(n) is not int or n < 0 for n in (*shape, start, stop)):
        raise CheckpointError(f"{file.path}: the header's entry for {name} is malformed: {str(entry)[:100]}")
    if stop - start != prod(shape) * ITEM_SIZE[dtype]:
        raise CheckpointError(f"{file.path}: {name} has {stop - start} bytes, which its shape {shape} contradicts")
    if base + stop > file.size:
        raise CheckpointError(f"{file.path} is truncated: {name} ends at byte {base + stop}, the file at {file.size}")
    return DiskTensor(file, base + start, dtype, shape, name)


def encode_header(slots: Sequence[Slot]) -> bytes:
    """A file's first bytes, for tensors that follow in this order without gaps."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for slot in slots:
        stop = at + slot.nbytes
        header[slot.name] = {"dtype": CODES[slot.dtype], "shape": list(slot.shape), "data_offsets": [at, stop]}
        at = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


class SafetensorsWriter:
    """A safetensors file: `begin`, `append` and `end` for each tensor, in order, then `finish`."""

    def __init__(self, path: Path, slots: Sequence[Slot]) -> None:
        self._slots = slots
        self._done, self._left = 0, 0
        self._stream = OutputStream(path)
        self._stream.write(encode_header(slots))

    def begin(self, name: str) -> None:
        """The bytes of the next tensor, which has this name, follow."""
        slot = self._slots[self._done]
        if slot.name != name:
            raise ValueError(f"{slot.name} comes before {name} in this file")
        self._left = slot.nbytes

    def append(self, block: memoryview) -> None:
        """Bytes of the tensor that was begun."""
        self._left -= len(block)
        self._stream.write(block)

    def end(self) -> None:
        """The tensor is whole."""
        if self._left:
            raise ValueError(f"{self._slots[self._done].name}: {self._left} bytes were not written")
        self._done += 1

    def finish(self) -> None:
        """The file is whole and on disk."""
        if self._done != len(self._slots):
            raise ValueError(f"{len(self._slots) - self._done} tensors were not written")
        self._stream.finish()

    def abandon(self) -> None:
        """Closes the file as it is."""
        self._stream.close()
