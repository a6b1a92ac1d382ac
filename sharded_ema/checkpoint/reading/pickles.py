"""Pickles taken apart instead of loaded.

A pickle is a program. Here a small machine follows the few instructions that descriptions of
tensors need, and makes plain data of them: texts, numbers, tuples, lists, dicts, and *notes* of
what would have been made. A global stays a name and a call stays a note of a call, so nothing is
imported and nothing runs. What instructions make is counted, by the memory that it takes, and may
not exceed some multiple of the bytes read, which descriptions of tensors stay far below: a pickle
of empty dicts would take 64 bytes for each of its own. That would not hold of ``pickle.Unpickler``,
even with an allow-list: hashing shared tuples or one large memo index is enough to stall it.

The instructions are described in the source of Python's ``pickletools``, which reads them here.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

from sharded_ema.errors import CheckpointCorruptError

_HIGHEST_PROTOCOL = 5
# Bytes of memory for each byte of a pickle, and for the shortest ones.
_MEMORY_PER_BYTE = 20
_MEMORY_FOR_ALL = 1 << 16
# What objects take: an empty dict, with its first item, a list, a tuple, a note; a number, a text.
_DICT, _ITEMS, _LIST, _TUPLE, _NOTE, _NUMBER, _TEXT = 64, 168, 64, 56, 56, 32, 49
_POINTER = 8


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
        items: what would have been put into it, as into an OrderedDict.
    """

    of: Global
    arguments: tuple[Any, ...]
    state: Any = None
    items: dict[Any, Any] | None = None


def take_apart(data: bytes, allowed: Callable[[Global], bool], where: str) -> Any:
    """What a pickle says.

    Args:
        data: the whole pickle, nothing before or after it.
        allowed: whether a global may be named.
        where: what is read, for messages.

    Raises:
        CheckpointCorruptError: no pickle, or one with other instructions or globals.
    """
    try:
        return _Machine(allowed, _MEMORY_FOR_ALL + _MEMORY_PER_BYTE * len(data)).run(data)
    except (ValueError, IndexError, KeyError) as error:
        refuse(where, str(error) if isinstance(error, _Refused) else "it is damaged")


class _Refused(ValueError):
    """The pickle is understood and not accepted."""


class _Machine:
    def __init__(self, allowed: Callable[[Global], bool], memory: int) -> None:
        self._allowed = allowed
        self._memory = memory
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: list[Any] = []

    def _take(self, num_bytes: int) -> None:
        """Count what is about to be made."""
        self._memory -= num_bytes
        if self._memory < 0:
            raise _Refused("it makes more of its bytes than any description of tensors does")

    def run(self, data: bytes) -> Any:
        table = _TABLE
        position: int | None = None
        for opcode, argument, position in pickletools.genops(data):  # noqa: B007 - the last one
            instruction = table.get(opcode.name)
            if instruction is None:
                raise _Refused(f"it has the forbidden instruction {opcode.name}")
            instruction(self, argument)
        if after := len(data) - 1 - (position or 0):
            raise _Refused(f"{after} bytes follow its end")
        if len(self._stack) != 1 or self._marks:
            raise _Refused("it is incomplete")
        return self._stack[0]

    def _since_mark(self) -> list[Any]:
        start = self._marks.pop()
        items = self._stack[start:]
        del self._stack[start:]
        return items

    # ------------------------------------------------------------------ instructions

    def _nothing(self, _: Any) -> None:
        pass

    def _proto(self, protocol: int) -> None:
        if protocol > _HIGHEST_PROTOCOL:
            raise _Refused("it is of a later protocol")

    def _mark(self, _: None) -> None:
        self._take(_NUMBER + _POINTER)
        self._marks.append(len(self._stack))

    def _push(self, value: Any) -> None:
        self._take(_POINTER + _NUMBER)
        self._stack.append(value)

    def _small(self, value: Any) -> None:
        self._stack.append(value)  # which Python has once

    def _text(self, text: str) -> None:
        self._take(_POINTER + _TEXT)
        # pickletools lets halves of surrogate pairs through, which cannot be written anywhere.
        if not text.isascii():
            text.encode()
        self._stack.append(text)

    def _none(self, _: None) -> None:
        self._stack.append(None)

    def _true(self, _: None) -> None:
        self._stack.append(True)

    def _false(self, _: None) -> None:
        self._stack.append(False)

    def _empty_tuple(self, _: None) -> None:
        self._stack.append(())

    def _empty_list(self, _: None) -> None:
        self._take(_LIST + _POINTER)
        self._stack.append([])

    def _empty_dict(self, _: None) -> None:
        self._take(_DICT + _POINTER)
        self._stack.append({})

    def _tuple(self, _: None) -> None:
        items = self._since_mark()
        self._take(_TUPLE + _POINTER * len(items))
        self._stack.append(tuple(items))

    def _tuple1(self, _: None) -> None:
        self._take(_TUPLE)
        self._stack[-1] = (self._stack[-1],)

    def _tuple2(self, _: None) -> None:
        self._take(_TUPLE)
        last = self._stack.pop()
        self._stack[-1] = (self._stack[-1], last)

    def _tuple3(self, _: None) -> None:
        self._take(_TUPLE)
        last, middle = self._stack.pop(), self._stack.pop()
        self._stack[-1] = (self._stack[-1], middle, last)

    def _put(self, number: int) -> None:
        # Picklers number from zero on.
        if number > len(self._memo):
            raise _Refused("it leaves numbers out")
        self._take(_POINTER)
        self._memo[number : number + 1] = [self._stack[-1]]

    def _memoize(self, _: None) -> None:
        self._take(_POINTER)
        self._memo.append(self._stack[-1])

    def _get(self, number: int) -> None:
        self._stack.append(self._memo[number])

    def _append(self, _: None) -> None:
        self._extend([self._stack.pop()])

    def _appends(self, _: None) -> None:
        self._extend(self._since_mark())

    def _extend(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if not isinstance(target, list):
            raise _Refused("it appends to what is no list")
        self._take(4 * _POINTER * (not target) + _POINTER * len(items))
        target += items

    def _set_item(self, _: None) -> None:
        value, key = self._stack.pop(), self._stack.pop()
        self._update([key, value])

    def _set_items(self, _: None) -> None:
        self._update(self._since_mark())

    def _update(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if isinstance(target, Note):
            if target.items is None:
                self._take(_DICT)
                target.items = {}
            target = target.items
        if not isinstance(target, dict):
            raise _Refused("it sets an item of what is no dict")
        self._take(_ITEMS * (not target and bool(items)) + 2 * _POINTER * len(items))
        for key, value in zip(items[::2], items[1::2], strict=True):
            # The hash of nested tuples takes time exponential in their depth.
            if not isinstance(key, (str, Note)):
                raise _Refused("it has a dict with keys that do not belong there")
            target[key] = value

    def _global(self, both: str) -> None:
        module, _, name = both.partition(" ")
        self._name(module, name)

    def _stack_global(self, _: None) -> None:
        name, module = self._stack.pop(), self._stack.pop()
        self._name(module, name)

    def _name(self, module: Any, name: Any) -> None:
        if not isinstance(module, str) or not isinstance(name, str):
            raise _Refused("it names a global that is no text")
        self._take(_NOTE)
        found = Global(module, name)
        self._permit(found)
        self._stack.append(found)

    def _permit(self, found: Global) -> None:
        if not self._allowed(found):
            raise _Refused(f"it names the forbidden global {found.module}.{found.name:.80}")

    def _call(self, _: None) -> None:
        arguments, called = self._stack.pop(), self._stack.pop()
        if not isinstance(called, Global) or not isinstance(arguments, tuple):
            raise _Refused("it calls what is no global")
        if called == MEMBER and [type(a) for a in arguments] != [Global, str]:
            raise _Refused("it takes an attribute of what is no enumeration")
        self._take(_NOTE)
        self._stack.append(Note(called, arguments))

    def _persistent(self, _: None) -> None:
        self._permit(PERSISTENT)
        self._take(_NOTE + _TUPLE)
        self._stack.append(Note(PERSISTENT, (self._stack.pop(),)))

    def _build(self, _: None) -> None:
        state = self._stack.pop()
        target = self._stack[-1]
        if not isinstance(target, Note) or target.state is not None:
            raise _Refused("it sets a state of what has none")
        target.state = state


# Left out on purpose: INST, OBJ, NEWOBJ_EX, EXT1/2/4 (other ways to make objects), PERSID, the text
# forms of numbers, LONG4, POP, DUP, sets, bytearrays and out-of-band buffers.
_TABLE: dict[str, Callable[[_Machine, Any], None]] = {
    "PROTO": _Machine._proto,
    "FRAME": _Machine._nothing,
    "STOP": _Machine._nothing,
    "MARK": _Machine._mark,
    "SHORT_BINUNICODE": _Machine._text,
    "BINUNICODE": _Machine._text,
    "SHORT_BINBYTES": _Machine._push,
    "BINBYTES": _Machine._push,
    "BININT1": _Machine._small,
    "BININT2": _Machine._push,
    "BININT": _Machine._push,
    "LONG1": _Machine._push,
    "BINFLOAT": _Machine._push,
    "NONE": _Machine._none,
    "NEWTRUE": _Machine._true,
    "NEWFALSE": _Machine._false,
    "EMPTY_TUPLE": _Machine._empty_tuple,
    "EMPTY_LIST": _Machine._empty_list,
    "EMPTY_DICT": _Machine._empty_dict,
    "TUPLE": _Machine._tuple,
    "TUPLE1": _Machine._tuple1,
    "TUPLE2": _Machine._tuple2,
    "TUPLE3": _Machine._tuple3,
    "BINPUT": _Machine._put,
    "LONG_BINPUT": _Machine._put,
    "MEMOIZE": _Machine._memoize,
    "BINGET": _Machine._get,
    "LONG_BINGET": _Machine._get,
    "APPEND": _Machine._append,
    "APPENDS": _Machine._appends,
    "SETITEM": _Machine._set_item,
    "SETITEMS": _Machine._set_items,
    "GLOBAL": _Machine._global,
    "STACK_GLOBAL": _Machine._stack_global,
    "REDUCE": _Machine._call,
    "NEWOBJ": _Machine._call,
    "BINPERSID": _Machine._persistent,
    "BUILD": _Machine._build,
}


def refuse(where: str, what: str) -> NoReturn:
    """Raise the error of a pickle that says what cannot be."""
    raise CheckpointCorruptError(f"{where} cannot be read: {what}") from None
