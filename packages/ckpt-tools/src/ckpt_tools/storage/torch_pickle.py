"""torch's tensors in a pickle, as data: which storage, where in it, what shape."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from ckpt_tools.dtypes import ITEM_SIZE
from ckpt_tools.storage import unpickle
from ckpt_tools.storage.unpickle import Builders, Global, PickleError

STORAGE_DTYPES = {
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "FloatStorage": "float32",
    "DoubleStorage": "float64",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "UntypedStorage": "uint8",
    "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
}
MAX_SIZE = 1 << 62
MAX_DIMENSIONS = 64
MAX_KEY_DIGITS = 20


@dataclass(frozen=True, slots=True)
class StorageRef:
    """A storage: the file's record `data/{key}` holds its bytes."""

    dtype: str
    key: str
    numel: int


@dataclass(frozen=True, slots=True, eq=False)
class TensorRef:
    """A tensor: a strided window on a storage, which it was checked to fit."""

    storage: StorageRef
    dtype: str
    offset: int
    """In elements."""
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def is_contiguous(self) -> bool:
        """Whether its elements lie in row-major order without gaps."""
        expected = 1
        for size, step in zip(reversed(self.shape), reversed(self.stride), strict=True):
            if size > 1 and step != expected:
                return False
            expected *= size
        return True

    @property
    def is_columns(self) -> bool:
        """Whether it is some columns of a row-major matrix: its rows lie apart."""
        rows, *columns = self.shape
        return len(columns) == 1 and self.stride[0] > columns[0] and self.stride[1] == 1 and rows > 0


def loads(data: bytes, allowed: Collection[Global] | None = None) -> Any:
    """The value of a pickle that torch wrote: tensors are `TensorRef`, other objects inert.

    `allowed` limits what it may name: see `unpickle.loads`.

    Raises:
        PickleError: Malformed, hostile or too large.
    """
    return unpickle.loads(data, BUILDERS, _storage, allowed)


def _storage(identity: Any) -> StorageRef:
    """('storage', type, key, location, numel); a sixth item, a legacy view, is refused unless it is None."""
    if type(identity) is not tuple or len(identity) not in (5, 6) or identity[0] != "storage" or any(identity[5:]):
        raise PickleError("the pickle refers to something that is not a storage")
    kind, key, numel = identity[1], identity[2], identity[4]
    known = type(kind) is Global and kind.module in ("torch", "torch.storage") and kind.name in STORAGE_DTYPES
    if not known:
        raise PickleError(f"the pickle has a storage of unknown type {kind}")
    if type(key) is not str or not (key.isascii() and key.isdigit()) or len(key) > MAX_KEY_DIGITS:
        raise PickleError(f"the pickle has a storage with the key {str(key)[:40]!r}")
    return StorageRef(STORAGE_DTYPES[kind.name], key, _sizes((numel,), "a storage's size")[0])


def _sizes(values: Any, what: str) -> tuple[int, ...]:
    plain = type(values) is tuple and len(values) <= MAX_DIMENSIONS
    if not plain or any(type(size) is not int or not 0 <= size < MAX_SIZE for size in values):
        raise PickleError(f"the pickle has {what} that is not made of sizes")
    return tuple(values)


def _tensor(args: tuple[Any, ...], dtype: str | None = None) -> TensorRef:
    """(storage, offset, shape, stride, ...)."""
    if len(args) < 4 or type(args[0]) is not StorageRef:
        raise PickleError("the pickle makes a tensor from something that is not a storage")
    storage = args[0]
    (offset,) = _sizes((args[1],), "a tensor's offset")
    shape, stride = _sizes(args[2], "a tensor's shape"), _sizes(args[3], "a tensor's stride")
    if len(shape) != len(stride):
        raise PickleError("the pickle has a tensor whose shape and stride differ in length")
    count = prod(shape)
    last = offset + sum((size - 1) * step for size, step in zip(shape, stride, strict=True)) if count else offset
    dtype = dtype or storage.dtype
    room = storage.numel * ITEM_SIZE[storage.dtype] // ITEM_SIZE[dtype]
    if count > room or (count and last >= room) or offset > room:
        raise PickleError(f"the pickle has a tensor of shape {shape} at {offset} in a storage of {room} elements")
    return TensorRef(storage, dtype, offset, shape, stride)


def _tensor_with_dtype(args: tuple[Any, ...]) -> TensorRef:
    """(storage, offset, shape, stride, requires_grad, hooks, dtype, ...)."""
    dtype = args[6] if len(args) > 6 else None
    if type(dtype) is not Global or dtype.module != "torch" or dtype.name not in ITEM_SIZE:
        raise PickleError("the pickle has a tensor of unknown type")
    return _tensor(args, dtype.name)


def _parameter(args: tuple[Any, ...]) -> TensorRef:
    """(tensor, requires_grad, hooks, ...)."""
    if not args or type(args[0]) is not TensorRef:
        raise PickleError("the pickle makes a parameter from something that is not a tensor")
    return args[0]


def _tensor_subclass(args: tuple[Any, ...]) -> Any:
    """(rebuild function, type, its arguments, state)."""
    func, inner = (args[0], args[2]) if len(args) == 4 else (None, None)
    if type(func) is not Global or func not in TENSORS or type(inner) is not tuple:
        raise PickleError("the pickle makes a tensor by an unknown function")
    return TENSORS[func](inner)


def _ordered_dict(args: tuple[Any, ...]) -> dict[Any, Any]:
    pairs = args[0] if args else []
    if type(pairs) not in (list, tuple) or any(type(p) not in (list, tuple) or len(p) != 2 for p in pairs):
        raise PickleError("the pickle makes an OrderedDict from something else than pairs")
    return {unpickle.as_key(key): value for key, value in pairs}


def _size(args: tuple[Any, ...]) -> tuple[int, ...]:
    return _sizes(args[0] if len(args) == 1 else None, "a torch.Size")


def _bytes(args: tuple[Any, ...]) -> bytes:
    """How protocol 2 spells bytes: a latin-1 string to encode."""
    if not args or type(args[0]) is not str or args[1:] not in ((), ("latin1",), ("latin-1",)):
        raise PickleError("the pickle encodes bytes in an unknown way")
    return args[0].encode("latin-1")


TENSORS: Builders = {
    Global("torch._utils", "_rebuild_tensor"): _tensor,
    Global("torch._utils", "_rebuild_tensor_v2"): _tensor,
    Global("torch._utils", "_rebuild_tensor_v3"): _tensor_with_dtype,
    Global("torch._utils", "_rebuild_parameter"): _parameter,
    Global("torch._utils", "_rebuild_parameter_with_state"): _parameter,
}
BUILDERS: Mapping[Global, Any] = {
    **TENSORS,
    Global("torch._tensor", "_rebuild_from_type_v2"): _tensor_subclass,
    Global("collections", "OrderedDict"): _ordered_dict,
    Global("torch", "Size"): _size,
    Global("_codecs", "encode"): _bytes,
}
