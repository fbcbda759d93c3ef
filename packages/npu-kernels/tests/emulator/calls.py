"""Calls of aclnn ops as Python sees them: decoded by name, recorded, and carried out by host kernels.

A host kernel is declared with its op's arguments, in the order of CANN's documentation (and of op-plugin's sources):

    @kernel("aclnnRmsNorm", "x gamma epsilon:float y rstd")
    def rms_norm(x, gamma, epsilon, y, rstd): ...

Plain names are objects (tensors, scalars, arrays, lists; None where absent), which say themselves what they are.
Numbers and texts say nothing: `:int`, `:bool`, `:int8` and `:str` stand in integer registers, `:float` (double) and
`:float32` in floating-point ones. A call whose number of arguments is another fails, as does an op without a kernel.
"""

import ctypes
import struct
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

DTYPES = {
    0: torch.float32,
    1: torch.float16,
    2: torch.int8,
    3: torch.int32,
    4: torch.uint8,
    6: torch.int16,
    9: torch.int64,
    11: torch.float64,
    12: torch.bool,
    27: torch.bfloat16,
}
"""CANN's aclDataType, by its number."""

FAILED = 561000
"""What an aclnn call returns when its kernel fails (ACLNN_ERR_INNER)."""


@dataclass(frozen=True)
class Call:
    """One call of an aclnn op: its name and its arguments, tensors as copies of what they held before it."""

    op: str
    arguments: dict[str, Any]

    def __getitem__(self, name: str) -> Any:
        return self.arguments[name]


class _Object(ctypes.Structure):
    """`object` of opapi.c."""

    _fields_ = [
        ("kind", ctypes.c_int64),
        ("dtype", ctypes.c_int64),
        ("offset", ctypes.c_int64),
        ("num_dims", ctypes.c_int64),
        ("sizes", ctypes.c_int64 * 16),
        ("strides", ctypes.c_int64 * 16),
        ("num_items", ctypes.c_int64),
        ("data", ctypes.c_void_p),
        ("items", ctypes.POINTER(ctypes.c_uint64)),
    ]


TENSOR, SCALAR, INTS, FLOATS, BOOLS, TENSORS, SCALARS = range(1, 8)

_ON_OP = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.POINTER(ctypes.c_uint64), ctypes.POINTER(ctypes.c_double)
)
_ON_NAMED_OP = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_char_p)

_kernels: dict[str, tuple[Callable[..., object], list[tuple[str, str]]]] = {}
_recordings: list[list[Call]] = []
_libraries: list[Any] = []  # and the callbacks, which must outlive their use in C


def kernel(op: str, arguments: str) -> Callable[[Callable[..., object]], Callable[..., object]]:
    """Makes a function the host kernel of `op`: it gets the arguments in this order and writes into the results."""
    parsed = [(name, kind or "object") for name, _, kind in (word.partition(":") for word in arguments.split())]

    def register(function: Callable[..., object]) -> Callable[..., object]:
        assert op not in _kernels, f"{op} has two kernels"
        _kernels[op] = (function, parsed)
        return function

    return register


def known_ops() -> list[str]:
    """The ops that have a kernel."""
    return sorted(_kernels)


@contextmanager
def recording() -> Iterator[list[Call]]:
    """The calls made meanwhile, in order."""
    calls: list[Call] = []
    _recordings.append(calls)
    try:
        yield calls
    finally:
        _recordings.remove(calls)


def attach(folder: Path, names: Sequence[str]) -> None:
    """Loads the libraries into this process and takes over their calls."""
    loaded = {name: ctypes.CDLL(str(folder / f"lib{name}.so"), mode=ctypes.RTLD_GLOBAL) for name in names}
    opapi, ascendcl = loaded["opapi"], loaded["ascendcl"]
    opapi.emulator_object.restype = ctypes.POINTER(_Object)
    opapi.emulator_object.argtypes = [ctypes.c_uint64]

    def on_op(op: bytes, n: int, words: Any, floats: Any) -> int:
        try:
            _run(op.decode(), words[:n], floats[:8], opapi.emulator_object)
        except Exception:
            ascendcl.emulator_set_error(f"{op.decode()}: {traceback.format_exc()}".encode()[:4000])
            return FAILED
        return 0

    def on_named_op(op: bytes) -> int:
        ascendcl.emulator_set_error(b"the emulated CANN runs no ops by name: " + op)
        return FAILED

    callbacks = [_ON_OP(on_op), _ON_NAMED_OP(on_named_op)]
    opapi.emulator_on_op(callbacks[0])
    ascendcl.emulator_on_named_op(callbacks[1])
    _libraries.extend([loaded, callbacks])


def _run(op: str, words: Sequence[int], floats: Sequence[float], find: Callable[[int], Any]) -> None:
    if op not in _kernels:
        shown = [_brief(_object(word, find)) if word == 0 or find(word) else str(word) for word in words]
        raise NotImplementedError(f"no host kernel for {op}({', '.join(shown)}) and floats {list(floats)}")
    function, parameters = _kernels[op]
    count = sum(not kind.startswith("float") for _, kind in parameters)
    if count != len(words):
        raise TypeError(f"{op} is declared with {count} integer and pointer arguments and called with {len(words)}")
    words_left, floats_left = iter(words), iter(floats)
    values = [
        _float(kind, next(floats_left)) if kind.startswith("float") else _decode(kind, next(words_left), find)
        for _, kind in parameters
    ]
    for calls in _recordings:
        calls.append(Call(op, {name: _copy(value) for (name, _), value in zip(parameters, values, strict=True)}))
    with torch.no_grad():
        function(*values)


def _decode(kind: str, word: int, find: Callable[[int], Any]) -> Any:
    if kind == "object":
        return _object(word, find)
    if kind == "str":
        return ctypes.string_at(word).decode()
    if kind == "bool":
        return bool(word & 0xFF)
    bits = {"int": 64, "int32": 32, "int8": 8}[kind]
    low = word & ((1 << bits) - 1)
    return low - (1 << bits) if low >> (bits - 1) else low


def _float(kind: str, value: float) -> float:
    """A C float stands in the low half of its register."""
    return float(struct.unpack("f", struct.pack("d", value)[:4])[0]) if kind == "float32" else value


def _object(address: int, find: Callable[[int], Any]) -> Any:
    if address == 0:
        return None
    pointer = find(address)
    if not pointer:
        raise TypeError(f"{address:#x} is no tensor, scalar, array or list: it must be declared as a number or a text")
    it = pointer.contents
    items = it.items[: it.num_items] if it.num_items else []
    if it.kind == TENSOR:
        return _tensor(it)
    if it.kind == SCALAR:
        return _memory(it.data, 16).view(DTYPES[it.dtype])[0].item()
    if it.kind == INTS:
        return [_decode("int", item, find) for item in items]
    if it.kind == FLOATS:
        return [struct.unpack("f", struct.pack("I", item))[0] for item in items]
    if it.kind == BOOLS:
        return [bool(item) for item in items]
    return [_object(item, find) for item in items]


def _tensor(it: Any) -> torch.Tensor:
    """The device's memory itself, under the tensor's sizes and strides."""
    sizes, strides, dtype = it.sizes[: it.num_dims], it.strides[: it.num_dims], DTYPES[it.dtype]
    if 0 in sizes:
        return torch.empty(sizes, dtype=dtype)
    reach = it.offset + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True)) + 1
    return _memory(it.data, reach * dtype.itemsize).view(dtype).as_strided(sizes, strides, it.offset)


def _memory(address: int, num_bytes: int) -> torch.Tensor:
    return torch.frombuffer((ctypes.c_char * num_bytes).from_address(address), dtype=torch.uint8)


def _copy(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.clone()
    return [_copy(item) for item in value] if isinstance(value, list) else value


def _brief(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    return f"[{', '.join(map(_brief, value))}]" if isinstance(value, list) else repr(value)
