"""Spells a small tree of plain values and tensors-to-come as the pickle that torch.save would write."""

import struct
from argparse import Namespace
from collections.abc import Iterable
from math import prod
from typing import Any

from ckpt_tools.storage.output import Slot
from ckpt_tools.storage.torch_pickle import STORAGE_DTYPES
from ckpt_tools.storage.unpickle import Global

STORAGE_OF = {dtype: name for name, dtype in STORAGE_DTYPES.items() if name != "UntypedStorage"}


def dumps(tree: Any) -> tuple[bytes, list[Slot]]:
    """The pickle of a tree, and the slots in it, whose bytes belong into the records data/0, data/1, ...

    Args:
        tree: Dictionaries, tuples, strings, numbers, None, `Namespace`, `Global` and `Slot`.
    """
    pickled = _Pickle()
    pickled.value(tree)
    return bytes(pickled.out + b"."), pickled.slots


class _Pickle:
    """Protocol 2, as torch writes. Only globals are remembered: equal values are written again."""

    def __init__(self) -> None:
        self.out = bytearray(b"\x80\x02")
        self.slots: list[Slot] = []
        self._known: dict[Global, int] = {}

    def value(self, value: Any) -> None:
        kind = type(value)
        if kind is dict:
            self.out += b"}"
            self._items(value.items())
        elif kind is tuple:
            self.out += b"("
            for item in value:
                self.value(item)
            self.out += b"t"
        elif kind is Global:
            self._global(value)
        elif kind is Namespace:
            self._call(Global("argparse", "Namespace"), ())
            self.value(vars(value))
            self.out += b"b"
        elif kind is Slot:
            self._slot(value)
        else:
            self._scalar(value)

    def _scalar(self, value: Any) -> None:
        kind = type(value)
        if value is None:
            self.out += b"N"
        elif kind is bool:
            self.out += b"\x88" if value else b"\x89"
        elif kind is int and -(1 << 31) <= value < 1 << 31:
            self.out += b"J" + struct.pack("<i", value)
        elif kind is int:
            data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
            self.out += b"\x8a" + bytes([len(data)]) + data
        elif kind is float:
            self.out += b"G" + struct.pack(">d", value)
        elif kind is str:
            data = value.encode("utf-8", "surrogatepass")
            self.out += b"X" + struct.pack("<I", len(data)) + data
        else:
            raise TypeError(f"a {kind.__name__} has no place in a checkpoint's tree")

    def _items(self, pairs: Iterable[tuple[Any, Any]]) -> None:
        self.out += b"("
        for key, value in pairs:
            self.value(key)
            self.value(value)
        self.out += b"u"

    def _global(self, name: Global) -> None:
        if name in self._known:
            self.out += b"j" + struct.pack("<I", self._known[name])
            return
        self._known[name] = len(self._known)
        self.out += f"c{name.module}\n{name.name}\n".encode() + b"r" + struct.pack("<I", self._known[name])

    def _call(self, func: Global, args: tuple[Any, ...]) -> None:
        self._global(func)
        self.value(args)
        self.out += b"R"

    def _slot(self, slot: Slot) -> None:
        """`torch._utils._rebuild_tensor_v2(storage, offset, shape, stride, requires_grad, hooks)`."""
        self._global(Global("torch._utils", "_rebuild_tensor_v2"))
        self.out += b"("
        storage = Global("torch", STORAGE_OF[slot.dtype])
        self.value(("storage", storage, str(len(self.slots)), "cpu", prod(slot.shape)))
        self.out += b"Q"
        self.value(0)
        self.value(slot.shape)
        self.value(tuple(prod(slot.shape[n + 1 :]) for n in range(len(slot.shape))))
        self.value(False)
        self._call(Global("collections", "OrderedDict"), ())
        self.out += b"tR"
        self.slots.append(slot)
