"""Where warnings point to: the line of the user's program, whatever lies between."""

from __future__ import annotations

import ast
import runpy
import textwrap
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from sharded_ema import ShardedEMA
from sharded_ema.errors import EMAWarning, user_line, warn
from tests.helpers.pool import WorkerPool

PACKAGE = Path(__file__).parents[1] / "sharded_ema"


def moved(model: nn.Linear) -> None:
    with torch.no_grad():
        model.weight.add_(1)


def an_attached_average(model: nn.Linear) -> tuple[ShardedEMA, torch.optim.Optimizer]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ema = ShardedEMA(model, 0.9)
    ema.attach(optimizer)
    return ema, optimizer


def prepared(topic: str, folder: Path) -> Callable[[], object]:
    """A call, alone on its line, that is warned of."""
    model = nn.Linear(4, 4)
    parameters = torch.optim.SGD([model.weight], lr=0.1)
    if topic == "a long horizon":
        return lambda: ShardedEMA(model, 0.9999, total_steps=100)
    if topic == "a buffer of half-precision complex numbers":
        model.register_buffer("phase", torch.zeros(2, dtype=torch.complex32))
        return lambda: ShardedEMA(model, 0.9)
    if topic == "NaN as it starts":
        model.weight.data[0, 0] = torch.nan
        return lambda: ShardedEMA(model, 0.9)
    if topic == "force_dtype":
        return lambda: ShardedEMA(model, 0.9, force_dtype=True)
    if topic == "an orphan":
        ema = ShardedEMA(model, 0.9)
        return lambda: ema.attach(parameters)
    if topic == "update() although attached":
        ema, _ = an_attached_average(model)
        return lambda: ema.update()
    if topic == "a step that nobody counted":
        ema, _ = an_attached_average(model)
        moved(model)
        return lambda: ema.metrics()
    if topic == "weights loaded before the first step":
        _, optimizer = an_attached_average(model)
        moved(model)
        return lambda: optimizer.step()
    if topic == "weights edited between steps":
        _, optimizer = an_attached_average(model)
        model(torch.ones(1, 4)).sum().backward()
        optimizer.step()
        moved(model)
        return lambda: optimizer.step()
    if topic == "new tensors, in a swap":
        ema = ShardedEMA(model, 0.9)
        model.extra = nn.Linear(2, 2)
        return lambda: ema.swap().__enter__()
    if topic == "an average that stands still":
        ema = ShardedEMA(model, 1.0)
        for _ in range(20):
            moved(model)
            ema.update()
        return lambda: ema.metrics()
    if topic == "an average that is its seed":
        ema = ShardedEMA(model, 0.999)
        moved(model)
        ema.update()
        return lambda: ema.close()
    if topic == "a new profile":
        ShardedEMA(model, 0.9).save(folder / "one", step=1)
        ema = ShardedEMA(model, {"ema": 0.9, "more": 0.99})
        return lambda: ema.load(folder / "one", strict=False)
    if topic == "NaN kept out, in a save":
        ema = ShardedEMA(model)
        model.weight.data[0, 0] = torch.nan
        for _ in range(4):  # until its seed is forgotten
            ema.update()
        return lambda: ema.save(folder / "one", step=1)
    raise ValueError(topic)


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
@pytest.mark.parametrize(
    "topic",
    [
        "a long horizon",
        "a buffer of half-precision complex numbers",
        "NaN as it starts",
        "force_dtype",
        "an orphan",
        "update() although attached",
        "a step that nobody counted",
        "weights loaded before the first step",
        "weights edited between steps",
        "new tensors, in a swap",
        "an average that stands still",
        "an average that is its seed",
        "a new profile",
        "NaN kept out, in a save",
    ],
)
def test_a_warning_points_at_the_users_line(topic: str, tmp_path: Path) -> None:
    call = prepared(topic, tmp_path)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        call()
    (warning,) = [w for w in seen if issubclass(w.category, EMAWarning | DeprecationWarning)]
    assert (warning.filename, warning.lineno) == (__file__, call.__code__.co_firstlineno)


def test_a_warning_from_the_thread_of_a_save_points_at_the_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(location: Path, count: int) -> None:
        raise OSError("out of reach")

    monkeypatch.setattr("sharded_ema.checkpoint.removal.remove_outdated", fail)
    ema = ShardedEMA(nn.Linear(2, 2), 0.9)
    for asynchronous in (False, True):
        path = tmp_path / str(asynchronous)
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            line = user_line().number + 1
            handle = ema.save(path, step=1, asynchronous=asynchronous, keep_last=1)
            handle.result()
        assert [(w.filename, w.lineno) for w in seen] == [(__file__, line)]
        assert "out of reach" in str(seen[0].message)


def test_the_line_of_a_script_without_a_package(tmp_path: Path) -> None:
    """As torchrun and notebooks run one: by compiled code in a namespace of its own."""
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent("""
        from torch import nn
        from sharded_ema import ShardedEMA
        ShardedEMA(
            nn.Linear(2, 2), 0.9999, total_steps=100)
        """)
    )
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        runpy.run_path(str(script), run_name="__main__")
        exec(compile(script.read_text(), "<cell>", "exec"), {})
    assert [(w.filename, w.lineno) for w in seen] == [(str(script), 4), ("<cell>", 4)]


def test_filters_see_the_users_module() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", module=__name__.replace(".", r"\."))
        with pytest.raises(EMAWarning, match="here"):
            warn("here")


def test_every_warning_goes_through_one_function() -> None:
    found = [
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr in ("warn", "warn_explicit")
    ]
    assert found == ["errors.py"]


# ---------------------------------------------------------------------- calls that do nothing


def test_a_swap_that_is_not_entered_warns_at_its_line() -> None:
    ema = ShardedEMA(nn.Linear(2, 2), 0.9)
    call = lambda: ema.swap()  # noqa: E731
    with pytest.warns(EMAWarning, match=r"write 'with ema\.swap\(\):'") as seen:
        call()
    where = (__file__, call.__code__.co_firstlineno)
    assert [(w.filename, w.lineno) for w in seen] == [where]


def test_swaps_that_are_entered_are_silent() -> None:
    model = nn.Linear(2, 2)
    ema = ShardedEMA(model, 0.5)
    raw = model.weight.detach().clone().round()
    with torch.no_grad():
        model.weight.copy_(raw)
        ema.reseed()
        model.weight.add_(1)
    ema.update()

    @ema.swap()
    def evaluate() -> torch.Tensor:
        return model.weight.detach().clone()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", message="swap")
        with ema.swap():
            assert torch.equal(model.weight, raw + 0.5)
        later = ema.swap()
        with later:
            assert torch.equal(model.weight, raw + 0.5)
        for _ in range(2):
            assert torch.equal(evaluate(), raw + 0.5)
        assert torch.equal(model.weight, raw + 1)


# ---------------------------------------------------------------------- ranks that do not share


def test_processes_without_a_process_group_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer = torch.optim.SGD((model := nn.Linear(2, 2)).parameters(), lr=0.1)
    ShardedEMA(model, 0.9).attach(optimizer).remove()  # alone, and silent
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.warns(EMAWarning, match="one of several that a launcher has started"):
        ShardedEMA(model, 0.9).attach(optimizer).remove()
    monkeypatch.setenv("RANK", "1")  # once for the job
    ShardedEMA(model, 0.9).attach(optimizer).remove()


def plain_on_every_rank(wrapped: bool) -> list[str]:
    model = nn.Linear(2, 2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0)
    target = DistributedDataParallel(model) if wrapped else model
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        ema = ShardedEMA(target, 0.9)
        ema.attach(torch.optim.SGD(model.parameters(), lr=0.1))
        ema.metrics()
    ema.close()
    dist.barrier()
    return [str(w.message) for w in seen if w.category is EMAWarning]


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_plain_module_on_every_rank_is_warned_of(
    worlds: dict[int, WorkerPool], wrapped: bool
) -> None:
    for found in worlds[2].run(plain_on_every_rank, wrapped):
        assert len(found) == (not wrapped)
        assert all("is a plain module on each of 2 ranks" in said for said in found)
