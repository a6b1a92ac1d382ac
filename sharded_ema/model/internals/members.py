"""Lists of private members, and the error for those that a version does not have."""

from __future__ import annotations

import functools
import importlib
from dataclasses import dataclass
from typing import Any, NoReturn

from sharded_ema.errors import FrameworkVersionError


@dataclass(frozen=True, slots=True)
class Members:
    """Attributes of one kind of object that are no promise of its framework.

    Attributes:
        owner: what has them, for messages.
        seen: versions that they were seen in.
        names: of the attributes.
    """

    owner: str
    seen: str
    names: tuple[str, ...]

    def check(self, thing: Any) -> None:
        """Look for all of them.

        Raises:
            FrameworkVersionError: one is missing.
        """
        for name in self.names:
            if not hasattr(thing, name):
                _refuse(f"{self.owner} ({type(thing).__name__}) has no {name!r}", self.seen)


@functools.cache
def imported(module: str, name: str, seen: str) -> Any:
    """A private name of a module.

    Raises:
        FrameworkVersionError: there is none.
    """
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError):
        _refuse(f"there is no {module}.{name}", seen)


def _refuse(what: str, seen: str) -> NoReturn:
    raise FrameworkVersionError(
        f"{what}, which this library relies on and which was seen in {seen}; install one of these "
        "versions, or a newer sharded-ema"
    )
