"""Checkpoints of a run: what is in one, when one counts, and how a run takes it up again.

``OUT/checkpoints/step_000100`` holds ``train/`` (model and optimizer, stock DCP; or the files of
DeepSpeed in its place), ``ema/`` (the library's own format) and ``trainer.json``. The file
``OUT/checkpoints/latest`` names the last complete one; a directory beyond it was never finished.
That is DeepSpeed's layout too: the root is its save directory and a step is a tag.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sharded_ema import ShardedEMA
from training.engines import TORCH_STATE, Engine, state_layout, why_not_resumable
from training.options import Options
from training.ranks import Ranks, RunError

_PREFIX = "step_"


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint found on disk."""

    path: Path
    step: int
    settings: dict[str, Any]
    results: dict[str, Any]

    @property
    def has_average(self) -> bool:
        """Whether the run that wrote it kept an average."""
        return (self.path / "ema").is_dir()


def place(options: Options) -> tuple[Path, Checkpoint | None]:
    """Where the run writes, and the checkpoint it starts from. On rank 0.

    Raises:
        RunError: nothing to resume at the path given, or another run is in the way.
    """
    found = None
    if options.resume not in (None, "auto"):
        path = Path(options.resume)
        found = _find_checkpoint(path)
        if found is None:
            raise RunError(f"--resume {path}: no complete checkpoint there")
        home = _run_directory(found.path)
        out = options.out or home
        taken = out.resolve() != home.resolve() and _find_checkpoint(out) is not None
    else:
        out = options.out or Path("runs", time.strftime("%Y%m%d-%H%M%S"))
        found = _find_checkpoint(out)
        taken = found is not None and options.resume is None
    if taken:
        raise RunError(
            f"{out} holds a run with checkpoints; go on with --resume auto, or choose another --out"
        )
    if found and found.step > options.steps:
        raise RunError(f"{found.path} is beyond --steps {options.steps}")
    return out, found


def _find_checkpoint(path: Path) -> Checkpoint | None:
    """The checkpoint that ``path`` means: a step directory, or the last one of a run.

    Returns:
        None if there is no finished checkpoint.
    """
    for root in (path, path / "checkpoints"):
        found = path if (path / "trainer.json").is_file() else _latest(root)
        if found is not None:
            return _read_checkpoint(found)
    return None


def _run_directory(path: Path) -> Path:
    """The output directory of the run to which a ``--resume`` path belongs."""
    for root in (path, path.parent):
        if root.name == "checkpoints":
            return root.parent
    return path


def _read_checkpoint(path: Path) -> Checkpoint:
    record = path / "trainer.json"
    try:
        data = json.loads(record.read_text())
        return Checkpoint(path, data["step"], data["settings"], data["results"])
    except (ValueError, KeyError) as error:
        raise RunError(f"{record} cannot be read: {error!r}") from None


def run_settings(
    options: Options, config: dict[str, Any], digest: str, tokens: str, ranks: int
) -> dict[str, Any]:
    """What a checkpoint records of its run.

    ``fixed`` cannot change without making it another run; ``free`` may, and the user is told.
    ``state`` cannot change because the training state could not be loaded.
    The averages of both must have the same names, if both have any.

    Args:
        digest: of the text.
        tokens: digest of the tokenizer; another version of its library may learn other pairs.
    """
    fixed = {f"model.{key}": value for key, value in config.items() if key not in _VOLATILE}
    fixed |= {
        "parameters": "bfloat16" if options.pure_bf16 else "float32",
        "context": options.context,
        "batch_size": options.batch_size,
        "seed": options.seed,
        "text": digest,
        "tokens": tokens,
    }
    free = {name: getattr(options, name) for name in _FREE}
    return {
        "fixed": fixed,
        "free": free,
        "state": state_layout(options, ranks),
        "averages": sorted(options.profiles),
    }


_FREE = (
    *("dtype", "lr", "min_lr_ratio", "warmup_steps", "steps", "beta1", "beta2"),
    *("weight_decay", "clip_norm", "eval_sequences"),
)
# These entries of a model configuration say nothing of the model.
_VOLATILE = {"transformers_version", "_name_or_path", "architectures", "dtype"}


def check_settings(checkpoint: Checkpoint, settings: dict[str, Any]) -> list[str]:
    """Compare the settings of a run with those of the checkpoint it resumes.

    Returns:
        One text for each harmless difference.

    Raises:
        RunError: the data, the seed or the model differ, or the training state cannot be loaded.
    """
    # Through JSON, as the recorded ones went: it makes lists of tuples and strings of keys.
    settings = json.loads(json.dumps(settings))
    fatal = _differences(checkpoint.settings["fixed"], settings["fixed"])
    old, new = checkpoint.settings["averages"], settings["averages"]
    if old and new and old != new:
        fatal.append(f"its averages are named {', '.join(old)}, those asked for {', '.join(new)}")
    if fatal:
        raise RunError(
            f"cannot resume {checkpoint.path}: it belongs to another run: {'; '.join(fatal)}. "
            f"Give the same flags as then, or start afresh in another --out"
        )
    why = why_not_resumable(checkpoint.settings.get("state", TORCH_STATE), settings["state"])
    if why:
        raise RunError(
            f"cannot resume {checkpoint.path}: {why}. The average loads in any layout and on any "
            f"number of ranks: ema.load({str(checkpoint.path / 'ema')!r})"
        )
    return _differences(checkpoint.settings["free"], settings["free"])


def _differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    names = dict.fromkeys([*old, *new])
    return [
        f"{name} was {old.get(name)!r} and is now {new.get(name)!r}"
        for name in names
        if old.get(name) != new.get(name)
    ]


class Checkpoints:
    """The checkpoints below one output directory."""

    def __init__(self, out: Path, keep_last: int, ranks: Ranks, background: bool) -> None:
        self.root = out / "checkpoints"
        self._keep_last = keep_last
        self._ranks = ranks
        self._background = background
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._under_way: Future[None] | None = None

    def path(self, step: int) -> Path:
        """Where the checkpoint of ``step`` lies."""
        return self.root / f"{_PREFIX}{step:06d}"

    def save(
        self,
        step: int,
        engine: Engine,
        ema: ShardedEMA | None,
        settings: dict[str, Any],
        results: dict[str, Any],
    ) -> Path:
        """Copy what one checkpoint holds, with all ranks, and write it while training goes on.

        Once all is written ``latest`` names it, and old ones go. The next save waits for this one.

        Raises:
            RunError: this checkpoint, or the one before it, could not be written.
        """
        self.settle()
        target = self.path(step)
        self._ranks.on_first(lambda: self._prepare(target))
        # In the same order on all ranks.
        waits: list[Callable[[], object]] = [engine.save(target)]
        if ema is not None and not engine.saves_average:
            handle = ema.save(
                target / "ema", step=step, latest=False, asynchronous=self._background
            )
            waits.append(handle.result)
        record = {"step": step, "settings": settings, "results": results}

        def finish() -> None:
            for wait in waits:
                wait()
            # That rank 0 has written says that all have: it wrote what closes a checkpoint.
            if self._ranks.first:
                self._commit(target, record)

        self._under_way = self._thread.submit(finish)
        if not self._background:
            self.settle()
        return target

    def settle(self) -> None:
        """Wait, with all ranks, until the last checkpoint is written.

        Raises:
            RunError: it could not be.
        """
        under_way, self._under_way = self._under_way, None
        if under_way is not None:
            self._ranks.everywhere(under_way.result)

    def rewind(self, checkpoint: Checkpoint) -> None:
        """Go on from ``checkpoint``: what this run holds beyond it no longer counts."""
        if checkpoint.path.parent.resolve() == self.root.resolve():
            _replace(self.root / "latest", checkpoint.path.name + "\n")

    def _prepare(self, target: Path) -> None:
        self.root.mkdir(parents=True, exist_ok=True)
        last = _latest(self.root)
        for path in self.root.iterdir():
            step = _step_of(path)
            unfinished = step is not None and (last is None or step > (_step_of(last) or 0))
            if unfinished or path.name.endswith(".removing"):
                shutil.rmtree(path)
        if target.exists():
            raise RunError(f"{target} is complete already; not writing over it")
        target.mkdir()

    def _commit(self, target: Path, record: dict[str, Any]) -> None:
        _replace(target / "trainer.json", json.dumps(record, indent=1) + "\n")
        _sync_directory(self.root)
        _replace(self.root / "latest", target.name + "\n")
        complete = sorted(p for p in self.root.iterdir() if _step_of(p) is not None)
        for old in complete[: -self._keep_last]:
            # Renamed first: half a checkpoint must never carry the name of a whole one.
            removing = old.with_name(old.name + ".removing")
            old.rename(removing)
            shutil.rmtree(removing)


def link_average(out: Path, average: Path) -> Path:
    """``OUT/ema``, which always leads to the last average: a name that scripts can rely on."""
    link, fresh = out / "ema", out / "ema.tmp"
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(os.path.relpath(average, out))
    fresh.replace(link)
    return link


def _latest(root: Path) -> Path | None:
    name = root / "latest"
    return root / name.read_text().strip() if name.is_file() else None


def _step_of(path: Path) -> int | None:
    digits = path.name.removeprefix(_PREFIX)
    return int(digits) if path.name.startswith(_PREFIX) and digits.isdigit() else None


def _replace(path: Path, text: str) -> None:
    """Write a file so that a reader finds the old or the new text, also after a power cut."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(path)
    _sync_directory(path.parent)


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
