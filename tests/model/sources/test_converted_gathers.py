"""Parameters that FSDP2 gathers in another dtype: a tensor subclass holds the shard that trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils._pytree import tree_map_only

from sharded_ema import ShardedEMA
from sharded_ema.errors import UnsupportedLayoutError
from tests.helpers.layouts import rank, world
from tests.helpers.pool import WorkerPool

Worlds = dict[int, WorkerPool]

# Operations of fully_shard and of optimizers, whose result is of the subclass again.
KEPT = (
    "empty_like", "new_zeros", "new_empty", "slice", "copy_", "view", "as_strided", "_to_copy",
    "split", "clone", "detach",
)  # fmt: skip


class GatheredLow(Tensor):
    """Gathered in bfloat16, as weights for float8 matrix products are in float8, with a scale."""

    @staticmethod
    def __new__(cls, shard: Tensor, scale: Tensor | None = None) -> GatheredLow:
        return Tensor._make_wrapper_subclass(  # type: ignore[attr-defined, no-any-return]
            cls, shard.shape, strides=shard.stride(), dtype=cls.shown(shard), device=shard.device
        )

    @classmethod
    def shown(cls, shard: Tensor) -> torch.dtype:
        return shard.dtype

    def __init__(self, shard: Tensor, scale: Tensor | None = None) -> None:
        self.shard = shard
        self.scale = torch.ones(()) if scale is None else scale

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["scale", "shard"], None

    @classmethod
    def __tensor_unflatten__(cls, inner: Any, meta: Any, size: Any, stride: Any) -> GatheredLow:
        return cls(inner["shard"], inner["scale"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any, kwargs: Any = None) -> Any:
        found = func(*tree_map_only(cls, lambda t: t.shard, args), **(kwargs or {}))
        kept = func.overloadpacket.__name__ in KEPT
        return tree_map_only(Tensor, cls, found) if kept else found

    def fsdp_pre_all_gather(self, *args: Any) -> tuple[tuple[Tensor, ...], None]:
        return (self.shard.to(torch.bfloat16),), None

    def fsdp_post_all_gather(
        self, outputs: Any, metadata: Any, dtype: Any, *, out: Any = None
    ) -> Any:
        return None if out is not None else (outputs[0], outputs)


class Quantised(GatheredLow):
    """Whose elements no plain tensor of its dtype holds."""

    @classmethod
    def shown(cls, shard: Tensor) -> torch.dtype:
        return torch.float64


def build(kind: type[GatheredLow], shape: tuple[int, ...]) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12, bias=False), nn.Linear(12, 6, bias=False))
    for layer in model:
        layer.weight = nn.Parameter(kind(layer.weight.detach()))  # type: ignore[assignment]
    model[1].weight.requires_grad_(False)
    axes = ("replicate", "shard")[-len(shape) :]
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=axes)
    for layer in model:
        fully_shard(layer, mesh=mesh)
    return model


def shard_of(parameter: Any) -> Tensor:
    found: Tensor = parameter._local_tensor.shard
    return found


def averaged(shape: tuple[int, ...], path: Path) -> None:
    model = build(GatheredLow, shape)
    ema = ShardedEMA(model, 0.5, timeout=60)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1,
                                foreach=False)  # fmt: skip
    ema.attach(optimizer)
    weight: Any = model[0].weight  # type: ignore[index]
    loop = shard_of(weight).detach().clone()
    for step in range(3):
        x = torch.randn(4, 6, generator=torch.Generator().manual_seed(10 * step + rank()))
        model(x.bfloat16()).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        loop.lerp_(shard_of(weight).detach(), 0.5)
    before = shard_of(weight).detach().clone()
    with ema.swap():
        assert torch.equal(shard_of(weight), loop)
    assert torch.equal(shard_of(weight), before) and not torch.equal(before, loop)
    assert type(weight._local_tensor) is GatheredLow
    for format in ("safetensors", "dcp"):
        ema.save(path / format, step=3, format=format)
        ema.reseed()
        assert ema.load(path / format, verify=True) == 3
        with ema.swap():
            assert torch.equal(shard_of(weight), loop)
    assert torch.equal(shard_of(weight), before)
    ema.copy_to()
    assert torch.equal(shard_of(weight), loop)


@pytest.mark.parametrize(("size", "shape"), [(2, (2,)), (3, (3,)), (4, (2, 2))])
def test_the_shard_inside_is_averaged(
    worlds: Worlds, size: int, shape: tuple[int, ...], tmp_path: Path
) -> None:
    worlds[size].run(averaged, shape, tmp_path)


def refused() -> None:
    model = build(Quantised, (world(),))
    with pytest.raises(UnsupportedLayoutError, match=r"0\.weight is a Quantised.*pre_all_gather"):
        ShardedEMA(model)


def test_one_that_holds_no_such_shard_is_refused(worlds: Worlds) -> None:
    worlds[2].run(refused)
