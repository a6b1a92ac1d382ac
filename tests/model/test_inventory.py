"""A model that changes after its average was made: followed, or refused by name, never stale."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from sharded_ema import ShardedEMA
from sharded_ema.errors import BindError, EMAWarning, StateError


class Embedder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(6, 4)
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 6)
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)


def move(net: Embedder) -> None:
    with torch.no_grad():
        for index, parameter in enumerate(net.parameters()):
            parameter += index + 1


FOLLOWED: dict[str, Callable[[Embedder], object]] = {
    "float64": lambda net: net.double(),
    "bfloat16": lambda net: net.bfloat16(),
    "there and back": lambda net: net.double().bfloat16().float(),
    "new memory": lambda net: net._apply(torch.clone),
    "data": lambda net: setattr(net.head.weight, "data", torch.randn(6, 4)),
    "loaded in place": lambda net: net.load_state_dict(
        {k: v + 1 for k, v in net.state_dict().items()}
    ),
    "wrapped": lambda net: setattr(net, "head", checkpoint_wrapper(net.head)),
}


@pytest.mark.filterwarnings("ignore:.*buffers with running statistics")  # loaded, too
@pytest.mark.parametrize("change", FOLLOWED)
def test_followed(change: str, tmp_path: Path) -> None:
    net = Embedder()
    ema = ShardedEMA(net, 0.5)
    tensors = {n: p for n, p in net.named_parameters() if p.requires_grad}
    expected = {n: p.detach().clone() for n, p in tensors.items()}
    for round_ in range(3):
        if round_:
            FOLLOWED[change](net)
        move(net)
        ema.update()
        for name, parameter in tensors.items():
            expected[name].lerp_(parameter.detach().float(), 0.5)
    state = ema.state_dict()
    assert all(torch.equal(state[f"ema.{n}"], t) for n, t in expected.items())
    before = {n: p.detach().clone() for n, p in tensors.items()}
    with ema.swap():
        for name, parameter in tensors.items():
            assert torch.equal(parameter, expected[name].to(parameter.dtype))
    assert all(torch.equal(p, before[n]) for n, p in tensors.items())
    ema.save(tmp_path / "x", step=3)
    assert ema.load(tmp_path / "x") == 3


def resized(net: Embedder, rows: int) -> None:
    """As libraries resize embeddings: a module in the place of another."""
    new = nn.Embedding(rows, 4)
    with torch.no_grad():
        new.weight[:6] = net.embed.weight[:rows]
    net.embed = new


def resized_in_place(net: Embedder) -> None:
    net.embed.weight = nn.Parameter(torch.cat([net.embed.weight.detach(), torch.zeros(2, 4)]))


def tied_afterwards(net: Embedder) -> None:
    net.head.weight = net.embed.weight


REFUSED: dict[str, tuple[Callable[[Embedder], object], str]] = {
    "assign": (
        lambda net: net.load_state_dict(
            {k: v.clone() for k, v in net.state_dict().items()}, assign=True
        ),
        "parameter embed.weight",
    ),
    "larger embedding": (lambda net: resized(net, 8), "parameter embed.weight"),
    "other embedding of the same size": (lambda net: resized(net, 6), "parameter embed.weight"),
    "resized in place": (resized_in_place, "parameter embed.weight"),
    "other head": (lambda net: setattr(net, "head", nn.Linear(4, 6)), "parameter head.weight"),
    "no head": (lambda net: delattr(net, "head"), "parameter head.weight"),
    "tied": (tied_afterwards, "parameter head.weight"),
    "other frozen": (
        lambda net: setattr(net, "frozen", nn.Parameter(torch.ones(3), requires_grad=False)),
        "parameter frozen",
    ),
    "other statistics": (
        lambda net: setattr(net, "norm", nn.BatchNorm1d(4, affine=False)),
        "parameter norm.weight",
    ),
}


@pytest.mark.parametrize("change", REFUSED)
def test_refused_by_name(change: str, tmp_path: Path) -> None:
    net = Embedder()
    ema = ShardedEMA(net, 0.5)
    move(net)
    ema.update()
    apply, name = REFUSED[change]
    apply(net)
    for use in (
        lambda: ema.swap().__enter__(),
        ema.copy_to,
        ema.state_dict,
        lambda: ema.save(tmp_path / "x", step=1),
        lambda: ema.metrics(distance=True),
    ):
        with pytest.raises(BindError, match=f"{name} was replaced after the average was made"):
            use()
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("change", ["assign", "resized in place", "tied"])
def test_refused_at_the_next_update(change: str) -> None:
    """The average would go on with a parameter that is no longer the model's."""
    net = Embedder()
    ema = ShardedEMA(net, 0.5)
    move(net)
    ema.update()
    (embed, *_), before = net.parameters(), embed_average(ema).clone()
    apply, name = REFUSED[change]
    apply(net)
    with torch.no_grad():
        embed.add_(1)
    for _ in range(2):
        with pytest.raises(BindError, match=f"{name} was replaced after the average was made"):
            ema.update()
    assert ema.num_updates == 1
    assert torch.equal(embed_average(ema), before)


def embed_average(ema: ShardedEMA) -> torch.Tensor:
    return ema._average.shadow.views["ema"][ema.names.index("embed.weight")]


def test_buffers_of_a_module_that_is_gone(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2, affine=False))
    ema = ShardedEMA(net, 0.5)
    net[1] = nn.BatchNorm1d(2, affine=False)
    with pytest.raises(BindError, match=r"buffer 1\.running_mean was replaced"):
        ema.save(tmp_path / "x", step=1)


def test_data_of_another_shape_is_refused_at_the_next_update() -> None:
    net = Embedder()
    ema = ShardedEMA(net, 0.5)
    net.embed.weight.data = torch.randn(8, 4)
    with pytest.raises(StateError, match=r"parameter embed\.weight had local shape \(6, 4\)"):
        ema.update()


# ---------------------------------------------------------------------- what was not there before


def thawed(net: Embedder) -> None:
    net.frozen.requires_grad_(True)


def grown(net: Embedder) -> None:
    net.probe = nn.Linear(4, 1)


def remembering(net: Embedder) -> None:
    net.norm.register_buffer("seen", torch.zeros(1))


LEFT_OUT: dict[str, tuple[Callable[[Embedder], None], str]] = {
    "thawed": (thawed, r"1 parameters that were frozen .* among them \['frozen'\]"),
    "grown": (grown, r"2 .* were added .* among them \['probe.weight', 'probe.bias'\]"),
    "remembering": (remembering, r"1 .* were added .* among them \['norm.seen'\]"),
}


@pytest.mark.parametrize("change", LEFT_OUT)
def test_what_is_left_out_is_told_once(change: str, tmp_path: Path) -> None:
    net = Embedder()
    ema = ShardedEMA(net, 0.04)
    move(net)
    ema.update()
    ema.save(tmp_path / "before", step=1)
    apply, message = LEFT_OUT[change]
    apply(net)
    with pytest.warns(EMAWarning, match=message):
        ema.save(tmp_path / "after", step=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with ema.swap():
            pass
        again = ShardedEMA(net, 0.04)
        assert again.load(tmp_path / "before", strict=False) == 1
        again.save(tmp_path / "again", step=1)
    old, new = ema.state_dict(), again.state_dict()
    assert len(new) > len(old) or change == "thawed"
    assert all(torch.equal(new[name], old[name]) for name in old if name.startswith("ema."))


def test_buffers_that_are_not_stored_may_come_later() -> None:
    net = Embedder()
    ema = ShardedEMA(net, 0.5, buffers="ignore")
    remembering(net)
    net.norm.register_buffer("scratch", torch.zeros(1), persistent=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ema.state_dict()


def test_a_name_that_changed_is_refused() -> None:
    """As adapters do: the layer is still there, inside another."""
    net = Embedder()
    ema = ShardedEMA(net, 0.5)
    net.head = nn.Sequential(net.head)  # type: ignore[assignment]
    with pytest.raises(BindError, match=r"parameter head\.weight was replaced"):
        ema.state_dict()
