"""The average of the run: built from the flags, described, and evaluated."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from options import Options
from ranks import Ranks
from sharded_ema import ShardedEMA
from sharded_ema.averaging.schedules import Schedule, horizon


def build_average(model: nn.Module, options: Options) -> ShardedEMA | None:
    """The average that the flags ask for, seeded with the model's present weights."""
    if not options.ema:
        return None
    return ShardedEMA(
        model,
        options.profiles,
        update_every=options.ema_update_every,
        start_step=options.ema_start_step,
        total_steps=options.steps,
    )


def describe(ema: ShardedEMA | None, options: Options, ranks: Ranks) -> Iterator[str]:
    """Lines that tell what is averaged, how far back, and what that costs each rank."""
    shadows = ranks.gather(ema.memory["shadow"] if ema else 0)
    if ema is None:
        yield "average    none (--ema keeps one)"
        return
    every, start = options.ema_update_every, options.ema_start_step
    cadence = f"every {every} steps" if every > 1 else "after every step"
    yield f"average    {len(ema.names)} parameter tensors, {cadence}, from step {start} on"
    last = max(1, options.steps - start)
    for name, schedule in options.profiles.items():
        yield f"  {name:<8} {_schedule_text(schedule)}: {_decay_text(schedule, last)}"
    parts = ", ".join(f"rank {rank} {size:,}" for rank, size in enumerate(shadows))
    yield f"shadow     bytes: {parts}"


def _schedule_text(schedule: Schedule) -> str:
    settings = schedule.to_dict()
    kind = settings.pop("type", type(schedule).__name__)
    inner = ", ".join(f"{key}={value}" for key, value in settings.items() if value is not None)
    return f"{kind}({inner})"


def _decay_text(schedule: Schedule, last: int) -> str:
    first_decay, last_decay = schedule.decay(1), schedule.decay(last)
    if first_decay == last_decay:
        return f"decay {first_decay:.6g}, horizon {horizon(first_decay):.4g} steps"
    return (
        f"decay {first_decay:.6g} at first and {last_decay:.6g} at step {last}, "
        f"where its horizon is {horizon(last_decay):.4g} steps"
    )
