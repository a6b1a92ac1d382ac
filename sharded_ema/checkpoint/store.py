"""Where an average goes and comes back from: state dicts, saves and loads."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sharded_ema.averaging.average import Average
from sharded_ema.averaging.distance import partial_distances, relative_distance
from sharded_ema.averaging.health import Health
from sharded_ema.checkpoint import snapshot
from sharded_ema.checkpoint.files import Location, as_location
from sharded_ema.checkpoint.loading import Loading, Told
from sharded_ema.checkpoint.names import new_uuid
from sharded_ema.checkpoint.others import OtherAverage, open_other
from sharded_ema.checkpoint.transfer import check_target, save_state
from sharded_ema.checkpoint.writing.background import Background, SaveHandle
from sharded_ema.checkpoint.writing.planning import Plan
from sharded_ema.checkpoint.writing.staging import Staging
from sharded_ema.config import Settings, as_whole
from sharded_ema.errors import (
    CheckpointExistsError,
    CheckpointGoneError,
    CheckpointNotFoundError,
    CheckpointUncommittedError,
    ConfigError,
)
from sharded_ema.model.agreement import Ranks
from sharded_ema.model.followed import FollowedModel
from sharded_ema.model.gathering import gather_each
from sharded_ema.model.world import world_size

# How often a checkpoint that is replaced while it is read is read again, whole.
_MAX_READS = 20


class Store:
    """The checkpoints of one average.

    Args:
        average: its values and counters.
        model: whose shards they are averages of.
        settings: what a checkpoint holds beside them.
        health: told of what the ranks find out together.
    """

    # What a copy does not share: it has no save under way.
    not_copied = ("_background", "_staging", "_writers", "_run", "_plans")
    # What tells this average from all others, once it has been saved or loaded; a copy is another.
    _run: str | None = None

    def __init__(
        self, average: Average, model: FollowedModel, settings: Settings, health: Health
    ) -> None:
        self._average = average
        self._model = model
        self._settings = settings
        self._health = health

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in self.not_copied}

    @cached_property
    def _background(self) -> Background:
        return Background()

    @cached_property
    def _staging(self) -> Staging:
        return Staging()

    @cached_property
    def _writers(self) -> Ranks:
        """The ranks again, in a group that only the thread of a save talks in."""
        return self._model.ranks.again()

    @cached_property
    def _plans(self) -> dict[str, Plan]:
        """Of the last save in each format."""
        return {}

    @property
    def staging_bytes(self) -> int:
        """Host memory that asynchronous saves copy to."""
        return self._staging.num_bytes

    # ------------------------------------------------------------------ state dicts

    def _meta(self) -> dict[str, Any]:
        meta = snapshot.make_meta(self._settings, self._average, self._model.holdings.tensors)
        return meta if self._run is None else meta | {"run": self._run}

    def _averages(self) -> dict[str, Tensor]:
        return snapshot.make_averages(self._model, self._average)

    def state_dict(self) -> dict[str, Tensor]:
        """Averages, what makes an export of them a whole model, and a description."""
        state = snapshot.make_state(self._model, self._average, self._meta())
        return snapshot.as_plain(state) if world_size() == 1 else state

    def load_state_dict(self, state: Mapping[str, Any], *, strict: bool) -> Mapping[str, Any]:
        """Take over the values of a state, and return its description."""
        own = self._averages()
        before = self._average.broken
        if snapshot.shares_memory(own, state):
            self._average.broken = "a state that does not fit was loaded in place"
        stored = snapshot.stored_in_state(state)
        self._check_fits(own, stored, strict=strict)
        self._average.broken = before or "load_state_dict() failed midway"
        snapshot.copy_state(own, state)
        self._run = stored.meta.get("run", self._run)
        return stored.meta

    def _check_fits(
        self, own: Mapping[str, Tensor], stored: snapshot.Stored, *, strict: bool
    ) -> None:
        averaged = self._model.holdings.tensors.averaged
        snapshot.check_fits(own, stored, self._average.profiles, averaged=averaged, strict=strict)

    def averages(self, profile: str) -> dict[str, Tensor]:
        """One average by name, with this rank's pieces."""
        start = f"{profile}."
        return {
            key.removeprefix(start): value
            for key, value in self._averages().items()
            if key.startswith(start)
        }

    def full_state_dict(
        self,
        profile: str,
        *,
        everywhere: bool,
        dtype: torch.dtype | None,
        ready: Callable[[], None],
    ) -> dict[str, Tensor]:
        """The averaged model, whole; see :meth:`sharded_ema.ShardedEMA.full_state_dict`.

        Args:
            ready: brings model and average into step; if it fails on one rank, all raise.
        """
        purpose = "ema.full_state_dict()"
        self._model.meet()

        def alike() -> dict[str, Any]:
            return {
                "profile": profile,
                "rank0_only": not everywhere,
                "dtype": dtype,
                **self._average.counted(),
            }

        self._model.ranks.agree(ready, purpose, alike)
        meta = self._meta()
        state = snapshot.of_one_profile(
            snapshot.make_state(self._model, self._average, meta), profile
        )

        def cast(name: str, own: torch.dtype) -> torch.dtype:
            return dtype if dtype is not None and own.is_floating_point else own

        each = gather_each(state, self._model.ranks, purpose, everywhere=everywhere, cast=cast)
        found = {name: tensor for name, tensor in each if tensor is not None}
        for name, aliases in meta["aliases"].items():
            found |= {alias: found[name] for alias in aliases if name in found}
        return found

    # ------------------------------------------------------------------ checkpoints

    def save(
        self,
        path: str | PathLike[str],
        *,
        step: int,
        asynchronous: bool,
        format: str,
        replace: bool,
        latest: bool,
        keep_last: int | None,
        ready: Callable[[], None],
    ) -> SaveHandle:
        """Write a checkpoint; arguments as of :meth:`sharded_ema.ShardedEMA.save`. Collective.

        Args:
            ready: brings model and average into step; if it fails on one rank, all raise.
        """
        self._model.meet()

        def check() -> Location:
            as_whole(step, "step", least=0)
            if keep_last is not None:
                as_whole(keep_last, "keep_last", least=1)
            target = as_location(path)
            self._background.wait()
            ready()
            check_target(target, format=format, replace=replace)
            if self._model.ranks.rank == 0:
                self._claim(target)
            return target

        def alike() -> dict[str, Any]:
            return {
                "path": str(path),
                "step": step,
                "asynchronous": asynchronous,
                "format": format,
                "replace": replace,
                **self._average.counted(),
            }

        target = self._model.ranks.agree(check, f"ema.save({path})", alike)[0]
        step = as_whole(step, "step")
        keep_last = None if keep_last is None else as_whole(keep_last, "keep_last")
        ranks, wait = self._model.ranks, None
        with ranks.interruptible():
            state = snapshot.make_state(self._model, self._average, self._joint_meta(step))
        if asynchronous:
            ranks, wait = self._writers, self._staging.wait
            ranks.barrier("ema.save()")  # makes the group, which no thread could
            with ranks.interruptible():
                state = self._staging.copy(state)
        handle = SaveHandle(target, step, wait)
        # Whatever os.chdir() does while a thread writes.
        place = target.absolute() if isinstance(target, Path) else target

        def write() -> None:
            handle.staged()
            save_state(
                state, place, format=format, replace=replace, ranks=ranks,
                latest=latest, keep_last=keep_last, plans=self._plans,
            )  # fmt: skip

        if asynchronous:
            self._background.start(handle, write)
        else:
            self._background.run(handle, write)
        return handle

    def _claim(self, target: Location) -> None:
        """Refuse to write where other ranks of this job write another average."""
        own, owner = self._model.ranks.members, self._model.ranks.claim(str(target))
        if owner != own:
            raise CheckpointExistsError(
                f"{target} is where the ranks {owner} of this job save their average; this one is "
                f"over the ranks {own}. Save to another path; or, if they hold stages of one "
                "model, make the averages with process_group= over all of its ranks"
            )

    def _joint_meta(self, step: int) -> dict[str, Any]:
        """The description for a checkpoint, with what only all ranks together know."""
        partial, drift = {}, {}
        if self._model.is_itself:
            counted = self._model.counted_here
            partial = partial_distances(self._average, self._model.live(), counted, sampled=True)
            drift = self._model.drift_record()
        gathered = self._model.ranks.gather(
            (self._average.shadow.collect_skipped(), partial, drift, self._run or new_uuid()),
            "ema.save()",
        )
        self._run = gathered[0][3]
        drifts = [drift for _, _, drift, _ in gathered]
        self._health.check_equal(drifts, self._model.ranks.members)
        distances = {
            name: relative_distance([parts[name] for _, parts, _, _ in gathered])
            for name in partial
        }
        return self._meta() | {
            "step": step,
            "nonfinite_elements": sum(skipped for skipped, _, _, _ in gathered),
            # JSON has no NaN; a parameter that is not finite has no distance.
            "sampled_distance": {
                name: value if math.isfinite(value) else None for name, value in distances.items()
            },
        }

    def load(
        self,
        path: str | PathLike[str],
        *,
        strict: bool,
        verify: bool,
        num_updates: int | None,
        ready: Callable[[], None],
    ) -> Mapping[str, Any]:
        """Read a checkpoint's values, and return its description. Collective.

        Args:
            num_updates: of an average that another library has kept.
            ready: brings model and average into step; if it fails on one rank, all raise.
        """
        self._model.meet()
        opened: list[OtherAverage | None] = []

        def look() -> bool:
            opened.append(open_other(path))
            if opened[0] is None and num_updates is not None:
                raise ConfigError(
                    f"{path} is a checkpoint of this library, which says itself how many updates "
                    "it has seen; leave num_updates out"
                )
            return opened[0] is not None

        self._model.ranks.agree(look, f"ema.load({path})")
        other = opened[0]
        if other is not None:
            return self._take_over(other, path, num_updates, strict=strict, ready=ready)
        found: CheckpointGoneError | None = None  # all ranks are told the same
        for _ in range(_MAX_READS):
            try:
                return self._load(path, strict=strict, verify=verify, ready=ready)
            except CheckpointGoneError as error:
                found = error
            except CheckpointUncommittedError:
                if found is None:
                    raise
                raise found from None  # what is left of it is no save that did not finish
        raise CheckpointNotFoundError(f"{found}; so it went {_MAX_READS} times")

    def _load(
        self,
        path: str | PathLike[str],
        *,
        strict: bool,
        verify: bool,
        ready: Callable[[], None],
    ) -> Mapping[str, Any]:
        ranks, purpose = self._model.ranks, f"ema.load({path})"
        loading = Loading(path, ranks)
        own: dict[str, Tensor] = {}
        found: list[snapshot.Stored] = []

        def look() -> Told | None:
            self._background.wait()
            ready()
            own.update(self._averages())
            return loading.look()

        def alike() -> dict[str, Any]:
            return {"path": str(path), "strict": strict, **self._average.settings()}

        def fit() -> None:
            stored = snapshot.stored_in_checkpoint(loading.open())
            self._check_fits(own, stored, strict=strict)
            loading.want({stored.prefix + key: own[key] for key in own if key in stored.shapes})
            found.append(stored)

        told = ranks.agree(look, purpose, alike)[0]
        assert told is not None
        loading.share(told, purpose)
        ranks.agree(fit, purpose)
        loading.choose(purpose)
        ranks.agree(loading.check, purpose)
        (stored,) = found
        self._average.broken = f"loading {path} failed midway"
        ranks.agree(lambda: loading.read(verify=verify), purpose)
        self._run = stored.meta.get("run", self._run)
        return stored.meta

    def _take_over(
        self,
        other: OtherAverage,
        path: str | PathLike[str],
        num_updates: int | None,
        *,
        strict: bool,
        ready: Callable[[], None],
    ) -> Mapping[str, Any]:
        """Read an average that another library has kept; the description is made up for it."""
        found: dict[str, str] = {}

        def check() -> int:
            self._background.wait()
            ready()
            count = other.num_updates
            if num_updates is not None:
                count = as_whole(num_updates, "num_updates")
            if count is None or count < 0:
                raise ConfigError(
                    f"{path} does not say after how many updates it was saved: pass num_updates, "
                    f"got {count}, from which the schedule goes on"
                )
            found.update(other.fit(self._model.inventory, strict=strict))
            return count

        def alike() -> dict[str, Any]:
            return {
                "path": str(path), "strict": strict, "num_updates": num_updates,
                **self._average.settings(),
            }  # fmt: skip

        count = self._model.ranks.agree(check, f"ema.load({path})", alike)[0]
        self._average.broken = f"loading {path} failed midway"
        own = [self.averages(profile) for profile in self._average.profiles]

        def copy() -> None:
            for name, there in found.items():
                value = other.read(there)
                for averages in own:
                    snapshot.copy_state({name: averages[name]}, {name: value})

        self._model.ranks.agree(copy, f"ema.load({path})")
        return self._average.described_after(count)

    # ------------------------------------------------------------------ the end

    def wait(self) -> None:
        """Wait for the save under way.

        Raises:
            CheckpointWriteError: it failed, and nobody was told of it yet.
        """
        self._background.wait()

    def close(self) -> None:
        """Give back the group of the writers."""
        self._writers.close()
