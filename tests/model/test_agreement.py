"""Ranks that come to one verdict, each in a process of its own."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from sharded_ema import ShardedEMA
from sharded_ema.errors import AbsentRankError, BindError, ConfigError, EMAError, RanksDifferError
from sharded_ema.model.agreement import Ranks, raise_joint_failure
from tests.helpers.layouts import build, rank, world
from tests.helpers.pool import WorkerPool

Worlds = dict[int, WorkerPool]


def agreed_results() -> list[int]:
    ranks = Ranks([0, 1], 30.0)
    found = ranks.agree(lambda: 10 * rank(), "it", lambda: {"step": 3})
    ranks.close()
    return found


def test_results_of_all_ranks(worlds: Worlds) -> None:
    assert worlds[2].run(agreed_results) == [[0, 10]] * 2


def failing_on_one() -> list[str]:
    ranks = Ranks([0, 1], 30.0)

    def check() -> None:
        if rank() == 1:
            raise BindError("parameter x is not there")

    def strange() -> None:
        if rank() == 0:
            raise ValueError("no such thing")

    found = []
    for failing in (check, strange):
        try:
            ranks.agree(failing, "it")
        except EMAError as error:
            found.append(f"{type(error).__name__} {error} {error.failures}")
    ranks.close()
    return found


def test_a_failure_on_one_rank_is_raised_on_all(worlds: Worlds) -> None:
    first, second = worlds[2].run(failing_on_one)
    assert first == second
    assert first[0].startswith("BindError rank 1: parameter x is not there")
    assert first[1].startswith("EMAError rank 0: ValueError: no such thing")


def interrupted_on_one() -> str:
    ranks = Ranks([0, 1], 30.0)

    def check() -> None:
        if rank() == 1:
            raise KeyboardInterrupt

    try:
        ranks.agree(check, "it")
    except KeyboardInterrupt:
        return "KeyboardInterrupt"
    except EMAError as error:
        return str(error)
    finally:
        ranks.close()
    return "nothing"


def test_an_interruption_stays_one_where_it_came(worlds: Worlds) -> None:
    told, own = worlds[2].run(interrupted_on_one)
    assert own == "KeyboardInterrupt"
    assert told == "rank 1: KeyboardInterrupt: "


def differing() -> str:
    ranks = Ranks([0, 1, 2], 30.0)
    try:
        ranks.agree(lambda: None, "ema.save()", lambda: {"path": "x", "step": min(rank(), 1)})
    except RanksDifferError as error:
        return str(error)
    finally:
        ranks.close()
    return "nothing"


def test_what_must_be_alike_is_compared(worlds: Worlds) -> None:
    told = worlds[3].run(differing)
    assert len(set(told)) == 1
    assert "the ranks differ in ema.save(): step is 0 on ranks 0 and 1 on ranks 1, 2" in told[0]
    assert "path" not in told[0].split(".")[1]


def late_once() -> list[str]:
    """Rank 1 does not come to the first meeting, nor to one after it; then all are there."""
    ranks = Ranks([0, 1], 1.0)
    found = []
    for _ in range(2):
        if rank() == 0:
            try:
                ranks.gather(0, "ema.save()")
            except AbsentRankError as error:
                found.append(str(error))
        dist.barrier()
        found.append(str(ranks.gather(rank(), "ema.swap()")))
    ranks.close()
    return found


def test_after_a_timeout_the_ranks_can_meet_again(worlds: Worlds) -> None:
    first, second = worlds[2].run(late_once)
    assert second == ["[0, 1]"] * 2
    assert first[1] == first[3] == "[0, 1]"
    for said in (first[0], first[2]):
        assert "not every rank came to ema.save() within 1 s" in said
        assert "Ranks [1] are missing" in said


def test_joint_failures_name_the_first_and_keep_all() -> None:
    raise_joint_failure({})
    with pytest.raises(ConfigError, match=r"^rank 1 \(and ranks \[3\]\): one$") as caught:
        raise_joint_failure({3: ("BindError", "two"), 1: ("ConfigError", "one")})
    assert caught.value.failures == {1: "one", 3: "two"}


# ---------------------------------------------------------------------- a rank that dies


def dies_as_all_enter(mode: str, folder: str) -> None:
    """The last rank ends in the first collective of a swap; what the others meet is noted."""
    run = build(mode)
    ema = ShardedEMA(run.target, 0.5, timeout=30)
    ema.attach(run.optimizer)
    run.step(0)
    if rank() == world() - 1:
        dist.all_gather = lambda *args, **kwargs: os._exit(9)
    before = {name: p.detach().clone() for name, p in run.bare.named_parameters()}
    try:
        with ema.swap():
            said = "entered"
    except BaseException as error:
        said = f"{type(error).__name__}: {error}"
    same = all(map(equal, run.bare.parameters(), before.values()))
    Path(folder, str(rank())).write_text(f"{same} {said}")
    os._exit(0)  # nothing can be done with this group


def equal(one: Tensor, other: Tensor) -> bool:
    local = [t.to_local() if isinstance(t, DTensor) else t for t in (one, other)]
    return torch.equal(*local)


@pytest.mark.parametrize(("mode", "size"), [("hsdp", 4), ("ddp", 2)])
def test_a_rank_that_dies_as_all_enter_a_swap_is_a_named_error(
    mode: str, size: int, tmp_path: Path
) -> None:
    pool = WorkerPool(size)
    with pytest.raises(AssertionError, match="process died"):
        pool.run(dies_as_all_enter, mode, str(tmp_path))
    said = [path.read_text() for path in tmp_path.iterdir()]
    assert len(said) >= 1
    for text in said:
        assert text.startswith("True AbsentRankError: a rank was lost in ema.swap()"), text
