"""Save under one sharding, load under another: bit-equal, or the same error on every rank."""

from __future__ import annotations

import copy
import errno
import io
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from sharded_ema import (
    Power,
    SafetensorsStorageReader,
    SafetensorsStorageWriter,
    Schedule,
    ShardedEMA,
    Warmup,
    consolidate,
)
from sharded_ema.checkpoint.names import META_BYTES
from sharded_ema.errors import (
    AbsentRankError,
    BindError,
    CheckpointExistsError,
    CheckpointMismatchError,
    CheckpointNotFoundError,
    CheckpointUncommittedError,
    CheckpointWriteError,
    EMAError,
    EMAWarning,
    StateError,
)
from sharded_ema.model.layout import Box
from sharded_ema.model.pieces import FlatShard
from tests.helpers.layouts import (
    MISSING,
    MODES,
    Run,
    as_float,
    assert_equal,
    build,
    rank,
    reference_step,
    sizes,
)
from tests.helpers.pool import WorkerPool
from tests.model.sources.test_average import averages

Worlds = dict[int, WorkerPool]
WARM = Warmup(0.99)
PROFILES: dict[str, float | str | Schedule] = {"fast": 0.9, "warm": WARM}
FORMATS = ("safetensors", "dcp")
EVERY = (*MODES, "plain")


def train_and_save(mode: str, path: str, steps: int, formats: tuple[str, ...]) -> dict[str, Tensor]:
    """Averages by ``<profile>.<name>`` as saved below ``path`` in every format."""
    run = build(mode)
    ema = ShardedEMA(run.target, PROFILES, **run.options)
    ema.attach(run.optimizer)
    for index in range(steps):
        run.step(index)
    for name in formats:
        ema.save(Path(path, name), step=steps, format=name)
    full = {f"{p}.{n}": t for p in PROFILES for n, t in averages(ema, p).items()}
    ema.close()
    return full


class Saved(NamedTuple):
    """A checkpoint of one mode on one number of ranks, with its averages beside it."""

    mode: str
    size: int
    format: str
    path: str
    averages: str


def save_all(mode: str, saved: list[Saved]) -> None:
    """Train and save, with the averages that a plain loop finds."""
    run = build(mode)
    ema = ShardedEMA(run.target, PROFILES, **run.options)
    ema.attach(run.optimizer)
    expected = {profile: as_float(run.gather()) for profile in PROFILES}
    for n in (1, 2):
        run.step(n)
        now = run.gather()
        reference_step(expected["fast"], now, 1 - 0.9)
        reference_step(expected["warm"], now, 1 - WARM.decay(n))
    run.evaluate()  # leaves FSDP2's root gathered; saving must not mind
    for each in saved:
        handle = ema.save(each.path, step=2, format=each.format)
        handle.staged()
        assert handle.result() == Path(each.path)
        if rank() == 0:
            full = {f"{p}.{n}": t for p, tensors in expected.items() for n, t in tensors.items()}
            torch.save(full, each.averages)
    ema.close()


def local_pieces(value: Tensor) -> list[tuple[Box, Tensor]]:
    """This rank's part of a value in a state dict."""
    if isinstance(value, FlatShard):
        return value.pieces
    if isinstance(value, DTensor):
        return [
            (Box(tuple(chunk.offsets), tuple(chunk.sizes)), value._local_tensor)
            for chunk in value.__create_chunk_list__()
        ]
    return [(Box.whole(value.shape), value)]


def load_all(mode: str, sources: list[Saved]) -> None:
    """Load one checkpoint after another into one model; each must be what was saved, bit by bit."""
    run = build(mode, seed=7)
    ema = ShardedEMA(run.target, PROFILES, **run.options)
    before = run.gather()
    state = ema.state_dict()
    averages = [key for key in state if key.split(".")[0] in PROFILES]
    for nth, source in enumerate(sources):
        for key in averages:
            for _, piece in local_pieces(state[key]):
                piece.fill_(float("nan"))
        assert ema.load(source.path, verify=nth % 2 == 1) == 2, source
        assert ema.num_updates == 2
        expected = torch.load(source.averages, mmap=True)
        assert averages and expected.keys() == set(averages)
        for key in averages:
            for box, piece in local_pieces(state[key]):
                block = tuple(slice(o, o + n) for o, n in zip(box.offsets, box.sizes, strict=True))
                assert torch.equal(piece, expected[key][block]), (source, key)
    assert_equal(run.gather(), before)
    ema.close()


@pytest.fixture(scope="module")
def saved(worlds: Worlds, tmp_path_factory: pytest.TempPathFactory) -> list[Saved]:
    """Every mode on the fewest and on the most ranks, in one format each, or in both on one."""
    folder = tmp_path_factory.mktemp("saved")
    found = []
    for mode in (m for m in EVERY if m not in MISSING):
        on = sorted({min(sizes(mode)), max(sizes(mode))}) if mode in MODES else [1]
        chosen = zip(on, FORMATS, strict=True) if len(on) > 1 else [(on[0], f) for f in FORMATS]
        made = [
            Saved(mode, size, f, str(folder / f"{mode}-{size}-{f}"), str(folder / f"{mode}-{size}"))
            for size, f in chosen
        ]
        for size in on:
            mine = [each for each in made if each.size == size]
            if size == 1:
                save_all(mode, mine)
            else:
                worlds[size].run(save_all, mode, mine)
        found += made
    return found


def sources_for(size: int, format: str, saved: list[Saved]) -> list[Saved]:
    """Of every mode one checkpoint: best of another number of ranks, then in ``format``."""
    by_mode: dict[str, list[Saved]] = {}
    for source in saved:
        by_mode.setdefault(source.mode, []).append(source)
    return [
        max(sources, key=lambda s: (s.size != size, s.format == format))
        for sources in by_mode.values()
    ]


@pytest.mark.parametrize("mode", EVERY)
def test_every_layout_loads_every_other(worlds: Worlds, saved: list[Saved], mode: str) -> None:
    (size,) = sizes(mode, [3]) if mode in MODES else [1]
    sources = sources_for(size, FORMATS[EVERY.index(mode) % 2], saved)
    assert [source.mode for source in sources] == [m for m in EVERY if m not in MISSING]
    if size == 1:
        load_all(mode, sources)
    else:
        worlds[size].run(load_all, mode, sources)


def load_through_dcp(path: str) -> None:
    run = build("fsdp2", seed=7)
    ema = ShardedEMA(run.target, PROFILES)
    state = ema.state_dict()
    dcp.load(state, storage_reader=SafetensorsStorageReader(path))
    ema.load_state_dict(state)
    other = ShardedEMA(run.target, PROFILES)
    other.load(path)
    for profile in PROFILES:
        assert_equal(averages(ema, profile), averages(other, profile))
    assert ema.num_updates == other.num_updates == 5
    ema.close()
    other.close()


def test_dcp_load_with_our_reader(worlds: Worlds, tmp_path: Path) -> None:
    (expected, *_) = worlds[4].run(train_and_save, "fsdp2", str(tmp_path), 5, ("safetensors",))
    worlds[3].run(load_through_dcp, str(tmp_path / "safetensors"))
    plain = {key: torch.zeros_like(value) for key, value in expected.items()}
    dcp.load(plain, storage_reader=SafetensorsStorageReader(tmp_path / "safetensors"), no_dist=True)
    assert_equal(plain, expected)


STOCK_LOADER = """
import importlib.util, sys, torch, torch.distributed.checkpoint as dcp
assert importlib.util.find_spec("sharded_ema") is None
expected = torch.load(sys.argv[2])
state = {key: torch.zeros_like(value) for key, value in expected.items()}
dcp.load(state, checkpoint_id=sys.argv[1], no_dist=True)
assert all(torch.equal(state[key], expected[key]) for key in expected)
print(len(state), "equal")
"""


def test_stock_torch_loads_format_dcp_without_this_package(worlds: Worlds, tmp_path: Path) -> None:
    (expected, *_) = worlds[3].run(train_and_save, "ddp", str(tmp_path), 2, ("dcp",))
    torch.save(expected, tmp_path / "expected.pt")
    # Isolated from the environment and from this directory; an editable install is hidden as well.
    site = str(Path(torch.__file__).parents[1])
    code = "import sys; sys.path[:] = [p for p in sys.path if p.startswith(sys.base_prefix)]\n"
    code += f"sys.path.append({site!r})\n"
    code += "sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in repr(f).lower()]\n"
    command = [sys.executable, "-I", "-S", "-c", code + STOCK_LOADER, str(tmp_path / "dcp")]
    run = subprocess.run(
        [*command, str(tmp_path / "expected.pt")], capture_output=True, text=True, cwd=tmp_path
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.split()[0] == str(len(expected))


def nested(path: str, ours: bool) -> None:
    """As part of the user's own checkpoint, with his model beside it."""
    run = build("fsdp2")
    ema = ShardedEMA(run.target, 0.9)
    ema.attach(run.optimizer)
    for index in range(3):
        run.step(index)
    state = {"model": run.bare.state_dict(), "ema": ema}
    if ours:
        dcp.save(state, storage_writer=SafetensorsStorageWriter(path))
    else:
        dcp.save(state, checkpoint_id=path)
    fresh = build("fsdp2", seed=3)
    # Not begun yet: what is loaded in place must not be taken for an average to be seeded.
    again = ShardedEMA(fresh.target, 0.9, start_step=2)
    frozen = fresh.bare.frozen
    running = fresh.bare.running.clone()
    target: dict[str, Any] = {"ema": again}
    dcp.load(
        target,
        storage_reader=SafetensorsStorageReader(path) if ours else None,
        checkpoint_id=None if ours else path,
    )
    assert_equal(averages(again), averages(ema))
    assert again.num_updates == 3
    assert torch.equal(fresh.bare.running, running), "loading an average leaves the model alone"
    assert fresh.bare.frozen is frozen
    third = ShardedEMA(build("fsdp2", seed=4).target, 0.9)
    assert third.load(path) == 3
    assert_equal(averages(third), averages(ema))
    for each in (ema, again, third):
        each.close()


@pytest.mark.parametrize("ours", [True, False])
def test_stateful_in_a_users_checkpoint(worlds: Worlds, ours: bool, tmp_path: Path) -> None:
    worlds[3].run(nested, str(tmp_path / "all"), ours)
    report = consolidate(tmp_path / "all", tmp_path / "out", prefix="ema", progress=False)
    assert report.ok
    assert report.facts["tensors"] == 20, "by all names of a tied one"


def asynchronous(mode: str, path: str) -> str:
    """dcp.async_save copies the pieces before it returns, or PyTorch 2.8 refuses them."""
    run = build(mode)
    ema = ShardedEMA(run.target, 0.9, **run.options)
    ema.attach(run.optimizer)
    run.step(0)
    expected = averages(ema)
    # A group of its own: the background save and training must not meet in one.
    group = dist.new_group(backend="gloo")
    try:
        future = dcp.async_save({"ema": ema}, checkpoint_id=path, process_group=group)
    except TypeError as error:
        ema.close()
        return str(error)
    for index in range(1, 4):
        run.step(index)
    future.result()  # type: ignore[union-attr]
    again = ShardedEMA(build(mode).target, 0.9)
    dcp.load({"ema": again}, checkpoint_id=path)
    assert_equal(averages(again), expected)
    ema.close()
    again.close()
    return ""


@pytest.mark.parametrize("mode", ["fsdp2", "ddp", "hsdp", "fsdp1"])
def test_async_save_of_the_pieces(worlds: Worlds, mode: str, tmp_path: Path) -> None:
    (size,) = sizes(mode, [2])
    refused = set(worlds[size].run(asynchronous, mode, str(tmp_path / "all")))
    if refused != {""}:
        (reason,) = refused
        assert "use its own save(asynchronous=True)" in reason
        pytest.skip(reason)


def resume(mode: str, path: str) -> None:
    settings: dict[str, Any] = {"update_every": 10, "start_step": 37}
    profiles = {"warm": Warmup(0.99), "power": Power(sigma_rel=0.1), "plain": 0.95}
    run = build(mode)
    whole_run = ShardedEMA(run.target, profiles, **settings)
    first = ShardedEMA(run.target, profiles, **settings)
    for index in range(203):
        run.step(index)
        whole_run.update()
        first.update()
        if index == 20:  # before averaging has begun
            first.save(f"{path}-early", step=21)
            first.close()
            first = ShardedEMA(run.target, profiles, **settings)
            first.load(f"{path}-early")
            assert first.num_updates == 0
    first.save(path, step=203)
    first.close()
    second = ShardedEMA(run.target, profiles, **settings)
    assert second.load(path, verify=True) == 203
    assert second.num_updates == 203 - 37
    assert second.decay == whole_run.decay
    for index in range(203, 260):
        run.step(index)
        whole_run.update()
        second.update()
    for profile in profiles:
        assert_equal(averages(second, profile), averages(whole_run, profile))
    second.close()
    whole_run.close()


@pytest.mark.parametrize("mode", ["fsdp2", "ddp"])
def test_resumed_average_equals_the_uninterrupted_one(
    worlds: Worlds, mode: str, tmp_path: Path
) -> None:
    worlds[2].run(resume, mode, str(tmp_path / "step"))


def error_of(call: Callable[[], Any]) -> tuple[str, str]:
    try:
        call()
    except EMAError as error:
        return type(error).__name__, str(error)
    return "nothing", ""


def bad_inputs(folder: str) -> list[tuple[str, str, str]]:
    """What each of many wrong uses raises on this rank: (case, class, message)."""
    root = Path(folder)
    run = build("fsdp2")
    ema = ShardedEMA(run.target, 0.9)
    ema.save(root / "good", step=1)
    before = averages(ema)
    if rank() == 0:
        (root / "empty").mkdir()
        (root / "good.tmp-123").mkdir()
        (root / "torn").mkdir()
        (root / "torn" / "shard-00000.safetensors").write_bytes(b"x" * 100)
        (root / "file").write_text("no directory")
    dist.barrier()
    other = ShardedEMA(torch.nn.Linear(3, 2), 0.9)
    other.save(root / "other", step=1)
    torch.manual_seed(0)
    resized = torch.nn.Linear(3, 2)
    resized.bias = torch.nn.Parameter(torch.zeros(5))
    subset = ShardedEMA(run.target, 0.9, include="blocks.*")
    cases: list[tuple[str, Callable[[], Any]]] = [
        ("missing", lambda: ema.load(root / "nothing")),
        ("empty", lambda: ema.load(root / "empty")),
        ("file", lambda: ema.load(root / "file")),
        ("temporary", lambda: ema.load(root / "good.tmp-123")),
        ("torn", lambda: ema.load(root / "torn")),
        ("other model", lambda: ema.load(root / "other")),
        ("extra names", lambda: subset.load(root / "good")),
        ("shape", lambda: ShardedEMA(resized, 0.9).load(root / "other")),
        ("schedule", lambda: ShardedEMA(run.target, 0.99).load(root / "good")),
        ("profiles", lambda: ShardedEMA(run.target, {"a": 0.9}).load(root / "good")),
        ("taken", lambda: ema.save(root / "good", step=2)),
        ("taken by a file", lambda: ema.save(root / "file", step=2, replace=True)),
        ("under a file", lambda: ema.save(root / "file" / "x", step=2)),
        ("format", lambda: ema.save(root / "new", step=2, format="hdf5")),
    ]
    found = [(case, *error_of(call)) for case, call in cases]
    assert_equal(averages(ema), before)
    assert ema.load(root / "good") == 1
    assert subset.load(root / "good", strict=False) == 1
    ema.close()
    return found


def test_bad_input_is_the_same_named_error_on_every_rank(worlds: Worlds, tmp_path: Path) -> None:
    ranks = worlds[2].run(bad_inputs, str(tmp_path))
    assert [c[:2] for c in ranks[0]] == [c[:2] for c in ranks[1]]
    classes = {case: name for case, name, _ in ranks[0]}
    assert classes == {
        "missing": CheckpointNotFoundError.__name__,
        "empty": CheckpointNotFoundError.__name__,
        "file": CheckpointNotFoundError.__name__,
        "temporary": CheckpointUncommittedError.__name__,
        "torn": CheckpointUncommittedError.__name__,
        "other model": CheckpointMismatchError.__name__,
        "extra names": CheckpointMismatchError.__name__,
        "shape": CheckpointMismatchError.__name__,
        "schedule": CheckpointMismatchError.__name__,
        "profiles": CheckpointMismatchError.__name__,
        "taken": CheckpointExistsError.__name__,
        "taken by a file": CheckpointExistsError.__name__,
        "under a file": CheckpointWriteError.__name__,
        "format": "ConfigError",
    }
    left = {p.name for p in tmp_path.iterdir()}
    assert left == {"good", "good.tmp-123", "other", "empty", "torn", "file", "latest"}


def full_disk(folder: str) -> tuple[str, str]:
    run = build("fsdp2")
    ema = ShardedEMA(run.target, 0.9)
    ema.save(Path(folder) / "first", step=1)
    real = os.fdatasync

    def fails(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if rank() == 1:
        os.fdatasync = fails
    try:
        found = error_of(lambda: ema.save(Path(folder) / "second", step=2))
    finally:
        os.fdatasync = real
    run.step(0)
    ema.update()
    ema.save(Path(folder) / "third", step=3)
    assert ema.load(Path(folder) / "first", verify=True) == 1
    ema.close()
    return found


def test_failure_on_one_rank_is_raised_on_all(worlds: Worlds, tmp_path: Path) -> None:
    for name, message in worlds[3].run(full_disk, str(tmp_path)):
        assert name == CheckpointWriteError.__name__
        assert "rank 1" in message and "No space left" in message
    assert {p.name for p in tmp_path.iterdir()} == {"first", "third", "latest"}


def verify_meta(folder: str) -> None:
    state = {"_meta": torch.zeros(META_BYTES, dtype=torch.uint8)}
    try:
        reader = SafetensorsStorageReader(Path(folder) / "bad meta", verify=True)
        dcp.load(state, storage_reader=reader, no_dist=True)
    except dcp.api.CheckpointException as error:
        raise next(iter(error.failures.values()))[0] from None


def damaged(folder: str) -> list[tuple[str, str]]:
    """A flipped byte of data, on a load that checks."""
    run = build("fsdp2")
    ema = ShardedEMA(run.target, 0.9)
    ema.save(Path(folder) / "good", step=1)
    # The description is the last tensor of the first shard.
    for name, position in (("bad", 4120), ("bad meta", -1000)):
        ema.save(Path(folder) / name, step=1)
        if rank() == 0:
            path = sorted((Path(folder) / name).glob("shard-*"))[0]
            data = bytearray(path.read_bytes())
            data[position] ^= 1
            path.write_bytes(data)
    dist.barrier()
    # The description is read from the manifest, which has a digest of its own.
    assert ema.load(Path(folder) / "bad meta") == 1
    assert error_of(lambda: verify_meta(folder))[0] == "CheckpointCorruptError"
    ema.update()
    found = [error_of(lambda: ema.load(Path(folder) / "bad", verify=True))]
    found.append(error_of(ema.update))
    found.append(error_of(lambda: ema.save(Path(folder) / "worse", step=2)))
    assert ema.load(Path(folder) / "good") == 1
    ema.update()
    ema.close()
    return found


def test_damaged_data_is_found_and_the_average_refuses_use(worlds: Worlds, tmp_path: Path) -> None:
    for found in worlds[2].run(damaged, str(tmp_path)):
        assert [name for name, _ in found] == [
            "CheckpointCorruptError", StateError.__name__, StateError.__name__,
        ]  # fmt: skip
        assert re.search(r"is damaged \(\S+/shard-00000.safetensors, bytes", found[0][1])


def replaced(folder: str) -> list[int]:
    run = build("ddp")
    ema = ShardedEMA(run.target, 0.9)
    target = Path(folder) / "last"
    steps = []
    for step in (1, 2):
        ema.save(target, step=step, replace=True)
        steps.append(ema.load(target))
    if rank() == 0:  # as a process that dies between the two renames would leave it
        target.rename(Path(folder) / f"last.old-{uuid4().hex}")
    dist.barrier()
    ema.save(target, step=3, replace=True)
    steps.append(ema.load(target))
    ema.close()
    return steps


def test_replace_and_recover(worlds: Worlds, tmp_path: Path) -> None:
    assert worlds[2].run(replaced, str(tmp_path)) == [[1, 2, 3]] * 2
    assert {p.name for p in tmp_path.iterdir()} == {"last", "latest"}


def save_inside_swap(path: str) -> dict[str, Tensor]:
    run = build("fsdp2")
    ema = ShardedEMA(run.target, 0.9)
    ema.attach(run.optimizer)
    for index in range(3):
        run.step(index)
    expected = averages(ema)
    with ema.swap():
        run.evaluate()
        ema.save(path, step=3)
    assert_equal(averages(ema), expected)
    ema.close()
    return expected


def test_save_inside_a_swap_writes_the_average(worlds: Worlds, tmp_path: Path) -> None:
    (expected, *_) = worlds[2].run(save_inside_swap, str(tmp_path / "x"))
    loaded = {f"ema.{name}": torch.zeros_like(t) for name, t in expected.items()}
    dcp.load(loaded, storage_reader=SafetensorsStorageReader(tmp_path / "x"), no_dist=True)
    assert_equal({k.removeprefix("ema."): v for k, v in loaded.items()}, expected)


def one_stays_away() -> tuple[str, str]:
    run = build("ddp")
    ema = ShardedEMA(run.target, 0.9, timeout=3.0)
    ema.attach(run.optimizer)
    found = ("nothing", "")
    if rank() != 1:
        found = error_of(lambda: ema.swap().__enter__())
    return found


def test_an_absent_rank_is_named(worlds: Worlds) -> None:
    found = worlds[3].run(one_stays_away)
    assert found[1] == ("nothing", "")
    for name, message in (found[0], found[2]):
        assert name == AbsentRankError.__name__
        assert "ema.swap()" in message
    assert "1" in found[0][1].split("Ranks")[-1]
    worlds[3].kill()  # its group of this average is broken now


def differing_replicas() -> tuple[str, str]:
    torch.manual_seed(rank())
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return error_of(lambda: ShardedEMA(model, 0.9).attach(optimizer))


def test_replicated_parameters_that_differ_are_refused(worlds: Worlds) -> None:
    for name, message in worlds[2].run(differing_replicas):
        assert name == BindError.__name__
        assert "parameter weight" in message


def consolidated_run(mode: str, path: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    run: Run = build(mode)
    ema = ShardedEMA(run.target, 0.9)
    ema.attach(run.optimizer)
    for index in range(5):
        run.step(index)
    ema.save(path, step=5)
    average = averages(ema)
    for name, tensor in {**run.gather(frozen=True), **dict(run.bare.named_buffers())}.items():
        if name not in average and name != "scratch":
            average[name] = tensor.clone()
    raw = run.gather()
    ema.close()
    return average, raw


def plain_in_a_group(path: str) -> None:
    """Only rank 0 writes; the others must not leave files that nobody knows."""
    torch.manual_seed(0)
    ema = ShardedEMA(torch.nn.Linear(2, 2), 0.9)
    for name in ("safetensors", "dcp"):
        ema.save(Path(path, name), step=1, format=name)
        assert ema.load(Path(path, name), verify=True) == 1
    ema.close()


def test_ranks_without_anything_to_write(worlds: Worlds, tmp_path: Path) -> None:
    worlds[2].run(plain_in_a_group, str(tmp_path))
    assert consolidate(tmp_path / "dcp", tmp_path / "out", progress=False).ok


class Half(torch.nn.Module):
    """A module of which DistributedDataParallel keeps only a part equal."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kept = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(3, 3))
        torch.manual_seed(rank())
        self.stray = torch.nn.Linear(3, 3)


def attach_half() -> tuple[str, str]:
    model = Half()
    return error_of(
        lambda: ShardedEMA(model, 0.9).attach(torch.optim.SGD(model.parameters(), lr=0.1))
    )


def test_parameters_outside_ddp_that_differ_are_refused(worlds: Worlds) -> None:
    for name, message in worlds[2].run(attach_half):
        assert name == BindError.__name__
        assert "parameter stray." in message


def drifting(kind: str, folder: Path) -> list[str]:
    """Layers that begin alike and whose gradients nobody averages, as experts on each rank."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    target: torch.nn.Module = model
    if kind == "ddp":
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(
            model, ["1.weight", "1.bias"]
        )
        target = DistributedDataParallel(model)
    elif kind == "fsdp2":
        fully_shard(model, ignored_params=set(model[1].parameters()))
    elif kind == "fsdp1":
        target = FullyShardedDataParallel(
            model, ignored_states=list(model[1].parameters()), device_id=torch.device("cpu")
        )
    optimizer = torch.optim.SGD(target.parameters(), lr=0.1)
    ema = ShardedEMA(target, 0.9)
    ema.attach(optimizer)
    told = []
    for step in range(3):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", EMAWarning)
            ema.save(folder / f"{kind}{step}", step=step)
        told.append(" ".join(str(w.message) for w in caught if w.category is EMAWarning))
        target(torch.full((2, 3), 1.0 + rank())).square().mean().backward()
        optimizer.step()
    ema.close()
    return told


@pytest.mark.parametrize("kind", ["plain", "ddp", "fsdp2", "fsdp1"])
def test_parameters_that_drift_apart_are_told(worlds: Worlds, kind: str, tmp_path: Path) -> None:
    for before, after, again in worlds[2].run(drifting, kind, tmp_path):
        assert "parameter" not in before + again
        assert re.search(r"parameter \S*(weight|bias) is not sharded but differs between", after)
        assert ("parameter 1." in after) or kind == "plain"
        assert "are their gradients averaged?" in after


def pickled(mode: str) -> None:
    """As with torch.save on rank 0, a habit under DDP."""
    run = build(mode)
    ema = ShardedEMA(run.target, 0.9, **run.options)
    with pytest.warns(EMAWarning, match="keeps this rank's pieces only; save it with"):
        torch.save(ema.state_dict(), io.BytesIO())
    whole = ShardedEMA(run.target, 0.9, shard_replicas=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error", EMAWarning)
        copy.deepcopy(ema.state_dict())
        torch.save(whole.state_dict(), io.BytesIO())


def test_a_pickle_of_pieces_is_warned_of(worlds: Worlds) -> None:
    worlds[2].run(pickled, "ddp")


def never_attached() -> tuple[str, str]:
    run = build("ddp")
    ema = ShardedEMA(run.target, 0.9, timeout=2.0)
    found = ("nothing", "")
    if rank() == 0:
        found = error_of(lambda: ema.swap().__enter__())
    dist.barrier()
    group = dist.new_group(backend="gloo")  # the user's own groups still work
    dist.barrier(group=group)
    with ema.swap():  # and so does the average, once everybody comes
        pass
    ema.close()
    return found


def test_a_rank_missing_at_the_first_meeting_harms_nothing(worlds: Worlds) -> None:
    found = worlds[3].run(never_attached)
    assert found[0][0] == AbsentRankError.__name__
    assert "Ranks [1, 2] are missing" in found[0][1]


def one_rank_fails_oddly(folder: str) -> tuple[str, str]:
    run = build("fsdp2")
    ema = ShardedEMA(run.target, 0.9)
    ema.save(Path(folder) / "good", step=1)
    found = error_of(lambda: ema.load(Path(folder) / ("good" if rank() == 0 else "y" * 300)))
    assert ema.load(Path(folder) / "good") == 1
    ema.close()
    return found


def test_any_failure_of_one_rank_reaches_all(worlds: Worlds, tmp_path: Path) -> None:
    for name, message in worlds[2].run(one_rank_fails_oddly, str(tmp_path)):
        assert name != "nothing"
        assert "rank 1" in message


def distances(mode: str) -> tuple[float, float]:
    run = build(mode)
    ema = ShardedEMA(run.target, 0.9, **run.options)
    ema.attach(run.optimizer)
    for index in range(3):
        run.step(index)
    average, live = averages(ema), run.gather()
    apart = sum(float((average[n].double() - live[n].double()).square().sum()) for n in live)
    norm = sum(float(live[n].double().square().sum()) for n in live)
    found = ema.metrics(distance=True)["ema/distance/ema"]
    ema.close()
    return found, (apart / norm) ** 0.5


@pytest.mark.parametrize("mode", ["fsdp2", "ddp", "hsdp", "hsdp_whole", "tp_fsdp2", "fsdp1"])
def test_distance_counts_every_element_once(worlds: Worlds, mode: str) -> None:
    (size,) = sizes(mode, [3])
    for found, expected in worlds[size].run(distances, mode):
        assert found == pytest.approx(expected, rel=1e-12)
