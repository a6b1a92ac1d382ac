"""JSON from files that may be damaged or made to harm: bounded, and unambiguous or refused."""

from __future__ import annotations

import json
import math
import reprlib
from typing import Any, NoReturn

from sharded_ema.errors import CheckpointCorruptError

#: Dimensions that a tensor can have in torch and numpy.
MAX_DIMS = 64
# Some 300,000 tensors. Parsing takes about 100 bytes a value, in a forged file up to twice that.
_MAX_VALUES = 4_000_000


def load_json(data: bytes, where: str) -> dict[str, Any]:
    """Parse a JSON object.

    A key that stands twice is refused, since readers differ on it, and so are NaN and Infinity,
    which are not JSON, and numbers that would become infinite.

    Raises:
        CheckpointCorruptError: not UTF-8, not JSON, not an object, one of the above, or more than
            four million values.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a key is there twice")
        return found

    def constant(name: str) -> NoReturn:
        raise ValueError(f"{name} is no JSON")

    def finite(number: str) -> float:
        if not math.isfinite(float(number)):
            raise ValueError(f"{number[:40]} is beyond any number")
        return float(number)

    # Every value but the first follows one of these. Counted first, so that memory is bounded.
    if sum(data.count(mark) for mark in (b",", b"[", b"{")) > _MAX_VALUES:
        raise CheckpointCorruptError(f"{where} has more values than any model could need")
    try:
        value = json.loads(
            data.decode(),
            object_pairs_hook=unique,
            parse_constant=constant,
            parse_float=finite,
        )
    except (ValueError, RecursionError) as error:
        raise CheckpointCorruptError(f"{where} cannot be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointCorruptError(f"{where} holds no JSON object")
    return value


def is_sizes(value: Any) -> bool:
    """Whether a value is a list of sizes: integers of 63 bits, not more than a tensor can have."""
    return (
        isinstance(value, list)
        and len(value) <= MAX_DIMS
        and all(type(n) is int and 0 <= n < 1 << 63 for n in value)
    )


def is_text(value: Any) -> bool:
    """Whether a value is a text that is not empty and has a meaning in UTF-8."""
    try:
        return isinstance(value, str) and bool(value.encode())
    except UnicodeEncodeError:  # half a surrogate pair, from a JSON escape
        return False


def shown(value: Any) -> str:
    """A value of any size and depth, for messages."""
    return reprlib.repr(value)[:80]
