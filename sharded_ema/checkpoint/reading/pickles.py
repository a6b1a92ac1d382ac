"""Pickles taken apart instead of loaded.

A pickle is a program. Here a small machine follows the few instructions that descriptions of
tensors need, and makes plain data of them: texts, numbers, tuples, lists, dicts, and *notes* of
what would have been made. A global stays a name and a call stays a note of a call, so nothing is
imported and nothing runs. No instruction makes more than it takes from the stack or the file: time
and memory stay in proportion to the bytes read. That would not hold of ``pickle.Unpickler``, even
with an allow-list: hashing shared tuples or one large memo index is enough to stall it.

The instructions are described in the source of Python's ``pickletools``.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

from sharded_ema.errors import CheckpointCorruptError

_HIGHEST_PROTOCOL = 5


@dataclass(frozen=True, slots=True)
class Global:
    """A name that the pickle would have imported."""

    module: str
    name: str


#: Early versions of Python 3.11 write a member of an enumeration as ``getattr(its class, name)``.
MEMBER = Global("builtins", "getattr")
#: Stands for whatever ``persistent_load`` would have returned.
PERSISTENT = Global("", "a persistent object")


@dataclass(slots=True, eq=False, repr=False)
class Note:
    """An object that the pickle would have made.

    Attributes:
        of: what would have been called.
        arguments: what it would have been given.
        state: what ``__setstate__`` would have been given.
    """

    of: Global
    arguments: tuple[Any, ...]
    state: Any = None


def take_apart(data: bytes, allowed: Callable[[Global], bool], where: str) -> Any:
    """What a pickle says.

    Args:
        data: the whole pickle, nothing before or after it.
        allowed: whether a global may be named.
        where: what is read, for messages.

    Raises:
        CheckpointCorruptError: no pickle, or one with other instructions or globals.
    """
    machine = _Machine(data, allowed)
    try:
        return machine.run()
    except (ValueError, IndexError, KeyError, struct.error) as error:
        raise CheckpointCorruptError(
            f"{where} cannot be read: {error if isinstance(error, _Refused) else 'it is damaged'}"
        ) from None


class _Refused(ValueError):
    """The pickle is understood and not accepted."""


class _Machine:
    def __init__(self, data: bytes, allowed: Callable[[Global], bool]) -> None:
        self._data = data
        self._allowed = allowed
        self._at = 0
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}

    def run(self) -> Any:
        data, table = self._data, _TABLE
        while (code := data[self._at]) != _STOP:
            self._at += 1
            instruction = table.get(code)
            if instruction is None:
                raise _Refused(f"it has the forbidden instruction {code:#04x}")
            instruction(self)
        if self._at + 1 != len(data):
            raise _Refused(f"{len(data) - self._at - 1} bytes follow its end")
        if len(self._stack) != 1 or self._marks:
            raise _Refused("it is incomplete")
        return self._stack[0]

    def _take(self, count: int) -> bytes:
        end = self._at + count
        if end > len(self._data):
            raise _Refused("it ends early")
        piece = self._data[self._at : end]
        self._at = end
        return piece

    def _take_count(self, width: int) -> int:
        if width == 1:  # nearly always; by far the fastest way
            self._at += 1
            return self._data[self._at - 1]
        return int.from_bytes(self._take(width), "little")

    def _take_line(self) -> str:
        end = self._data.index(b"\n", self._at)
        line = self._data[self._at : end]
        self._at = end + 1
        return line.decode()

    def _since_mark(self) -> list[Any]:
        start = self._marks.pop()
        items = self._stack[start:]
        del self._stack[start:]
        return items

    # ------------------------------------------------------------------ instructions

    def _proto(self) -> None:
        if self._take_count(1) > _HIGHEST_PROTOCOL:
            raise _Refused("it is of a later protocol")

    def _frame(self) -> None:
        self._take(8)

    def _mark(self) -> None:
        self._marks.append(len(self._stack))

    def _text(self, width: int) -> None:
        self._stack.append(self._take(self._take_count(width)).decode())

    def _bytes(self, width: int) -> None:
        self._stack.append(self._take(self._take_count(width)))

    def _unsigned(self, width: int) -> None:
        self._stack.append(self._take_count(width))

    def _signed(self) -> None:
        self._stack.append(int.from_bytes(self._take(4), "little", signed=True))

    def _long(self) -> None:
        data = self._take(self._take_count(1))
        self._stack.append(int.from_bytes(data, "little", signed=True))

    def _float(self) -> None:
        self._stack.append(struct.unpack(">d", self._take(8))[0])

    def _constant(self, value: Any) -> None:
        self._stack.append(value)

    def _empty_list(self) -> None:
        self._stack.append([])

    def _empty_dict(self) -> None:
        self._stack.append({})

    def _tuple(self) -> None:
        self._stack.append(tuple(self._since_mark()))

    def _short_tuple(self, count: int) -> None:
        items = tuple(self._stack[-count:])
        if len(items) != count:
            raise _Refused("it is damaged")
        self._stack[-count:] = [items]

    def _put(self, width: int) -> None:
        self._memo[self._take_count(width)] = self._stack[-1]

    def _memoize(self) -> None:
        self._memo[len(self._memo)] = self._stack[-1]

    def _get(self, width: int) -> None:
        self._stack.append(self._memo[self._take_count(width)])

    def _append(self) -> None:
        self._extend([self._stack.pop()])

    def _appends(self) -> None:
        self._extend(self._since_mark())

    def _extend(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if not isinstance(target, list):
            raise _Refused("it appends to what is no list")
        target += items

    def _set_item(self) -> None:
        value, key = self._stack.pop(), self._stack.pop()
        self._update([key, value])

    def _set_items(self) -> None:
        self._update(self._since_mark())

    def _update(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if isinstance(target, Note):
            return  # an OrderedDict; nothing that is read here is in one
        if not isinstance(target, dict):
            raise _Refused("it sets an item of what is no dict")
        for key, value in zip(items[::2], items[1::2], strict=True):
            # The hash of nested tuples takes time exponential in their depth.
            if not isinstance(key, (str, Note)):
                raise _Refused("it has a dict with keys that do not belong there")
            target[key] = value

    def _global(self) -> None:
        self._name(self._take_line(), self._take_line())

    def _stack_global(self) -> None:
        name, module = self._stack.pop(), self._stack.pop()
        self._name(module, name)

    def _name(self, module: Any, name: Any) -> None:
        if not isinstance(module, str) or not isinstance(name, str):
            raise _Refused("it names a global that is no text")
        found = Global(module, name)
        self._permit(found)
        self._stack.append(found)

    def _permit(self, found: Global) -> None:
        if not self._allowed(found):
            raise _Refused(f"it names the forbidden global {found.module}.{found.name:.80}")

    def _call(self) -> None:
        arguments, called = self._stack.pop(), self._stack.pop()
        if not isinstance(called, Global) or not isinstance(arguments, tuple):
            raise _Refused("it calls what is no global")
        if called == MEMBER and [type(a) for a in arguments] != [Global, str]:
            raise _Refused("it takes an attribute of what is no enumeration")
        self._stack.append(Note(called, arguments))

    def _persistent(self) -> None:
        self._permit(PERSISTENT)
        self._stack.append(Note(PERSISTENT, (self._stack.pop(),)))

    def _build(self) -> None:
        state = self._stack.pop()
        target = self._stack[-1]
        if not isinstance(target, Note) or target.state is not None:
            raise _Refused("it sets a state of what has none")
        target.state = state


_STOP = ord(".")
_Instruction = Callable[[_Machine], None]


def _with(instruction: Callable[[_Machine, Any], None], argument: Any) -> _Instruction:
    return lambda machine: instruction(machine, argument)


# Left out on purpose: INST, OBJ, NEWOBJ_EX, EXT1/2/4 (other ways to make objects), PERSID, the text
# forms of numbers, LONG4, POP, DUP, sets, bytearrays and out-of-band buffers.
_TABLE: dict[int, _Instruction] = {
    0x80: _Machine._proto,
    0x95: _Machine._frame,
    ord("("): _Machine._mark,
    0x8C: _with(_Machine._text, 1),
    ord("X"): _with(_Machine._text, 4),
    ord("C"): _with(_Machine._bytes, 1),
    ord("B"): _with(_Machine._bytes, 4),
    ord("K"): _with(_Machine._unsigned, 1),
    ord("M"): _with(_Machine._unsigned, 2),
    ord("J"): _Machine._signed,
    0x8A: _Machine._long,
    ord("G"): _Machine._float,
    ord("N"): _with(_Machine._constant, None),
    0x88: _with(_Machine._constant, True),
    0x89: _with(_Machine._constant, False),
    ord(")"): _with(_Machine._constant, ()),
    ord("]"): _Machine._empty_list,
    ord("}"): _Machine._empty_dict,
    ord("t"): _Machine._tuple,
    0x85: _with(_Machine._short_tuple, 1),
    0x86: _with(_Machine._short_tuple, 2),
    0x87: _with(_Machine._short_tuple, 3),
    ord("q"): _with(_Machine._put, 1),
    ord("r"): _with(_Machine._put, 4),
    0x94: _Machine._memoize,
    ord("h"): _with(_Machine._get, 1),
    ord("j"): _with(_Machine._get, 4),
    ord("a"): _Machine._append,
    ord("e"): _Machine._appends,
    ord("s"): _Machine._set_item,
    ord("u"): _Machine._set_items,
    ord("c"): _Machine._global,
    0x93: _Machine._stack_global,
    ord("R"): _Machine._call,
    0x81: _Machine._call,  # NEWOBJ
    ord("Q"): _Machine._persistent,
    ord("b"): _Machine._build,
}


def refuse(where: str, what: str) -> NoReturn:
    """Raise the error of a pickle that says what cannot be."""
    raise CheckpointCorruptError(f"{where} cannot be read: {what}")
