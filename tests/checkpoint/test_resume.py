"""Averages that are taken up elsewhere and go on, compared with one that was never interrupted.

The weights move by a formula that works element by element, so they are the same in every layout.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from sharded_ema import Power, Schedule, ShardedEMA, Warmup
from tests.helpers.layouts import Run, assert_equal, build
from tests.helpers.pool import WorkerPool
from tests.model.sources.test_average import averages

Worlds = dict[int, WorkerPool]

PROFILES: dict[str, Schedule | float] = {
    "warm": Warmup(0.99),
    "power": Power(sigma_rel=0.1),
    "plain": 0.95,
}
UPDATE_EVERY, START, END = 4, 6, 40


@torch.no_grad()
def move(run: Run, step: int) -> None:
    """The weights of ``step`` from those of the step before, whatever the shards are."""
    for parameter in run.bare.parameters():
        if parameter.requires_grad:
            local = getattr(parameter, "_local_tensor", parameter)
            local.mul_(1 + step % 3 / 64).add_(0.25 / step)


def expected(until: int) -> dict[str, dict[str, Tensor]]:
    """The averages of one process, by the plainest loop."""
    run = build("plain")
    decays = {
        name: s.decay if isinstance(s, Schedule) else (lambda n, d=s: d)
        for name, s in PROFILES.items()
    }
    now = {n: p for n, p in run.bare.named_parameters() if p.requires_grad}
    shadow: dict[str, dict[str, Tensor]] = {}
    open_window: list[int] = []
    for step in range(1, until + 1):
        move(run, step)
        if step <= START:
            shadow = {p: {n: t.detach().clone() for n, t in now.items()} for p in PROFILES}
            continue
        open_window.append(step - START)
        if len(open_window) == UPDATE_EVERY:
            for profile, tensors in shadow.items():
                keep = 1.0
                for n in open_window:
                    keep *= decays[profile](n)
                for name, average in tensors.items():
                    average.lerp_(now[name].detach(), 1 - keep)
            open_window = []
    return shadow


def go_on(mode: str, source: str | None, first: int, last: int, target: str) -> None:
    run = build(mode)
    for step in range(1, first):
        move(run, step)
    ema = ShardedEMA(
        run.target, PROFILES, update_every=UPDATE_EVERY, start_step=START, **run.options
    )
    if source is not None:
        assert ema.load(source, verify=True) == first - 1
        assert ema.num_updates == max(0, first - 1 - START)
    for step in range(first, last + 1):
        move(run, step)
        ema.update()
    ema.save(target, step=last, asynchronous=True).result()
    want = expected(last)
    for profile in PROFILES:
        assert_equal(averages(ema, profile), want[profile])
    ema.close()


CHAINS = [
    # Before the start, inside an open window, at the end of one.
    [("fsdp2", 2, 3), ("ddp", 3, 21), ("hsdp", 4, END)],
    [("ddp", 4, 9), ("ddp_whole", 2, 22), ("fsdp1", 3, END)],
    [("fsdp1_hybrid", 4, 13), ("fsdp2", 3, 26), ("tp_fsdp2", 4, END)],
]


@pytest.mark.parametrize("chain", CHAINS)
def test_taken_up_elsewhere(
    worlds: Worlds, chain: list[tuple[str, int, int]], tmp_path: Path
) -> None:
    source, first = None, 1
    for mode, size, last in chain:
        target = str(tmp_path / f"step_{last}")
        worlds[size].run(go_on, mode, source, first, last, target)
        source, first = target, last + 1
    # And in one process, at last.
    go_on("plain", source, first, first + 5, str(tmp_path / "last"))
