"""The safetensors file format: a JSON header, then the tensors' bytes."""

import json
import struct
from math import prod
from typing import Any

from ckpt_tools.dtypes import ITEM_SIZE
from ckpt_tools.errors import CheckpointError
from ckpt_tools.storage.files import DiskTensor, File, parse_json

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
CODES = {name: code for code, name in DTYPES.items()}


def read_safetensors(file: File) -> dict[str, DiskTensor]:
    """The tensors of a safetensors file: only its header is read, and checked against the file's size.

    Raises:
        CheckpointError: The file is not of this format, contradicts itself, or is truncated.
    """
    if file.size < 8:
        raise CheckpointError(f"{file.path} is not a safetensors file: it has {file.size} bytes")
    (size,) = struct.unpack("<Q", file.read(0, 8))
    if size > file.size - 8:
        raise CheckpointError(f"{file.path} is truncated or not a safetensors file: its header claims {size} bytes")
    header = parse_json(file.read(8, size), f"the header of {file.path}")
    header.pop("__metadata__", None)
    return {name: _tensor(file, 8 + size, name, entry) for name, entry in header.items()}


def _tensor(file: File, base: int, name: str, entry: Any) -> DiskTensor:
    try:
        dtype, shape, (start, stop) = DTYPES[entry["dtype"]], tuple(entry["shape"]), entry["data_offsets"]
    except (KeyError, TypeError, ValueError):
        raise CheckpointError(f"{file.path}: the header's entry for {name} is malformed: {str(entry)[:100]}") from None
    if any(type(n) is not int or n < 0 for n in (*shape, start, stop)):
        raise CheckpointError(f"{file.path}: the header's entry for {name} is malformed: {str(entry)[:100]}")
    if stop - start != prod(shape) * ITEM_SIZE[dtype]:
        raise CheckpointError(f"{file.path}: {name} has {stop - start} bytes, which its shape {shape} contradicts")
    if base + stop > file.size:
        raise CheckpointError(f"{file.path} is truncated: {name} ends at byte {base + stop}, the file at {file.size}")
    return DiskTensor(file, base + start, dtype, shape, name)


def encode_header(tensors: dict[str, tuple[str, tuple[int, ...]]]) -> tuple[bytes, dict[str, int]]:
    """A file's first bytes, and where in the file each tensor begins.

    Args:
        tensors: Name to (dtype, shape), in the order in which they will lie in the file.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, (dtype, shape) in tensors.items():
        stop = at + prod(shape) * ITEM_SIZE[dtype]
        header[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [at, stop]}
        at = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    starts = {name: 8 + len(text) + entry["data_offsets"][0] for name, entry in header.items() if name in tensors}
    return struct.pack("<Q", len(text)) + text, starts
