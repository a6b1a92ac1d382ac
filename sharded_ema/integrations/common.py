"""What the integrations share: what they were tried with, and that two never write one place."""

from __future__ import annotations

import re
from collections.abc import Callable
from weakref import WeakKeyDictionary

from sharded_ema.errors import ConfigError, warn

_NUMBERS = re.compile(r"\d+(?:\.\d+)*")


class _Claim:
    """A place that is taken, and by what call."""

    def __init__(self, by: str) -> None:
        self.by = by


_CLAIMS: WeakKeyDictionary[object, dict[str, _Claim]] = WeakKeyDictionary()


def warn_of_untested(package: str, version: str, tested: str) -> None:
    """Warn at the user's line if an integration was never tried with this version of its package.

    Args:
        package: its name, as in ``pip install``.
        version: the one that is installed; what follows its numbers (``rc1``, ``+cpu``) is ignored.
        tested: the versions that tests have run with, as ``">=5.23,<6"``.
    """
    if not _lies_in(version, tested):
        warn(
            f"{package} {version} is installed, and this integration was tested with {package}"
            f"{tested}: hooks that it relies on may be called in another order, or not at all. "
            f"Compare a resumed run with an uninterrupted one, or pip install '{package}{tested}'"
        )


def claim(owner: object, path_or_name: str, by: str) -> Callable[[], None]:
    """Take a place that only one integration may use, such as the folder of a trainer's saves.

    Args:
        owner: whose place it is, such as the trainer; it is not kept alive.
        path_or_name: the place, compared as it is written.
        by: the call that takes it, for the message to whoever comes second.

    Returns:
        Gives the place back; may be called twice.

    Raises:
        ConfigError: it is taken.
    """
    claims = _CLAIMS.setdefault(owner, {})
    if path_or_name in claims:
        raise ConfigError(
            f"{by} would use {path_or_name!r} of this {type(owner).__name__}, where "
            f"{claims[path_or_name].by} saves already, and one average would overwrite the other. "
            "Call it once; several averages of one model are profiles of one ShardedEMA: "
            "{'fast': 0.999, 'slow': 0.9999}"
        )
    ours = claims[path_or_name] = _Claim(by)

    def release() -> None:
        if claims.get(path_or_name) is ours:
            del claims[path_or_name]

    return release


def _lies_in(version: str, tested: str) -> bool:
    return all(_holds(version, bound) for bound in tested.split(","))


def _holds(version: str, bound: str) -> bool:
    operator, limit = bound[: bound.index(bound.lstrip("<>="))], bound.lstrip("<>=")
    have, want = _numbers(version), _numbers(limit)
    # 5.23 and 5.23.0 are the same version.
    width = max(len(have), len(want))
    have += (0,) * (width - len(have))
    want += (0,) * (width - len(want))
    return {">=": have >= want, "<": have < want, "<=": have <= want}[operator]


def _numbers(version: str) -> tuple[int, ...]:
    found = _NUMBERS.match(version)
    return tuple(map(int, found[0].split("."))) if found else ()
