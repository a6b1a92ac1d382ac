"""Save a state dict through DCP, with every failure turned into one error on all ranks.

DCP reports failures as ``CheckpointException``, which is a ``BaseException``: it must not leave the
library. What it says is kept, rank by rank. Ctrl-C stays what it is where it was pressed.
"""

from __future__ import annotations

import warnings
from typing import Any, NoReturn

import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from sharded_ema.checkpoint.files import URL, Location
from sharded_ema.checkpoint.names import is_marked
from sharded_ema.checkpoint.writing.planning import ColumnPlanner, Plan, Planner, digest_of
from sharded_ema.checkpoint.writing.stock_writer import StockStorageWriter
from sharded_ema.checkpoint.writing.target import make_target
from sharded_ema.checkpoint.writing.writer import SafetensorsStorageWriter
from sharded_ema.errors import (
    CheckpointWriteError,
    ConfigError,
    EMAError,
)
from sharded_ema.model.agreement import Ranks, raise_joint_failure

WRITERS: dict[str, type[SafetensorsStorageWriter] | type[StockStorageWriter]] = {
    "safetensors": SafetensorsStorageWriter,
    "dcp": StockStorageWriter,
}
PLANNERS: dict[str, type[Planner]] = {"safetensors": ColumnPlanner, "dcp": Planner}


def check_target(path: Location, *, format: str, replace: bool) -> None:
    """Refuse a save that cannot work before anything is written.

    Raises:
        ConfigError: unknown format, or something that cannot be done at a URL.
        CheckpointExistsError: the target is taken.
    """
    if format not in WRITERS:
        raise ConfigError(f"format must be one of {', '.join(WRITERS)}, got {format!r}")
    if format == "dcp" and isinstance(path, URL):
        raise ConfigError(f'format="dcp" writes to file systems only, not to {path}')
    if is_marked(path.name):
        raise ConfigError(
            f"{path.name!r} is a name that unfinished or replaced saves have, so nobody would read "
            "what is saved under it; choose one without .tmp-<digits> or .old-<uuid> at its end"
        )
    make_target(path).check(replace=replace)


def save_state(
    state: dict[str, Tensor],
    path: Location,
    *,
    format: str,
    replace: bool,
    latest: bool,
    keep_last: int | None,
    ranks: Ranks,
    plans: dict[str, Plan],
) -> None:
    """Write ``state`` as a committed checkpoint at ``path``; all ranks, which have met, call it.

    It may run in a thread if nothing else uses the group of ``ranks`` meanwhile.

    Args:
        plans: by format, what the ranks have planned in the last save that succeeded. It is used
            again if they all have to save what they saved then, and brought up to date.

    Raises:
        CheckpointWriteError: a rank could not write, or was lost; nothing was committed.
        CheckpointExistsError: something came to ``path`` meanwhile.
    """
    writer = WRITERS[format](path, replace=replace, ranks=ranks.size)
    try:
        with ranks.interruptible():
            _expect_one_process(ranks)
            digest, kept = digest_of(state), plans.get(format)
            fits = kept is not None and kept.digest == digest
            if not ranks.same(kept.number if kept is not None and fits else None):
                kept = None
            planner = PLANNERS[format](kept)
            dcp.save(
                state,
                storage_writer=writer,
                planner=planner,
                process_group=ranks.group,
                no_dist=ranks.size == 1,
            )
    except CheckpointException as error:
        writer.abandon()
        _raise_failures(error, CheckpointWriteError, ranks.rank)
    except (RuntimeError, ValueError) as error:
        # DCP wraps what happens on a rank; what gets here is a collective that broke (or, with
        # ValueError, whose group was destroyed).
        writer.abandon()
        ranks.give_up()
        raise CheckpointWriteError(
            f"the ranks lost contact while writing {path}, because one died or the process group "
            f"was destroyed before close(); it is there whole or not at all: {error}"
        ) from error
    except BaseException:  # an interruption between two steps of DCP
        writer.abandon()
        raise
    plans[format] = planner.made(digest)
    if ranks.rank == 0:  # DCP's coordinator, which has committed
        make_target(path).settle(latest=latest, keep_last=keep_last)


def _expect_one_process(ranks: Ranks) -> None:
    """Silence DCP's remark that a single process is a single process.

    For good: ``catch_warnings`` would put the filters of the whole process back from the thread of
    a save, whatever other threads have done to them meanwhile.
    """
    if ranks.size == 1:
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)


def _raise_failures(error: CheckpointException, unknown: type[EMAError], me: int) -> NoReturn:
    verdicts: dict[int, tuple[str, str]] = {}
    for rank, (failure, _trace) in error.failures.items():
        own: Any = failure
        interrupted = not isinstance(own, Exception)
        if interrupted and rank == me:  # as Ctrl-C is, which is no failure
            raise own from None
        if isinstance(own, EMAError):
            verdicts[rank] = (type(own).__name__, str(own))
        elif interrupted:
            verdicts[rank] = (unknown.__name__, f"interrupted by a {type(own).__name__}")
        else:
            verdicts[rank] = (unknown.__name__, f"{type(own).__name__}: {own}")
    raise_joint_failure(verdicts, cause=error)
    raise unknown(str(error)) from error
