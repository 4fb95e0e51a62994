"""Pickles read as data, by a machine that knows the operations of plain data and calls nothing that a file names."""

from __future__ import annotations

import dataclasses
import pickletools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, BinaryIO

# (module, name) of a global, and the function of ours that stands for it: what a call of the global would be given in,
# inert data out. None: the global stands for itself.
Builders = Mapping[tuple[str, str], Callable[[tuple], Any] | None]


class Refused(ValueError):
    """The pickle holds what it must not; the message says what, to follow "got"."""


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class Global:
    """A global that a pickle names."""

    module: str
    name: str


@dataclasses.dataclass(eq=False, slots=True)
class Inert:
    """An object that a pickle describes, as its class and its state."""

    class_name: str
    state: Any = None


def read(
    file: BinaryIO, builders: Builders, *, max_operations: int, persistent: Callable[[Any], Any] | None = None
) -> Any:
    """The object of the pickle that starts at the position of `file`, which ends up behind it.

    Made of None, bool, int, float, str, bytes, tuple, list, dict with str keys, empty set, `Inert` and whatever
    `builders` return. Raises Refused for a broken pickle, for a global without a builder and for every operation that
    goes beyond such data: no function is ever called but those of `builders` and `persistent`.

    Memory: at most what the file holds and a small Python object for each operation. For that, `file.read(n)` must
    allocate no more than what is left, whatever `n`, as those of io.BytesIO and mmap do.
    """
    machine = _Machine(builders, persistent)
    for count, (name, argument) in enumerate(_operations(file)):
        if name == "STOP":
            return machine.pop()
        if count == max_operations:
            raise Refused(f"a pickle of more than {max_operations} operations")
        machine.execute(name, argument)
    raise Refused("a broken pickle")


def shown(value: Any) -> str:
    """A few characters, on one line, for an error message about anything that a pickle can hold."""
    if value is not None and type(value) not in (bool, int, float, str):
        return f"some {type(value).__name__}"
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _operations(file: BinaryIO) -> Iterator[tuple[str, Any]]:
    try:
        for opcode, argument, _ in pickletools.genops(file):
            yield opcode.name, argument
    except (ValueError, Warning) as error:  # a warning, under `python -W error`, of a bad escape in a name
        reason = str(error).splitlines()[0][:120]
        raise Refused(f"a broken pickle: {reason.encode('ascii', 'backslashreplace').decode()}") from error


class _Machine:
    def __init__(self, builders: Builders, persistent: Callable[[Any], Any] | None):
        self.builders, self.persistent = builders, persistent
        self.stack: list[Any] = []
        self.marks: list[int] = []  # heights of the stack
        self.memo: dict[int, Any] = {}

    def pop(self) -> Any:
        self.top(object)
        return self.stack.pop()

    def pop_mark(self) -> list[Any]:
        if not self.marks:
            raise Refused("a broken pickle: no mark")
        height = self.marks.pop()
        items = self.stack[height:]
        del self.stack[height:]
        return items

    def top(self, kind: type) -> Any:
        """What lies on top of the stack, which must be exactly of that kind (object: anything)."""
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            raise Refused("a broken pickle: nothing on its stack")
        if kind is not object and type(self.stack[-1]) is not kind:
            raise Refused(f"a pickle that fills or calls {shown(self.stack[-1])}")
        return self.stack[-1]

    def execute(self, name: str, argument: Any) -> None:
        match name:
            case "PROTO" | "FRAME":
                pass
            case "MARK":
                self.marks.append(len(self.stack))
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                self.stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[name])
            case (
                "BININT"
                | "BININT1"
                | "BININT2"
                | "LONG1"
                | "BINFLOAT"
                | "SHORT_BINUNICODE"
                | "BINUNICODE"
                | "BINUNICODE8"
                | "SHORT_BINBYTES"
                | "BINBYTES"
                | "BINBYTES8"
            ):
                self.stack.append(argument)
            case "EMPTY_DICT" | "EMPTY_LIST" | "EMPTY_SET":
                self.stack.append({"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_SET": set}[name]())
            case "EMPTY_TUPLE":
                self.stack.append(())
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                self.stack.append(tuple([self.pop() for _ in range(int(name[-1]))][::-1]))
            case "TUPLE":
                self.stack.append(tuple(self.pop_mark()))
            case "APPEND" | "APPENDS":
                items = [self.pop()] if name == "APPEND" else self.pop_mark()
                self.top(list).extend(items)
            case "SETITEM" | "SETITEMS":
                items = [self.pop(), self.pop()][::-1] if name == "SETITEM" else self.pop_mark()
                self._set_items(self.top(dict), items)
            case "MEMOIZE":
                self.memo[len(self.memo)] = self.top(object)
            case "BINPUT" | "LONG_BINPUT":
                self.memo[argument] = self.top(object)
            case "BINGET" | "LONG_BINGET":
                if argument not in self.memo:
                    raise Refused("a broken pickle: nothing in its memo")
                self.stack.append(self.memo[argument])
            case "GLOBAL":
                self._push_global(*argument.split(" ", 1))
            case "STACK_GLOBAL":
                member, module = self.pop(), self.pop()
                if type(module) is not str or type(member) is not str:
                    raise Refused("a broken pickle: a global without a name")
                self._push_global(module, member)
            case "REDUCE" | "NEWOBJ":
                arguments = self.pop()
                called = self.top(Global)
                builder = self.builders[called.module, called.name]
                if builder is None or type(arguments) is not tuple:
                    raise Refused(f"a pickle that calls {called.module}.{called.name} in an unexpected way")
                self.stack[-1] = builder(arguments)
            case "BUILD":
                state = self.pop()
                built = self.top(Inert)
                if built.state is not None:
                    raise Refused(f"a pickle that gives a state to a {built.class_name} twice")
                built.state = state
            case "BINPERSID":
                if self.persistent is None:
                    raise Refused("a pickle that points out of itself")
                self.stack.append(self.persistent(self.pop()))
            case _:
                raise Refused(f"a pickle with the operation {name}, which is refused")

    def _set_items(self, target: dict[str, Any], items: list[Any]) -> None:
        if len(items) % 2:
            raise Refused("a broken pickle: a key without a value")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(key) is not str:  # the hash of a deep tuple would exhaust the C stack
                raise Refused(f"a dictionary whose keys are not strings but {shown(key)}")
            target[key] = value

    def _push_global(self, module: str, name: str) -> None:
        if (module, name) not in self.builders:
            full_name = f"{module}.{name}"
            text = full_name if full_name.isascii() and full_name.isprintable() else ascii(full_name)
            raise Refused(f"the global {text[:120]}, which is refused")
        self.stack.append(Global(module, name))
