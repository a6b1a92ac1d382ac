"""Plans of saves: kept while nothing changes, made anew by all ranks when anything does."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint import DefaultSavePlanner

from sharded_ema import ShardedEMA
from sharded_ema.checkpoint.reading.chunks import dump_chunk_table
from sharded_ema.checkpoint.run import open_checkpoint
from sharded_ema.checkpoint.transfer import save_state
from sharded_ema.checkpoint.writing.planning import Plan
from sharded_ema.checkpoint.writing.rows import Geometry, Rows
from sharded_ema.errors import CheckpointWriteError
from sharded_ema.model.agreement import Ranks
from sharded_ema.model.layout import Box
from sharded_ema.model.pieces import FlatShard
from tests.helpers.layouts import assert_equal, build, rank
from tests.helpers.pool import WorkerPool
from tests.model.sources.test_average import averages

COLLECTIVES = ("gather_object", "all_gather_object", "scatter_object_list", "broadcast_object_list")


class Counts:
    """What this rank did: plans of its own that it made, bytes of objects that it sent."""

    plans = 0
    sent = 0

    def taken(self) -> tuple[int, int]:
        found = self.plans, self.sent
        self.plans = self.sent = 0
        return found


@contextmanager
def counted() -> Iterator[Counts]:
    counts = Counts()
    planned = DefaultSavePlanner.create_local_plan
    real = {name: getattr(dist, name) for name in COLLECTIVES}

    def plan(self: DefaultSavePlanner) -> Any:
        counts.plans += 1
        return planned(self)

    def sending(name: str) -> Callable[..., Any]:
        def collective(*args: Any, **options: Any) -> Any:
            given = {**dict(enumerate(args)), **options}
            value = {
                "gather_object": given.get("obj", given.get(0)),
                "all_gather_object": given.get("obj", given.get(1)),
                "scatter_object_list": given.get("scatter_object_input_list", given.get(1)),
                "broadcast_object_list": given.get("object_list", given.get(0)),
            }[name]
            counts.sent += len(pickle.dumps(value))
            return real[name](*args, **options)

        return collective

    DefaultSavePlanner.create_local_plan = plan  # type: ignore[method-assign]
    for name in COLLECTIVES:
        setattr(dist, name, sending(name))
    try:
        yield counts
    finally:
        DefaultSavePlanner.create_local_plan = planned  # type: ignore[method-assign]
        for name, function in real.items():
            setattr(dist, name, function)


def plans_of_an_average(folder: str, format: str) -> None:
    """Of two averages of one model, with what can come between two saves."""
    run = build("fsdp2")
    ema = ShardedEMA(run.target, 0.9, **run.options)
    other = ShardedEMA(run.target, {"fast": 0.5, "slow": 0.99}, **run.options)
    taken, limit = 0, {"safetensors": 8_000, "dcp": 30_000}[format]

    def check(of: ShardedEMA, *, anew: bool, **settings: Any) -> None:
        nonlocal taken
        taken += 1
        run.step(taken)
        of.update()
        profile = "ema" if of is ema else "slow"
        expected = {name: tensor.clone() for name, tensor in averages(of, profile).items()}
        path = Path(folder, str(taken))
        counts.taken()
        of.save(path, step=taken, format=format, **settings).result()
        plans, sent = counts.taken()
        assert plans == anew, (taken, plans)
        assert anew or sent < limit, sent
        assert of.load(path, verify=True) == taken
        assert expected
        assert_equal(averages(of, profile), expected)

    with counted() as counts:
        check(ema, anew=True)
        check(ema, anew=False)
        check(other, anew=True)
        check(ema, anew=False)
        check(other, anew=False)
        check(ema, anew=False, asynchronous=True)
        check(ema, anew=False, latest=True)
        original = os.fsync

        def full(descriptor: int) -> None:
            raise OSError(28, "No space left on device")

        os.fsync = os.fdatasync = full if rank() == 1 else original
        try:
            with pytest.raises(CheckpointWriteError, match="No space"):
                ema.save(Path(folder, "full"), step=0, format=format)
        finally:
            os.fsync, os.fdatasync = original, fdatasync
        check(ema, anew=False)
        ema.save(Path(folder, "again"), step=0, format=format)
        counts.taken()
        ema.save(Path(folder, "again"), step=1, format=format, replace=True)
        assert counts.taken()[0] == 0 and ema.load(Path(folder, "again"), verify=True) == 1
    for each in (ema, other):
        each.close()


fdatasync = os.fdatasync


@pytest.mark.parametrize("format", ["safetensors", "dcp"])
def test_plans_of_an_average(worlds: dict[int, WorkerPool], tmp_path: Path, format: str) -> None:
    worlds[2].run(plans_of_an_average, str(tmp_path), format)


def shard(boxes: list[tuple[int, int]], value: float) -> FlatShard:
    """Elements ``start`` to ``stop`` of a tensor of 8."""
    pieces = [
        (Box((start,), (stop - start,)), torch.arange(start, stop, dtype=torch.float32) + value)
        for start, stop in boxes
    ]
    return FlatShard((8,), pieces, dtype=torch.float32, device=torch.device("cpu"))


def plans_of_ranks(folder: str) -> None:
    """What one rank saves changes, or what one rank remembers."""
    ranks = Ranks([0, 1], 60.0)
    plans: dict[str, Plan] = {}
    first, saved = rank() == 0, 0
    usual = [(0, 4)] if first else [(4, 8)]
    other = [(0, 4)] if first else [(4, 5), (5, 8)]  # of the second rank only

    def check(boxes: list[tuple[int, int]], *, anew: bool, more: tuple[str, ...] = ()) -> None:
        nonlocal saved
        saved += 1
        path = Path(folder, str(saved))
        state: dict[str, Tensor] = {
            key: shard(boxes, 100 * saved + i) for i, key in enumerate(("w", *more))
        }
        ranks.barrier("a save")
        with counted() as counts:
            save_state(
                state, path, format="safetensors", replace=False, ranks=ranks, plans=plans,
                latest=False, keep_last=None,
            )  # fmt: skip
        assert counts.plans == anew, (saved, counts.plans)
        dist.barrier()
        opened = open_checkpoint(path)
        for i, (key, tensor) in enumerate(opened.tensors.items()):
            values = np.frombuffer(tensor.read(), np.float32)
            assert values.tolist() == [100 * saved + i + n for n in range(8)], key
        assert list(opened.tensors) == ["w", *more]
        dist.barrier()

    check(usual, anew=True)
    check(usual, anew=False)
    check(other, anew=True)  # the first rank has what it had
    check(other, anew=False)
    check(usual, anew=True)
    check(usual, anew=True, more=("x",))
    check(usual, anew=False, more=("x",))
    if not first:  # as one that has seen the last save fail
        plans.clear()
    check(usual, anew=True, more=("x",))
    before = dict(plans)
    check(other, anew=True)
    if first:  # it has not seen that the last save went well, and saves the same in all of them
        plans.update(before)
    check(other, anew=True, more=("x",))
    if first:
        plans.update(before)
    check(other, anew=True, more=("x",))
    ranks.close()


def test_plans_of_ranks(worlds: dict[int, WorkerPool], tmp_path: Path) -> None:
    worlds[2].run(plans_of_ranks, str(tmp_path))


# ---------------------------------------------------------------------- columns


def some_ranks(random: np.random.Generator, ranks: int) -> list[Rows]:
    """Blocks of three tensors in rows; some are held by several ranks, each in its own order."""
    shapes = {"b": (12, 3), "a": (7,), "c": ()}
    dtypes = {"b": "F32", "a": "BF16", "c": "I64"}
    held: list[list[tuple[str, tuple[int, ...], tuple[int, ...]]]] = [[] for _ in range(ranks)]
    for key, shape in shapes.items():
        cuts = sorted(
            {0, *shape[:1], *random.integers(0, shape[0] + 1, 3).tolist()} if shape else ()
        )
        pairs = pairwise(cuts)
        blocks = [((a, *[0] * (len(shape) - 1)), (b - a, *shape[1:])) for a, b in pairs]
        for offsets, sizes in blocks or [((), ())]:
            holders = random.choice(ranks, random.integers(1, ranks + 1), replace=False)
            for holder in holders.tolist():
                held[holder].append((key, offsets, sizes))
    found = []
    for blocks in held:
        random.shuffle(blocks)
        keys = sorted({key for key, _, _ in blocks}, key=lambda key: hash((key, len(blocks))))
        width = max([1, *(len(shapes[key]) for key in keys)])
        found.append(
            Rows(
                keys,
                [shapes[key] for key in keys],
                [dtypes[key] for key in keys],
                np.array([keys.index(key) for key, _, _ in blocks], np.int64),
                np.array([[*o, *[0] * (width - len(o))] for _, o, _ in blocks], np.int64).reshape(
                    -1, width
                ),
                np.array([[*s, *[1] * (width - len(s))] for _, _, s in blocks], np.int64).reshape(
                    -1, width
                ),
            )
        )
    return found


def test_what_all_ranks_write_makes_up_the_table() -> None:
    """Against files put together block by block."""
    random, size = np.random.default_rng(0), {"F32": 4, "BF16": 2, "I64": 8}
    for _ in range(60):
        ranks = some_ranks(random, int(random.integers(1, 5)))
        geometry = Geometry.of(Rows.unpack(rows.pack()) for rows in ranks)
        keys = [record.key for record in geometry.tensors]
        assert keys == sorted({key for rows in ranks for key in rows.keys})
        expected, digests, starts = [], [], []
        for number, (rows, kept) in enumerate(zip(ranks, geometry.kept, strict=True)):
            starts.append(4096 * (1 + number))
            position = starts[-1]
            count = 0
            for row, index in enumerate(rows.tensor.tolist()):
                if kept is not None and not kept[row]:
                    continue
                dims = len(rows.shapes[index])
                place = rows.offsets[row, :dims].tolist(), rows.sizes[row, :dims].tolist()
                num_bytes = int(np.prod(place[1], dtype=int)) * size[rows.dtypes[index]]
                digests.append(random.bytes(16))
                expected.append(
                    (keys.index(rows.keys[index]), *place, number, position, num_bytes, digests[-1])
                )
                position += num_bytes
                count += 1
            assert geometry.counts[number] == count
        columns = geometry.columns(
            range(len(ranks)), starts, np.frombuffer(b"".join(digests), np.uint8)
        )
        dims = [len(record.shape) for record in geometry.tensors]
        found = [
            (tensor, offsets[: dims[tensor]], sizes[: dims[tensor]], *rest, digest.tobytes())
            for tensor, offsets, sizes, *rest, digest in zip(
                *(columns[name].tolist() for name in list(columns)[:-1]), columns["digest"],
                strict=True,
            )
        ]  # fmt: skip
        assert found == sorted(expected)
        assert sum(map(len, dump_chunk_table(columns, "u"))) > 0
        blocks = {(t, *o) for t, o, *_ in ((t, tuple(o)) for t, o, *_ in found)}
        assert len(blocks) == len(found)  # each once


def test_copies_are_shared_out() -> None:
    """Sixteen equal blocks that both ranks hold."""
    row = np.arange(16).reshape(-1, 1)
    both = Rows(["w"], [(16,)], ["F32"], np.zeros(16, np.int64), row, np.ones_like(row))
    assert Geometry.of([both, both]).counts.tolist() == [8, 8]


@pytest.mark.parametrize("starts", [[0, 4], [0, 3], [0, 6], [5, 0], [0, -1]])
def test_blocks_that_do_not_fill_their_tensor(starts: list[int]) -> None:
    ranks = [
        Rows(["w"], [(10,)], ["F32"], np.zeros(1, np.int64), np.array([[s]]), np.array([[5]]))
        for s in starts
    ]
    if starts == [5, 0]:
        assert Geometry.of(ranks).tensors[0].num_chunks == 2
        return
    with pytest.raises((CheckpointWriteError, ValueError), match=r"w: the ranks|negative"):
        Geometry.of(ranks)


def test_ranks_that_hold_different_models() -> None:
    row = np.zeros((1, 1), np.int64)
    first = Rows(["w"], [(1,)], ["F32"], row[0], row, row + 1)
    second = Rows(["w"], [(1,)], ["BF16"], row[0], row, row + 1)
    with pytest.raises(CheckpointWriteError, match=r"w is BF16 .* on rank 1 and F32"):
        Geometry.of([first, second])
