"""Snapshots of several ranks, of different layouts, make an average that nobody kept."""

from __future__ import annotations

from pathlib import Path

import torch

from sharded_ema import ShardedEMA, consolidate, synthesize
from tests.helpers.layouts import build
from tests.helpers.pool import WorkerPool
from tests.tools.test_consolidated import read

PROFILES = {"a": "power:0.05", "b": "power:0.10", "direct": "power:0.07"}
EVERY, SAVES = 2, 8


def half_a_run(mode: str, run: str, first: int) -> None:
    """Saves ``first`` and the following ones up to the half, taken up from the save before."""
    trained = build(mode)
    ema = ShardedEMA(trained.target, PROFILES, update_every=EVERY, start_step=3)
    ema.attach(trained.optimizer)
    if first > 1:
        ema.load(Path(run, f"step_{first - 1}"))
    for number in range(first, first + SAVES // 2):
        for _ in range(2 * EVERY):
            trained.step(number)
        ema.save(Path(run, f"step_{number}"), step=number, latest=False)
    ema.close()


def test_synthesized_is_what_was_tracked(worlds: dict[int, WorkerPool], tmp_path: Path) -> None:
    run = tmp_path / "run"
    worlds[4].run(half_a_run, "fsdp2", str(run), 1)
    worlds[4].run(half_a_run, "ddp", str(run), 1 + SAVES // 2)
    out = tmp_path / "out"
    report = synthesize(run, sigma_rel=0.07, out=out, profiles=["a", "b"], progress=False)
    assert report.ok and report.facts["snapshots"] == list(range(2, SAVES + 1))
    assert report.facts["seed_step"] == 3 and "step 1 left aside" in report.text()
    residual = report.facts["widths"]["0.07"]["residual"]
    assert residual < 0.02
    last = run / f"step_{SAVES}"
    wanted, others = {}, {}
    for name, into in (("direct", wanted), ("a", others)):
        consolidate(last, tmp_path / name, profile=name, progress=False)
        into |= read(tmp_path / name)[0]
    found, said = read(out / "sigma_rel_0.07")
    assert found.keys() == wanted.keys() and said["sigma_rel"] == "0.07"
    moved = 0.0
    for name, tensor in wanted.items():
        if not tensor.is_floating_point() or torch.equal(tensor, others[name]):
            assert torch.allclose(found[name], tensor, rtol=1e-6, atol=1e-7), name
            continue
        apart = (found[name] - tensor).norm()
        moved += float((others[name] - tensor).norm())
        assert apart <= max(residual * (others[name] - tensor).norm(), 1e-6 * tensor.norm()), name
    assert moved > 0
