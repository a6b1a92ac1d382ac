"""Swaps of models whose adapters are merged into the weights under them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from sharded_ema import ShardedEMA
from sharded_ema.errors import BindError, SwapError
from tests.helpers.layouts import assert_equal, world
from tests.helpers.pool import WorkerPool

peft = pytest.importorskip("peft", reason="PEFT is not installed: pip install 'sharded-ema[test]'")

Worlds = dict[int, WorkerPool]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(torch.tanh(self.first(x))))


def with_peft(config: str = "LoraConfig", **options: Any) -> Any:
    torch.manual_seed(0)
    kind = getattr(peft, config)
    options.setdefault("target_modules", ["first", "second"])
    model = peft.get_peft_model(Net(), kind(**options))
    with torch.no_grad():  # adapters begin as nothing
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) / 4)
    return model


class MergingLinear(nn.Linear):
    """As in loralib: the layer is its own base, and is merged while the model is evaluated."""

    def __init__(self) -> None:
        super().__init__(4, 4)
        self.weight.requires_grad_(False)
        self.lora_A = nn.Parameter(torch.randn(2, 4) / 4)
        self.lora_B = nn.Parameter(torch.randn(4, 2) / 4)
        self.merged = False

    def train(self, mode: bool = True) -> MergingLinear:
        super().train(mode)
        if self.merged == mode:
            delta = self.lora_B.data @ self.lora_A.data
            self.weight.data += -delta if mode else delta
            self.merged = not mode
        return self

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        return out if self.merged else out + x @ (self.lora_B @ self.lora_A).T


def with_loralib() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(MergingLinear(), nn.Linear(4, 2))


MODELS: dict[str, tuple[Callable[[], Any], Callable[[Any], object], Callable[[Any], object]]] = {
    "loralib": (with_loralib, nn.Module.eval, nn.Module.train),
    **{
        config: (
            lambda config=config, options=options: with_peft(config, **options),
            lambda model: model.merge_adapter(),
            lambda model: model.unmerge_adapter(),
        )
        for config, options in {
            "LoraConfig": {"r": 2},
            "LoHaConfig": {"r": 2},
            "VBLoRAConfig": {"r": 2, "num_vectors": 4, "vector_length": 2, "topk": 2},
        }.items()
    },
}
x = torch.linspace(-1, 1, 12).view(3, 4)


def trained(model: Any) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def prepare(model: Any) -> tuple[ShardedEMA, Tensor, Tensor]:
    """An average away from the weights, and what the model computes with each."""
    ema = ShardedEMA(model, 0.9)
    with torch.no_grad():
        average = model(x)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.5)
        raw = model(x)
    assert not torch.allclose(raw, average, atol=1e-3)
    return ema, average, raw


@pytest.mark.parametrize("kind", MODELS)
@torch.no_grad()
def test_merged_adapters_are_refused(kind: str) -> None:
    make, merge, unmerge = MODELS[kind]
    model = make()
    ema, average, raw = prepare(model)
    merge(model)
    before = trained(model)
    for what, use in (("swap()", lambda: ema.swap().__enter__()), ("copy_to()", ema.copy_to)):
        with pytest.raises(
            SwapError, match=r"adapters are merged, as in \S*(first|0).*[Uu]nmerge"
        ) as c:
            use()
        assert str(c.value).startswith(f"{what} is not allowed")
    assert_equal(trained(model), before)
    ema.state_dict()  # of the averages, which no adapter has been added to
    unmerge(model)
    with ema.swap():
        assert torch.allclose(model(x), average, atol=1e-5)
        merge(model)
        assert torch.allclose(model(x), average, atol=1e-5)
        unmerge(model)
    assert torch.allclose(model(x), raw, atol=1e-5)
    assert_equal(trained(model), before)
    ema.copy_to()
    assert torch.allclose(model(x), average, atol=1e-5)


@pytest.mark.parametrize("kind", MODELS)
@torch.no_grad()
def test_what_is_merged_in_a_swap_and_left_so_is_named(kind: str) -> None:
    make, merge, _ = MODELS[kind]
    model = make()
    ema, *_ = prepare(model)
    before = trained(model)
    with (
        pytest.raises(SwapError, match=r"merged inside the swap\(\) block and are still") as caught,
        ema.swap(),
    ):
        merge(model)
    assert "Load the base weights again" in str(caught.value)
    assert_equal(trained(model), before)
    ema.update()  # the swap has ended
    model = make()
    ema, *_ = prepare(model)
    with pytest.raises(KeyError) as failure, ema.swap():
        merge(model)
        raise KeyError
    assert "merged inside the swap() block" in failure.value.__notes__[0]
    assert_equal(trained(model), before)


@torch.no_grad()
def test_adapters_that_are_merged_and_taken_away_in_a_swap() -> None:
    model = with_peft(r=2)
    ema, *_ = prepare(model)
    with pytest.raises(BindError, match=r"changed the model.*was replaced"), ema.swap():
        model.merge_and_unload()
    model = with_peft(r=2)
    ema, *_ = prepare(model)
    with pytest.raises(KeyError) as failure, ema.swap():
        model.merge_and_unload()
        raise KeyError
    assert "block has changed the model" in failure.value.__notes__[0]


@torch.no_grad()
def test_what_is_merged_for_good_beside_what_is_averaged() -> None:
    model = with_peft(r=2, modules_to_save=["head"])
    ema = ShardedEMA(model, 0.9, include="*head*")
    model.merge_adapter()
    want = model(x)
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.shape[0] == 2 and parameter.dim() == 1:
            parameter.add_(1)  # the bias of the head
    with ema.swap():
        assert torch.allclose(model(x), want)
    marked = nn.Linear(2, 2)
    marked.merged = True  # type: ignore[assignment]
    with ShardedEMA(marked, 0.9).swap():
        pass


def sharded() -> str:
    model = with_peft(r=2)
    fully_shard(model, mesh=init_device_mesh("cpu", (world(),)))
    ema = ShardedEMA(model, 0.9)
    model.merge_adapter()
    with pytest.raises(SwapError) as caught:
        ema.swap().__enter__()
    model.unmerge_adapter()
    with ema.swap():
        pass
    ema.close()
    return str(caught.value)


def test_merged_adapters_of_a_sharded_model(worlds: Worlds) -> None:
    for said in worlds[2].run(sharded):
        assert "as in base_model.model.first and 1 more" in said
