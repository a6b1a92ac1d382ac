"""Which stored tensors make up one averaged model, and under which names."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from sharded_ema.averaging.forgetting import MUCH_LEFT, describe_seed, per_step, steps_to_forget
from sharded_ema.averaging.schedules import schedule_from_dict
from sharded_ema.checkpoint.names import BUFFERS_PREFIX, FROZEN_PREFIX, META_KEY
from sharded_ema.checkpoint.reading.manifest import manifest_digest
from sharded_ema.checkpoint.reading.opened import Checkpoint, StoredTensor
from sharded_ema.config import DEFAULT_PROFILE
from sharded_ema.errors import CheckpointMismatchError, ConfigError


@dataclass(frozen=True, slots=True)
class Average:
    """One profile of one average in a checkpoint, or tensors that other software has stored.

    Attributes:
        checkpoint: that holds it.
        prefix: of its keys.
        profile: its name.
        meta: what the average says of itself; empty for tensors of other software.
        tensors: averaged, frozen and buffers, by the name in the bare model's ``state_dict()``.
            Those of other software may be of a dtype that is not read, and then only be left out.
    """

    checkpoint: Checkpoint
    prefix: str
    profile: str
    meta: dict[str, Any]
    tensors: dict[str, StoredTensor]

    @property
    def aliases(self) -> dict[str, list[str]]:
        """Other names of tied weights, by the name they are stored under."""
        found: dict[str, list[str]] = self.meta.get("aliases", {})
        return found

    @property
    def absent(self) -> tuple[int, list[str]]:
        """How many tensors of the model are not stored, and the names of up to a hundred."""
        absent = self.meta.get("absent", {"count": 0, "names": []})
        return absent["count"], absent["names"]

    def facts(self) -> dict[str, Any]:
        """What a report says of it."""
        if not self.meta:
            return {"kind": "tensors", "prefix": self.prefix}
        step, updates = self.meta["step"], self.meta["num_updates"]
        return {"kind": "ema", "profile": self.profile, "step": step, "updates": updates}

    def notes(self) -> list[str]:
        """What whoever uses it should know: that it is not fit for use yet."""
        if not self.meta or not self.meta["num_updates"]:
            return []
        settings = self.meta["profiles"][self.profile]
        steps, left = self.meta["num_updates"], settings["seed_weight"]
        if left <= MUCH_LEFT:
            return []
        more = None
        with suppress(ConfigError):  # of a later version
            decay_per, every = self.meta.get("decay_per", "step"), self.meta["update_every"]
            schedule = per_step(schedule_from_dict(settings["schedule"]), decay_per, every)
            more = steps_to_forget(schedule, MUCH_LEFT, left=left, after=steps)
        return [
            f"{describe_seed(self.profile, steps, left, more)}. Export a later checkpoint, or "
            "train with a shorter average: `sharded-ema advise --steps N` says which"
        ]

    def header(self) -> dict[str, str]:
        """What a file that holds it says of itself."""
        said = {name: str(value) for name, value in self.facts().items()}
        if self.meta:
            settings = self.meta["profiles"][self.profile]
            said["num_updates"] = said.pop("updates")
            said["decay"] = repr(settings["decay"])
            said["schedule"] = json.dumps(settings["schedule"])
        return {"format": "pt", **said, **origin(self.checkpoint)}

    def verify_rest(self) -> None:
        """Check what an export does not read but depends on, or cannot check as it streams.

        Raises:
            CheckpointCorruptError: it is not what was written.
        """
        if self.meta:
            self.checkpoint.tensors[self.prefix + META_KEY].verify()
        if self.checkpoint.format == "dcp":
            # Between the tensors of a .distcp file lie bytes that no checksum of a tensor covers.
            self.checkpoint.verify_files()


def origin(checkpoint: Checkpoint) -> dict[str, str]:
    """What tells a save from all others: its uuid, and the digest of its manifest."""
    manifest = checkpoint.manifest
    if manifest is None:
        return {"source": "unknown"}
    return {"source": manifest.uuid, "source_digest": manifest_digest(manifest)}


def find_prefix(checkpoint: Checkpoint, prefix: str | None) -> str:
    """The key prefix of the average that is meant.

    Raises:
        CheckpointMismatchError: none, or several and none was chosen.
    """
    known = checkpoint.prefixes()
    if prefix is not None:
        wanted = prefix if not prefix or prefix.endswith(".") else f"{prefix}."
        if wanted in known:
            return wanted
        raise CheckpointMismatchError(
            f"{checkpoint.path} has no average under the prefix {prefix!r}; it has {known}"
        )
    if len(known) != 1:
        what = f"averages under several prefixes, choose one: {known}" if known else "no average"
        raise CheckpointMismatchError(f"{checkpoint.path} holds {what}")
    return known[0]


def find_average(checkpoint: Checkpoint, profile: str, prefix: str | None) -> Average:
    """Collect the tensors of a profile.

    Raises:
        CheckpointMismatchError: there is no such prefix or profile.
    """
    prefix = find_prefix(checkpoint, prefix)
    meta = checkpoint.meta(prefix)
    if profile not in meta["profiles"]:
        raise CheckpointMismatchError(
            f"{checkpoint.path} has no profile {profile!r}; it has {sorted(meta['profiles'])}"
        )
    tensors: dict[str, StoredTensor] = {}
    for part in (f"{profile}.", FROZEN_PREFIX, BUFFERS_PREFIX):
        start = prefix + part
        for key, tensor in checkpoint.tensors.items():
            if key.startswith(start):
                tensors[key.removeprefix(start)] = tensor
    return Average(checkpoint, prefix, profile, meta, tensors)


def find_tensors(checkpoint: Checkpoint, profile: str, prefix: str | None) -> Average:
    """The average that is meant; under a prefix that holds none, the tensors that it holds.

    Raises:
        CheckpointMismatchError: there is neither.
    """
    if prefix is None and not checkpoint.prefixes() and checkpoint.format != "dcp":
        prefix = ""  # of files that hold a model and nothing else
    if prefix is None and not checkpoint.prefixes():
        parts = sorted({key.partition(".")[0] for key in checkpoint.tensors})
        raise CheckpointMismatchError(
            f"{checkpoint.path} holds no average of this library; to take tensors of other "
            f"software as they are, pass a prefix (--prefix), '' for all; keys begin with "
            f"{parts[:10]}"
        )
    start = prefix if not prefix or prefix.endswith(".") else f"{prefix}."
    if start is None or start in checkpoint.prefixes():
        return find_average(checkpoint, profile, prefix)
    if profile != DEFAULT_PROFILE:
        raise CheckpointMismatchError(
            f"{checkpoint.path} has no average under {prefix!r}, so no profile {profile!r} either"
        )
    stored = checkpoint.tensors | checkpoint.unread
    tensors = {k[len(start) :]: t for k, t in stored.items() if k.startswith(start)}
    if not tensors:
        parts = sorted({key.partition(".")[0] for key in checkpoint.tensors})
        raise CheckpointMismatchError(
            f"{checkpoint.path} has neither an average nor tensors under the prefix {prefix!r}; "
            f"keys begin with {parts[:10]}, averages lie under {checkpoint.prefixes()}"
        )
    return Average(checkpoint, start, "", {}, tensors)
