"""Floating-point conversion of raw bytes with numpy, which has no bfloat16 of its own."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

import numpy

from sharded_ema.checkpoint.safetensors import PARTS
from sharded_ema.config import dtype_name
from sharded_ema.errors import CheckpointMismatchError, ConfigError

#: Names that users write, and safetensors'.
DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
FLOATING = {"F64", "F32", "F16", "BF16"}
_TORCH_NAMES = {"F64": "float64"} | {name: torch for torch, name in DTYPES.items()}
#: Whose values can be summed and compared; of complex ones, their parts.
NUMBERS = FLOATING | PARTS.keys()
# Elements rounded at a time: what lies between the steps stays in the processor's cache.
_PIECE = 1 << 16

Bytes = numpy.ndarray
Cast = Callable[[Bytes], Bytes]


@dataclass(frozen=True, slots=True)
class Dtypes:
    """In which dtype each tensor is written; only real floating-point tensors are converted.

    Attributes:
        default: a key of :data:`DTYPES`, ``None`` for what is stored.
        patterns: shell patterns of names, each with such a key; the last that fits counts.
    """

    default: str | None = None
    patterns: tuple[tuple[str, str], ...] = ()

    def of(self, name: str, stored: str, kept: Collection[str] = ()) -> str:
        """That of one tensor.

        Args:
            stored: its dtype in the checkpoint.
            kept: names that stay in fp32 where the default has less; a pattern overrules it.
        """
        if stored not in FLOATING:
            return stored
        for pattern, dtype in reversed(self.patterns):
            if fnmatchcase(name, pattern):
                return DTYPES[dtype]
        if self.narrows and name in kept:
            return DTYPES["float32"]
        return DTYPES[self.default] if self.default is not None else stored

    @property
    def narrows(self) -> bool:
        """Whether the default has fewer bits than fp32."""
        return self.default in ("float16", "bfloat16")

    def check_used(self, names: Iterable[str]) -> None:
        """Refuse a pattern that fits none of the names.

        Raises:
            CheckpointMismatchError: there is such.
        """
        names = list(names)
        for pattern, _ in self.patterns:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise CheckpointMismatchError(
                    f"dtype pattern {pattern!r} fits no tensor; names are such as {names[0]!r}"
                )

    def __str__(self) -> str:
        """All of it on a line, for what is written to say how; empty if nothing is converted."""
        said = [f"{pattern}={dtype}" for pattern, dtype in self.patterns]
        return " ".join(said if self.default is None else [self.default, *said])


def parse_dtypes(given: object) -> Dtypes:
    """What the user asked for: a name for all tensors, ``PATTERN=name``, or several of them.

    Args:
        given: names may also be dtypes of PyTorch or numpy; ``None`` keeps what is stored.

    Raises:
        ConfigError: a name is none of ``float32``, ``bfloat16``, ``float16``, or two stand for all.
    """
    several = given if isinstance(given, list | tuple) else [] if given is None else [given]
    texts = [dtype_name(each) for each in several]
    default, patterns = None, []
    for text in texts:
        pattern, mark, name = text.rpartition("=")
        if name not in DTYPES or (mark and not pattern):
            raise ConfigError(
                f"dtype must be one of {', '.join(DTYPES)}, or PATTERN=DTYPE for the tensors whose "
                f"names fit, got {text!r}"
            )
        if mark:
            patterns.append((pattern, name))
        elif default is not None:
            raise ConfigError(f"dtype names two for all tensors: {texts}")
        else:
            default = name
    return Dtypes(default, tuple(patterns))


def widest(dtypes: Iterable[str]) -> str | None:
    """What holds the values of all floating-point tensors without a loss, as PyTorch calls it.

    Args:
        dtypes: safetensors names, of any kind.

    Returns:
        ``None`` if none is floating-point.
    """
    found = set(dtypes) & FLOATING
    if found == {"F16", "BF16"}:
        return "float32"
    return next((_TORCH_NAMES[d] for d in ("F64", "F32", "F16", "BF16") if d in found), None)


def caster(source: str, target: str) -> Cast | None:
    """A function from uint8 arrays to uint8 arrays, or ``None`` if nothing changes.

    Rounds to nearest, ties to even; NaN stays NaN, infinities and signs stay. As torch does, fp64
    is rounded to fp32 first.
    """
    if source == target:
        return None

    def cast(data: Bytes) -> Bytes:
        with numpy.errstate(over="ignore"):  # too large for the target: infinity, as everywhere
            single = _to_wide(data, source).astype("<f4", copy=False)
            if target == "BF16":
                return _round_to_bf16(single).view("u1")
            return single.astype("<f4" if target == "F32" else "<f2", copy=False).view("u1")

    return cast


def round_once(values: numpy.ndarray, target: str) -> Bytes:
    """float64 as uint8 of another dtype, each value the nearest one; `caster` goes over fp32.

    Args:
        target: a real dtype, or a complex one for values that are its parts.
    """
    target = PARTS.get(target, target)
    if target == "F64":
        return values.view("u1")
    if target == "BF16":
        return _round_to_bf16(_narrow_to_odd(values)).view("u1")
    with numpy.errstate(over="ignore"):
        return values.astype("<f4" if target == "F32" else "<f2").view("u1")


def widen(data: Bytes, source: str) -> numpy.ndarray:
    """The values as float64, exactly; of complex ones real and imaginary part in turn."""
    return _to_wide(data, PARTS.get(source, source)).astype("<f8")


def _to_wide(data: Bytes, source: str) -> numpy.ndarray:
    if source == "BF16":
        return (data.view("<u2").astype("<u4") << 16).view("<f4")
    return data.view({"F64": "<f8", "F32": "<f4", "F16": "<f2"}[source])


def _narrow_to_odd(values: numpy.ndarray) -> numpy.ndarray:
    """As fp32 with the last bit set if anything was lost, so that rounding again rounds once."""
    with numpy.errstate(over="ignore"):
        narrow = values.astype("<f4")
    wide = narrow.astype("<f8")
    bits = narrow.view("<u4")
    bits -= numpy.abs(wide) > numpy.abs(values)
    bits |= (wide != values) & ~numpy.isnan(values)
    return narrow


def _round_to_bf16(values: numpy.ndarray) -> numpy.ndarray:
    """The upper halves of fp32 after rounding; adding could carry a NaN into infinity."""
    bits = values.view("<u4")
    halves = numpy.empty(bits.shape, "<u2")
    for start in range(0, bits.size, _PIECE):
        piece = bits[start : start + _PIECE]
        rounded = piece >> 16
        rounded &= 1
        rounded += 0x7FFF
        rounded += piece
        rounded >>= 16
        nan = (piece & 0x7FFFFFFF) > 0x7F800000
        if nan.any():
            rounded[nan] = 0x7FC0
        halves[start : start + _PIECE] = rounded
    return halves
