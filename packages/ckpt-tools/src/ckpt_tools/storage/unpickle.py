"""Reads a pickle as data: a small machine over the pickle's operations, in which nothing is imported or called.

What the pickle names becomes an inert `Global`, what it would call a `Record`, unless the caller passes a builder for
that very global. Foreign checkpoints hold enums, RNG states and whole modules that are of no interest to a converter:
they pass through as placeholders, and a hostile file can do no more than be refused.
"""

import io
import pickletools
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from ckpt_tools.errors import CheckpointError

MAX_OPERATIONS = 20_000_000
MAX_KEY_ITEMS = 64


class PickleError(CheckpointError):
    """The pickle is malformed, hostile or larger than the limits."""


@dataclass(frozen=True, slots=True)
class Global:
    """A name that the pickle would import."""

    module: str
    name: str


@dataclass(eq=False, slots=True)
class Record:
    """A call that was not made: of what, with what, and what would have been done to the result."""

    func: Global
    args: tuple[Any, ...]
    states: list[Any] = field(default_factory=list)
    """What its attributes would have been set from."""
    items: list[Any] = field(default_factory=list)
    """Values appended, or (key, value) pairs set."""


Builders = Mapping[Global, Callable[[tuple[Any, ...]], Any]]
"""What stands for the results of known calls, from their arguments, which the builder checks."""


def loads(
    data: bytes,
    builders: Builders | None = None,
    persistent: Callable[[Any], Any] | None = None,
    allowed: Collection[Global] | None = None,
) -> Any:
    """The value of a pickle: plain data, `Global`, `Record`, and what the builders made.

    Args:
        data: The pickle.
        builders: Stand-ins for known calls.
        persistent: Makes the stand-in of a persistent id; without it, the pickle may have none.
        allowed: What the pickle may name; anything unless given. For a pickle that another reader is to open
            afterwards, which does import and call.

    Raises:
        PickleError: Malformed, hostile or too large.
    """
    machine = _Machine(builders or {}, persistent, allowed)
    try:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(io.BytesIO(data))):
            if count > MAX_OPERATIONS:
                raise PickleError(f"the pickle has more than {MAX_OPERATIONS} operations")
            if opcode.name == "STOP":
                return machine.result()
            machine.do(opcode.name, argument)
    except PickleError:
        raise
    except (ValueError, IndexError, KeyError, OverflowError, TypeError, RecursionError) as error:
        raise PickleError(f"the pickle is malformed: {type(error).__name__}: {error}") from None
    raise PickleError("the pickle does not end")


class _Mark:
    """Where a sequence of values begins on the stack."""


MARK = _Mark()

INTEGERS = ("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4")
FLOATS = ("FLOAT", "BINFLOAT")
STRINGS = ("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8")
BYTES = ("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8")
LITERALS = frozenset((*INTEGERS, *FLOATS, *STRINGS, *BYTES))
CONSTANTS: Mapping[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
CONTAINERS: Mapping[str, Callable[[], Any]] = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_SET": set}
SKIPPED = frozenset(["PROTO", "FRAME"])


class _Machine:
    """The pickle machine's stack and memo. An operation without a method here is refused."""

    def __init__(
        self,
        builders: Builders,
        persistent: Callable[[Any], Any] | None,
        allowed: Collection[Global] | None,
    ) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.builders = builders
        self.persistent = persistent
        self.allowed = allowed

    def do(self, name: str, argument: Any) -> None:
        if name in LITERALS:
            self.stack.append(argument)
        elif name in CONSTANTS:
            self.stack.append(CONSTANTS[name])
        elif name in CONTAINERS:
            self.stack.append(CONTAINERS[name]())
        elif name in OPERATIONS:
            OPERATIONS[name](self, argument)
        elif name not in SKIPPED:  # extension codes, textual persistent ids, out-of-band buffers
            raise PickleError(f"the pickle uses the operation {name}, which is not allowed")

    def result(self) -> Any:
        value = self.pop()
        if self.stack:
            raise PickleError("the pickle leaves values on its stack")
        return value

    def top(self) -> Any:
        if self.stack[-1] is MARK:
            raise PickleError("the pickle has a mark where a value is needed")
        return self.stack[-1]

    def pop(self) -> Any:
        self.top()
        return self.stack.pop()

    def pop_to_mark(self) -> list[Any]:
        at = len(self.stack) - 1
        while at >= 0 and self.stack[at] is not MARK:
            at -= 1
        if at < 0:
            raise PickleError("the pickle lacks a mark")
        values = self.stack[at + 1 :]
        del self.stack[at:]
        return values

    # Each operation takes the argument that stands in the pickle, mostly None.

    def mark(self, _: Any) -> None:
        self.stack.append(MARK)

    def discard(self, _: Any) -> None:
        self.stack.pop()

    def discard_to_mark(self, _: Any) -> None:
        self.pop_to_mark()

    def duplicate(self, _: Any) -> None:
        self.stack.append(self.top())

    def get(self, key: int) -> None:
        self.stack.append(self.memo[key])

    def put(self, key: int) -> None:
        self.memo[key] = self.top()

    def memoize(self, _: Any) -> None:
        self.memo[len(self.memo)] = self.top()

    def tuple1(self, _: Any) -> None:
        self.stack.append((self.pop(),))

    def tuple2(self, _: Any) -> None:
        second, first = self.pop(), self.pop()
        self.stack.append((first, second))

    def tuple3(self, _: Any) -> None:
        third, second, first = self.pop(), self.pop(), self.pop()
        self.stack.append((first, second, third))

    def make_tuple(self, _: Any) -> None:
        self.stack.append(tuple(self.pop_to_mark()))

    def make_list(self, _: Any) -> None:
        self.stack.append(self.pop_to_mark())

    def make_frozenset(self, _: Any) -> None:
        self.stack.append(frozenset(map(as_key, self.pop_to_mark())))

    def make_dict(self, _: Any) -> None:
        values = self.pop_to_mark()
        self.stack.append({})
        self._set_items(values)

    def append(self, _: Any) -> None:
        value = self.pop()
        self._extend([value])

    def appends(self, _: Any) -> None:
        self._extend(self.pop_to_mark())

    def set_item(self, _: Any) -> None:
        value, key = self.pop(), self.pop()
        self._set_items([key, value])

    def set_items(self, _: Any) -> None:
        self._set_items(self.pop_to_mark())

    def _extend(self, values: list[Any]) -> None:
        target = self.top()
        if type(target) is list:
            target.extend(values)
        elif type(target) is set:
            target.update(map(as_key, values))
        elif type(target) is Record:
            target.items.extend(values)
        else:
            raise PickleError(f"the pickle appends to a {type(target).__name__}")

    def _set_items(self, values: list[Any]) -> None:
        target = self.top()
        if len(values) % 2:
            raise PickleError("the pickle has a key without a value")
        for key, value in zip(values[::2], values[1::2], strict=True):
            if type(target) is dict:
                target[as_key(key)] = value
            elif type(target) is Record:
                target.items.append((key, value))
            else:
                raise PickleError(f"the pickle sets items of a {type(target).__name__}")

    def name(self, argument: str) -> None:
        self.stack.append(self._global(*argument.split(" ", 1)))

    def name_from_stack(self, _: Any) -> None:
        name, module = self.pop(), self.pop()
        if type(name) is not str or type(module) is not str:
            raise PickleError("the pickle names a global by something else than strings")
        self.stack.append(self._global(module, name))

    def _global(self, module: str, name: str) -> Global:
        named = Global(module, name)
        if self.allowed is not None and named not in self.allowed:
            raise PickleError(f"the pickle names {module}.{name}, which has no place in it")
        return named

    def call(self, _: Any) -> None:
        arguments = self.pop()
        self.stack.append(self._result_of(self.pop(), arguments))

    def call_with_keywords(self, _: Any) -> None:
        if self.pop():
            raise PickleError("the pickle calls with keyword arguments")
        self.call(None)

    def call_to_mark(self, _: Any) -> None:
        func, *arguments = self.pop_to_mark()
        self.stack.append(self._result_of(func, tuple(arguments)))

    def call_named(self, argument: str) -> None:
        arguments = tuple(self.pop_to_mark())
        self.stack.append(self._result_of(self._global(*argument.split(" ", 1)), arguments))

    def _result_of(self, func: Any, arguments: Any) -> Any:
        if type(func) is not Global or type(arguments) is not tuple:
            raise PickleError(f"the pickle calls a {type(func).__name__}")
        return self.builders[func](arguments) if func in self.builders else Record(func, arguments)

    def set_state(self, _: Any) -> None:
        """Attributes of a placeholder are kept as data; those of a dictionary or of what a builder made are dropped."""
        state, target = self.pop(), self.top()
        if type(target) is Record:
            target.states.append(state)
        elif type(target) is Global:
            raise PickleError(f"the pickle sets attributes of {target.module}.{target.name}")

    def persistent_id(self, _: Any) -> None:
        if self.persistent is None:
            raise PickleError("the pickle refers to something outside of it")
        self.stack.append(self.persistent(self.pop()))


OPERATIONS: Mapping[str, Callable[[_Machine, Any], None]] = {
    "MARK": _Machine.mark,
    "POP": _Machine.discard,
    "POP_MARK": _Machine.discard_to_mark,
    "DUP": _Machine.duplicate,
    "GET": _Machine.get,
    "BINGET": _Machine.get,
    "LONG_BINGET": _Machine.get,
    "PUT": _Machine.put,
    "BINPUT": _Machine.put,
    "LONG_BINPUT": _Machine.put,
    "MEMOIZE": _Machine.memoize,
    "TUPLE1": _Machine.tuple1,
    "TUPLE2": _Machine.tuple2,
    "TUPLE3": _Machine.tuple3,
    "TUPLE": _Machine.make_tuple,
    "LIST": _Machine.make_list,
    "FROZENSET": _Machine.make_frozenset,
    "DICT": _Machine.make_dict,
    "APPEND": _Machine.append,
    "APPENDS": _Machine.appends,
    "ADDITEMS": _Machine.appends,
    "SETITEM": _Machine.set_item,
    "SETITEMS": _Machine.set_items,
    "GLOBAL": _Machine.name,
    "STACK_GLOBAL": _Machine.name_from_stack,
    "REDUCE": _Machine.call,
    "NEWOBJ": _Machine.call,
    "NEWOBJ_EX": _Machine.call_with_keywords,
    "OBJ": _Machine.call_to_mark,
    "INST": _Machine.call_named,
    "BUILD": _Machine.set_state,
    "BINPERSID": _Machine.persistent_id,
}


def as_key(key: Any) -> Any:
    """`key`, where it may be hashed: nested tuples can take exponential time, so a key is flat or inert."""
    items = key if type(key) is tuple else (key,)
    plain = (str, bytes, int, float, bool, type(None), Global, Record)
    if len(items) > MAX_KEY_ITEMS or any(type(item) not in plain for item in items):
        raise PickleError(f"the pickle uses a {type(key).__name__} as a dictionary's key")
    return key


def attributes(value: Any, class_name: str) -> dict[str, Any]:
    """The attributes of an object that the pickle would have made.

    Raises:
        PickleError: `value` is no placeholder of an object of a class of this name.
    """
    if type(value) is not Record or value.func.name != class_name or not value.states:
        raise PickleError(f"the pickle holds a {type(value).__name__} where a {class_name} is expected")
    state = value.states[-1]
    if type(state) is not dict:
        raise PickleError(f"the pickle's {class_name} has no attributes")
    return state


Path = tuple[Any, ...]


def walk(tree: Any, kind: type, max_nodes: int = 5_000_000, max_depth: int = 64) -> Iterator[tuple[Path, Any]]:
    """(path, value) of every value of a type in nested dictionaries, lists and tuples, in order.

    Iterative, and bounded for trees that share or contain themselves.
    """
    todo: list[tuple[Path, Any]] = [((), tree)]
    seen = 0
    while todo:
        path, node = todo.pop()
        seen += 1
        if seen > max_nodes or len(path) > max_depth:
            raise PickleError("the pickle's tree is too large or too deep")
        if type(node) is kind:
            yield path, node
        elif type(node) is dict:
            todo.extend(((*path, key), value) for key, value in reversed(node.items()))
        elif type(node) in (list, tuple):
            todo.extend(((*path, at), node[at]) for at in range(len(node) - 1, -1, -1))
