"""Versions that nobody tried are warned of once; a place that two integrations want is refused."""

from __future__ import annotations

import warnings

import pytest

from sharded_ema import EMAWarning
from sharded_ema.errors import ConfigError
from sharded_ema.integrations.common import claim, warn_of_untested


class Trainer:
    """Whose saves two integrations want to go along with."""


@pytest.mark.parametrize(
    "version", ["5.23", "5.23.0", "5.24.1", "5.99.0.dev0", "5.30rc1", "5.23.0+cpu"]
)
def test_tested_versions_are_silent(version: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_untested("transformers", version, ">=5.23,<6")


@pytest.mark.parametrize("version", ["5.22.9", "4.57", "6", "6.0.0", "10.1"])
def test_others_are_warned_of_at_this_line(version: str) -> None:
    with pytest.warns(EMAWarning) as seen:
        warn_of_untested("transformers", version, ">=5.23,<6")
    (said,) = seen
    assert f"transformers {version} is installed" in str(said.message)
    assert "transformers>=5.23,<6" in str(said.message)
    assert said.filename == __file__


def test_a_place_is_taken_once_for_each_owner() -> None:
    one, other = Trainer(), Trainer()
    release = claim(one, "ema", "with_ema()")
    claim(one, "slow", "with_ema()")
    claim(other, "ema", "with_ema()")
    with pytest.raises(
        ConfigError, match=r"register\(\) would use 'ema' of this Trainer, where with_ema"
    ):
        claim(one, "ema", "register()")
    release()
    claim(one, "ema", "register()")
    release()  # again, which does not give away what is another's now
    with pytest.raises(ConfigError, match="where register"):
        claim(one, "ema", "with_ema()")
