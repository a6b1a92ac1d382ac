"""The checkpoints of a run that post-hoc averaging starts from, and what their profiles are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sharded_ema.averaging.posthoc import Profile
from sharded_ema.averaging.schedules import Power, schedule_from_dict
from sharded_ema.checkpoint.files import Location, OpenFiles, exists
from sharded_ema.checkpoint.reading.opened import Checkpoint
from sharded_ema.checkpoint.run import checkpoints_of, open_checkpoint
from sharded_ema.errors import CheckpointMismatchError, CheckpointNotFoundError
from sharded_ema.model.layout import Shape
from sharded_ema.tools.contents import find_prefix


@dataclass(frozen=True)
class Snapshot:
    """One checkpoint of a run with an average in it.

    Attributes:
        checkpoint: its contents.
        prefix: of the average's keys.
        meta: what the average says of itself.
    """

    checkpoint: Checkpoint
    prefix: str
    meta: dict[str, Any]

    @property
    def path(self) -> Location:
        """Where it lies."""
        return self.checkpoint.path

    @property
    def step(self) -> int:
        """The step it was saved under."""
        return int(self.meta["step"])

    @property
    def steps_taken_in(self) -> int:
        """Applied optimizer steps from the seed to the last update of the shadow."""
        seed = self.meta["seed_step"]
        return 0 if seed is None else int(self.meta["last_lerp_step"] - seed)

    @property
    def updates(self) -> int:
        """How often the shadow was moved since its seed."""
        return self.steps_taken_in // int(self.meta["update_every"])

    def schedule(self, profile: str) -> dict[str, Any] | None:
        """Settings of a profile that it has."""
        settings = self.meta["profiles"].get(profile)
        return None if settings is None else settings["schedule"]

    def stored(self, profile: str) -> Profile | None:
        """The weighting of a profile; ``None`` if it follows no power function since the seed."""
        settings = self.meta["profiles"].get(profile)
        if settings is None or settings["schedule"].get("type") != "Power":
            return None
        # A profile that came later began with weights that no power function gives.
        if settings["seed_weight"] != 0 or not self.updates:
            return None
        schedule = schedule_from_dict(settings["schedule"])
        assert isinstance(schedule, Power)
        return Profile(schedule.gamma, self.updates)

    def shapes(self, profile: str) -> dict[str, Shape]:
        """Shapes of the averaged tensors by name."""
        start = f"{self.prefix}{profile}."
        return {
            key.removeprefix(start): tensor.shape
            for key, tensor in self.checkpoint.tensors.items()
            if key.startswith(start)
        }


@dataclass(frozen=True)
class Chosen:
    """What to combine for the averages of one step.

    Attributes:
        target: the snapshot of that step.
        columns: a snapshot, the name of a profile in it, and its weighting; by step.
        notes: what was left aside.
    """

    target: Snapshot
    columns: list[tuple[Snapshot, str, Profile]]
    notes: list[str]

    @property
    def snapshots(self) -> list[Snapshot]:
        """Those that are used, by step."""
        return list({id(snapshot): snapshot for snapshot, _, _ in self.columns}.values())


def find_snapshots(run: Location, files: OpenFiles) -> list[Snapshot]:
    """All committed checkpoints of a run that hold an average, by step.

    Args:
        files: that all of them are read through.

    Raises:
        CheckpointNotFoundError: there is none.
        CheckpointCorruptError: one of them is damaged.
        CheckpointMismatchError: two are of the same step.
    """
    found: dict[int, Snapshot] = {}
    for path in checkpoints_of(run):
        checkpoint = open_checkpoint(path, files)
        if not checkpoint.prefixes():
            continue
        prefix = find_prefix(checkpoint, None)
        snapshot = Snapshot(checkpoint, prefix, checkpoint.meta(prefix))
        if snapshot.step in found:
            raise CheckpointMismatchError(
                f"{path} and {found[snapshot.step].path} are both of step {snapshot.step}; "
                "move one of them elsewhere"
            )
        found[snapshot.step] = snapshot
    if not found:
        if not exists(run):
            raise CheckpointNotFoundError(f"there is no run at {run}")
        raise CheckpointNotFoundError(
            f"{run} holds no committed checkpoint of an average: looked in *, */ema, "
            "checkpoints/*, checkpoints/*/ema"
        )
    return [found[step] for step in sorted(found)]


def choose(
    snapshots: Sequence[Snapshot], step: int | None, profiles: Sequence[str] | None
) -> Chosen:
    """Which snapshots and profiles can make up an average at ``step``.

    Args:
        step: of the snapshot to end at; ``None`` for the last one.
        profiles: names to use; ``None`` for all power functions.

    Raises:
        CheckpointMismatchError: there is none of that step, none with a power function, or some do
            not belong together.
    """
    target = _of_step(snapshots, step)
    names = list(target.meta["profiles"]) if profiles is None else list(dict.fromkeys(profiles))
    notes = []
    earlier = [s for s in snapshots if s.step < target.step]
    if later := len(snapshots) - len(earlier) - 1:
        notes.append(f"{later} snapshots after step {target.step} left aside")
    columns: list[tuple[Snapshot, str, Profile]] = []
    for snapshot in (target, *earlier):
        if snapshot.meta["seed_step"] != target.meta["seed_step"]:
            notes.append(f"step {snapshot.step} left aside: its average was seeded at another step")
            continue
        _check_clock(snapshot, target)
        if not snapshot.updates and snapshot is not target:
            notes.append(f"step {snapshot.step} left aside: its average has had no update yet")
        for name in names:
            _check_schedule(snapshot, target, name, asked=profiles is not None)
            stored = snapshot.stored(name)
            if stored is None:
                continue
            if snapshot.shapes(name) != target.shapes(name):
                raise CheckpointMismatchError(
                    f"{snapshot.path} has other tensors in {name} than "
                    f"{target.path}: they are not of one run. Move what does not belong to "
                    "it elsewhere"
                )
            if stored.updates > target.updates:
                raise CheckpointMismatchError(
                    f"{snapshot.path} has had {stored.updates} updates, and the later "
                    f"{target.path} {target.updates}: they are not of one run"
                )
            # Two profiles of one exponent are one average twice, and so are two saves in a row.
            if all(stored != other for _, _, other in columns):
                columns.append((snapshot, name, stored))
    if not columns or columns[0][0] is not target:
        raise CheckpointMismatchError(_why_none(target, names))
    columns.sort(key=lambda column: column[0].step)
    if skipped := sorted({s.step for s, _, _ in columns if s.meta["nonfinite_elements"]}):
        notes.append(
            f"NaN or Inf kept out of the averages up to steps {skipped}: for those elements the "
            "residual says less than the truth"
        )
    times = [
        s.checkpoint.manifest.saved_at for s, _, _ in columns if s.checkpoint.manifest is not None
    ]
    if times != sorted(times):
        notes.append(
            "a snapshot is older than the one of an earlier step: if the run was taken up again "
            "from that step, snapshots of two runs are mixed here"
        )
    return Chosen(target, columns, notes)


def _of_step(snapshots: Sequence[Snapshot], step: int | None) -> Snapshot:
    if step is None:
        return snapshots[-1]
    for snapshot in snapshots:
        if snapshot.step == step:
            return snapshot
    raise CheckpointMismatchError(
        f"there is no snapshot of step {step}, and an average can end only at one; there are "
        f"{[s.step for s in snapshots]}"
    )


def _check_clock(snapshot: Snapshot, target: Snapshot) -> None:
    """Refuse averages that did not move at the updates at which the last one did."""
    if snapshot.meta.get("decay_per", "step") != "step" and snapshot.meta["update_every"] > 1:
        raise CheckpointMismatchError(
            f"{snapshot.path} was averaged with decay_per='update', and only the weighting of "
            "decays per step is known here"
        )
    every = snapshot.meta["update_every"]
    if every != target.meta["update_every"] or snapshot.steps_taken_in % every:
        raise CheckpointMismatchError(
            f"{snapshot.path} was averaged with update_every={every} up to step "
            f"{snapshot.meta['last_lerp_step']}, the one of step {target.step} with "
            f"{target.meta['update_every']}: update_every was changed during the run, so their "
            "weightings are not known"
        )


def _check_schedule(snapshot: Snapshot, target: Snapshot, name: str, *, asked: bool) -> None:
    """Refuse a profile that is no power function, or was another one before."""
    schedule, last = snapshot.schedule(name), target.schedule(name)
    if last is None or (asked and last.get("type") != "Power"):
        raise CheckpointMismatchError(
            f"{target.path} has no power-function profile {name!r}; it has {_profiles(target)}"
        )
    if (
        schedule is not None
        and schedule != last
        and "Power"
        in (
            schedule.get("type"),
            last.get("type"),
        )
    ):
        raise CheckpointMismatchError(
            f"profile {name} has the schedule {schedule} in {snapshot.path} and {last} in "
            f"{target.path}: its weighting is not known. Leave it out with profiles "
            "(--profiles)"
        )


def _why_none(target: Snapshot, names: Sequence[str]) -> str:
    if not target.updates:
        return f"the average in {target.path} has had no update yet"
    begun_later = [n for n in names if (target.schedule(n) or {}).get("type") == "Power"]
    if begun_later:
        return (
            f"the profiles {begun_later} in {target.path} did not begin at the seed of the "
            "others, so they are no power functions"
        )
    return (
        f"{target.path} has no power-function profile; it has {_profiles(target)}. Train "
        'with, for example, {"a": "power:0.05", "b": "power:0.10"}'
    )


def _profiles(target: Snapshot) -> dict[str, str]:
    return {
        name: str(settings["schedule"].get("type", "?"))
        for name, settings in target.meta["profiles"].items()
    }
