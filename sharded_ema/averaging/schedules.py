"""Decay schedules: how much of the average survives the ``n``-th applied optimizer step.

A schedule is a pure function of ``n`` in Python floats (IEEE double) and never touches torch.
The decay is defined *per optimizer step*: with ``update_every=N`` the library multiplies the N
decays of the window, so that the average means the same at every N.

``n`` counts applied optimizer steps since the shadow was seeded, the first being ``n = 1``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Protocol, runtime_checkable

from sharded_ema.config import DEFAULT_PROFILE
from sharded_ema.errors import ConfigError


@runtime_checkable
class Schedule(Protocol):
    """What a schedule offers; any object with these two methods will do."""

    def decay(self, n: int) -> float:
        """Decay of the ``n``-th applied step after the seed, in ``[0, 1]``; ``n >= 1``."""
        ...

    def to_dict(self) -> dict[str, Any]:
        """Type and settings in JSON types, as stored in a checkpoint and compared at a load."""
        ...


@dataclass(frozen=True, slots=True)
class _Settings:
    def to_dict(self) -> dict[str, Any]:
        """Type and settings, as stored in a checkpoint and as the constructor takes them."""
        settings = asdict(self)
        if "max_decay" in settings:  # the method has the name of the argument
            settings["decay"] = settings.pop("max_decay")
        return {"type": type(self).__name__, **settings}


def _check_unit(name: str, value: float) -> None:
    if not 0.0 <= value <= 1.0:
        raise ConfigError(
            f"{name} must lie in [0, 1], got {value}; a common choice is 0.999 or 0.9999"
        )


def _check_positive(name: str, value: float) -> None:
    if not 0.0 < value < math.inf:
        raise ConfigError(f"{name} must be a positive finite number, got {value}")


@dataclass(frozen=True, slots=True, init=False)
class Constant(_Settings):
    """The same decay at every step: ``shadow = d * shadow + (1 - d) * parameter``.

    Source: Polyak and Juditsky, "Acceleration of Stochastic Approximation by Averaging", SIAM
    J. Control Optim. 30 (1992), in the exponential form of Tarvainen and Valpola, "Mean
    teachers are better role models", NeurIPS 2017, equation 1.

    >>> Constant(0.999).decay(7)
    0.999
    """

    max_decay: float

    def __init__(self, decay: float) -> None:
        _check_unit("decay", decay)
        object.__setattr__(self, "max_decay", decay)

    def decay(self, n: int) -> float:
        """The decay given, whatever ``n``."""
        return self.max_decay


@dataclass(frozen=True, slots=True, init=False)
class Warmup(_Settings):
    """A decay that grows towards ``decay``, so that early weights are forgotten soon.

    ``kind="tf"``: ``min(decay, (1 + n) / (10 + n))``, from the documentation of TensorFlow's
    ``tf.train.ExponentialMovingAverage(num_updates=n)``.

    ``kind="inverse_gamma"``: ``1 - (1 + s / inv_gamma) ** -power`` with ``s = n - 1``, clamped to
    ``[min_decay, decay]``, and ``0`` (a copy) at ``s = 0``: the warm-up of diffusers'
    ``EMAModel`` and of ema-pytorch (K. Crowson's form). ``power=2/3`` suits runs of a million steps
    and more, ``3/4`` shorter ones.

    >>> Warmup(0.9999).decay(8)
    0.5
    >>> Warmup(0.9999, kind="inverse_gamma").decay(1)
    0.0
    """

    max_decay: float
    kind: str
    inv_gamma: float
    power: float
    min_decay: float

    def __init__(
        self,
        decay: float,
        kind: str = "tf",
        inv_gamma: float = 1.0,
        power: float = 2 / 3,
        min_decay: float = 0.0,
    ) -> None:
        values = (decay, kind, inv_gamma, power, min_decay)
        for name, value in zip(self.__slots__, values, strict=True):
            object.__setattr__(self, name, value)
        _check_unit("decay", self.max_decay)
        _check_unit("min_decay", self.min_decay)
        if self.min_decay > self.max_decay:
            raise ConfigError(f"min_decay {self.min_decay} exceeds decay {self.max_decay}")
        if self.kind not in ("tf", "inverse_gamma"):
            raise ConfigError(f'warm-up kind must be "tf" or "inverse_gamma", got {self.kind!r}')
        _check_positive("inv_gamma", self.inv_gamma)
        _check_positive("power", self.power)

    def decay(self, n: int) -> float:
        """The warm-up formula of ``kind`` at step ``n``."""
        if self.kind == "tf":
            return max(self.min_decay, min(self.max_decay, (1 + n) / (10 + n)))
        steps = n - 1
        if steps <= 0:
            return 0.0
        value = 1.0 - (1.0 + steps / self.inv_gamma) ** -self.power
        return max(self.min_decay, min(self.max_decay, value))


@dataclass(frozen=True, slots=True)
class HalfLife(_Settings):
    """A constant decay given by the number of optimizer steps after which a weight counts half.

    ``decay = 2 ** (-1 / steps)``, the parametrisation of Karras et al., "Analyzing and
    Improving the Training Dynamics of Diffusion Models" (2023), appendix C, with steps in place
    of images.

    >>> HalfLife(1).decay(3)
    0.5
    """

    steps: float

    def __post_init__(self) -> None:
        _check_positive("half-life in steps", self.steps)

    def decay(self, n: int) -> float:
        """``2 ** (-1 / steps)``, whatever ``n``."""
        return 2.0 ** (-1.0 / self.steps)


@dataclass(frozen=True, slots=True)
class HalfLifeFraction(_Settings):
    """A half-life that is a fixed fraction of the run so far: ``2 ** (-1 / (fraction * n))``.

    The average always spans the same share of training, as in torchtitan's
    ``half_life_fraction``; it needs no total number of steps.

    >>> HalfLifeFraction(0.5).decay(2)
    0.5
    """

    fraction: float

    def __post_init__(self) -> None:
        _check_positive("half-life fraction", self.fraction)

    def decay(self, n: int) -> float:
        """``2 ** (-1 / (fraction * n))``."""
        return 2.0 ** (-1.0 / (self.fraction * max(n, 1)))


@dataclass(frozen=True, slots=True)
class _Rise(_Settings):
    start: float
    steps: float
    end: float = 1.0

    def __post_init__(self) -> None:
        _check_unit("start", self.start)
        _check_unit("end", self.end)
        _check_positive("steps", self.steps)
        if self.end < self.start:
            raise ConfigError(
                f"a decay that falls from {self.start} to {self.end} forgets what it has gathered; "
                "let it rise"
            )


@dataclass(frozen=True, slots=True)
class Linear(_Rise):
    """A decay that grows from ``start`` to ``end`` in a straight line over ``steps`` steps.

    Then it stays. At 1, the default, the average stands still from there on.

    >>> Linear(0.9, steps=100).decay(50)
    0.95
    """

    def decay(self, n: int) -> float:
        """``start + (end - start) * n / steps``, at most ``end``."""
        return min(self.end, self.start + (self.end - self.start) * n / self.steps)


@dataclass(frozen=True, slots=True)
class Cosine(_Rise):
    """A decay that grows from ``start`` to ``end`` along half a cosine over ``steps`` steps.

    ``end - (end - start) * (cos(pi * n / steps) + 1) / 2``: the schedule of the target network in
    Grill et al., "Bootstrap Your Own Latent" (2020), 2006.07733, section 3.3, and of the teacher in
    DINO, Caron et al. (2021), 2104.14294, both with ``end = 1``. Then it stays.

    >>> Cosine(0.9, steps=100).decay(100)
    1.0
    """

    def decay(self, n: int) -> float:
        """See the class."""
        if n >= self.steps:
            return self.end
        return self.end - (self.end - self.start) * (math.cos(math.pi * n / self.steps) + 1) / 2


@dataclass(frozen=True, slots=True, init=False)
class Power(_Settings):
    """Power-function averaging: ``decay(n) = (1 - 1 / n) ** (gamma + 1)``.

    The weight of step ``t`` grows as ``t ** gamma``; the first step replaces the seed. Source:
    Karras et al., "Analyzing and Improving the Training Dynamics of Diffusion Models" (2023),
    section 3.1 and equation 127; ``gamma`` follows from the relative width ``sigma_rel`` as the
    largest real root of ``g**3 + 7 g**2 + (16 - s**-2) g + (12 - s**-2)`` (algorithm 2 there).

    Args:
        sigma_rel: relative width of the weighting profile, in ``(0, 0.2886...)``; 0.05 to 0.25
            is usual. Give this or ``gamma``.
        gamma: the exponent itself, at least 0.

    >>> Power(gamma=1.0).decay(2)
    0.25
    """

    gamma: float
    sigma_rel: float | None

    def __init__(self, *, sigma_rel: float | None = None, gamma: float | None = None) -> None:
        if gamma is None and sigma_rel is not None:
            gamma = gamma_from_sigma_rel(sigma_rel)
        elif gamma is None or (sigma_rel is not None and gamma != gamma_from_sigma_rel(sigma_rel)):
            # A checkpoint stores both, and both are welcome if they say the same.
            raise ConfigError("Power takes sigma_rel or gamma, one of them")
        if not 0.0 <= gamma < math.inf:
            raise ConfigError(f"gamma must be finite and at least 0, got {gamma}")
        object.__setattr__(self, "gamma", gamma)
        object.__setattr__(self, "sigma_rel", sigma_rel)

    def decay(self, n: int) -> float:
        """``(1 - 1 / n) ** (gamma + 1)``, and 0 at the first step."""
        return (1.0 - 1.0 / max(n, 1)) ** (self.gamma + 1.0)


def gamma_from_sigma_rel(sigma_rel: float) -> float:
    """The exponent of a power profile of relative width ``sigma_rel`` (algorithm 2, Karras 2023).

    ``sigma_rel = sqrt((g + 1) / ((g + 2)**2 (g + 3)))`` falls from ``12 ** -0.5`` at ``g = 0``,
    so the root is unique there and bisection finds it to the last bit.

    >>> round(gamma_from_sigma_rel(0.05), 2), round(gamma_from_sigma_rel(0.10), 2)
    (16.97, 6.94)
    """
    if not 0.0 < sigma_rel <= 12**-0.5:
        raise ConfigError(f"sigma_rel must lie in (0, {12**-0.5:.4f}], got {sigma_rel}")

    low, high = 0.0, 1.0
    while sigma_rel_from_gamma(high) > sigma_rel:
        high *= 2.0
    while low < (middle := (low + high) / 2.0) < high:
        if sigma_rel_from_gamma(middle) > sigma_rel:
            low = middle
        else:
            high = middle
    return high


def sigma_rel_from_gamma(gamma: float) -> float:
    """The relative width of a power profile with this exponent, the inverse of the above.

    >>> round(sigma_rel_from_gamma(6.94), 2)
    0.1
    """
    return math.sqrt((gamma + 1.0) / ((gamma + 2.0) ** 2 * (gamma + 3.0)))


_TYPES: dict[str, type[_Settings]] = {
    cls.__name__: cls
    for cls in (Constant, Warmup, HalfLife, HalfLifeFraction, Power, Linear, Cosine)
}
# The names a user types, with the settings that may be given without their name.
_TEXT: dict[str, tuple[type[_Settings], str]] = {
    "constant": (Constant, "decay"),
    "warmup": (Warmup, "decay"),
    "half_life": (HalfLife, "steps"),
    "half_life_fraction": (HalfLifeFraction, "fraction"),
    "power": (Power, "sigma_rel"),
    "linear": (Linear, "start"),
    "cosine": (Cosine, "start"),
}


def schedule_from_dict(data: dict[str, Any]) -> Schedule:
    """Rebuild what :meth:`Schedule.to_dict` wrote.

    Raises:
        ConfigError: the type is unknown or a setting does not fit it.
    """
    settings = dict(data)
    kind = settings.pop("type", None)
    cls = _TYPES.get(kind) if isinstance(kind, str) else None
    if cls is None:
        raise ConfigError(f"unknown schedule type {data.get('type')!r}; known: {sorted(_TYPES)}")
    try:
        return cls(**settings)  # type: ignore[return-value]
    except TypeError as error:
        raise ConfigError(f"{cls.__name__} cannot be built from {settings}: {error}") from None


def parse_schedule(text: str) -> Schedule:
    """Read a schedule as typed on a command line.

    ``0.999``, ``warmup:0.9999``, ``warmup:0.9999,kind=inverse_gamma``, ``half_life:2000``,
    ``half_life_fraction:0.05``, ``power:0.1`` (sigma_rel) or ``power:gamma=6.94``,
    ``linear:0.99,steps=10000`` or ``cosine:0.996,steps=10000``.

    >>> parse_schedule("half_life:2000")
    HalfLife(steps=2000.0)

    Raises:
        ConfigError: the text is none of these.
    """
    name, _, rest = text.strip().partition(":")
    if not rest:
        name, rest = "constant", name
    known = ", ".join(sorted(_TEXT))
    if name not in _TEXT:
        raise ConfigError(
            f"unknown schedule {text!r}; write a decay such as 0.999, or one of {known}"
        )
    cls, first = _TEXT[name]
    settings: dict[str, Any] = {}
    for position, item in enumerate(rest.split(",")):
        key, _, value = item.rpartition("=")
        key = key.strip() or (first if position == 0 else "")
        if key in settings:
            raise ConfigError(f"schedule {text!r} gives {key} twice")
        try:
            settings[key] = value.strip() if key == "kind" else float(value)
        except ValueError:
            raise ConfigError(
                f"cannot read {item!r} in schedule {text!r}; known schedules: {known}"
            ) from None
    try:
        return cls(**settings)  # type: ignore[return-value]
    except TypeError:
        raise ConfigError(f"schedule {text!r} has a setting that {name} does not take") from None


def as_schedule(value: float | str | Schedule) -> Schedule:
    """A schedule from what a user may pass for one: a decay, a text, or a schedule."""
    if isinstance(value, bool):
        raise ConfigError(f"a schedule is a decay, a text or a Schedule, not {value}")
    if isinstance(value, int | float):
        return Constant(float(value))
    if isinstance(value, str):
        return parse_schedule(value)
    if isinstance(value, Schedule):
        return value
    raise ConfigError(f"a schedule is a decay, a text or a Schedule, not {type(value).__name__}")


_PROFILE_NAME = re.compile(r"[A-Za-z0-9-][A-Za-z0-9_-]*")


def as_profiles(
    schedule: float | str | Schedule | Mapping[str, float | str | Schedule],
) -> dict[str, Schedule]:
    """Profiles from what the user passed; a single schedule is named ``"ema"``.

    Raises:
        ConfigError: a name may not stand in a key, or a schedule is none.
    """
    if not isinstance(schedule, Mapping):
        return {DEFAULT_PROFILE: as_schedule(schedule)}
    if not schedule:
        raise ConfigError("at least one profile is needed, got an empty dict")
    for name in schedule:
        if not is_profile_name(name):
            raise ConfigError(
                f"profile name {name!r} must consist of letters, digits, '_' and '-' and must not "
                "begin with '_'"
            )
    return {name: as_schedule(value) for name, value in schedule.items()}


def is_profile_name(name: str) -> bool:
    """Whether an average may be called so: its name stands in keys, before a dot."""
    return bool(_PROFILE_NAME.fullmatch(name))


def horizon(decay: float) -> float:
    """Effective number of steps an average of this decay spans, ``1 / (1 - decay)``.

    >>> round(horizon(0.999))
    1000
    """
    return math.inf if decay >= 1.0 else 1.0 / (1.0 - decay)
