"""Private members of frameworks: listed, looked for, and refused by name where they are gone."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from sharded_ema import ShardedEMA
from sharded_ema.errors import FrameworkVersionError
from sharded_ema.model.internals.members import Members, imported
from tests.helpers.layouts import world
from tests.helpers.pool import WorkerPool

Worlds = dict[int, WorkerPool]
FILES = ("pytorch", "fsdp1", "fsdp2", "deepspeed")


def tables() -> Iterator[tuple[str, Members]]:
    for file in FILES:
        module = importlib.import_module(f"sharded_ema.model.internals.{file}")
        for name, value in vars(module).items():
            if isinstance(value, Members):
                yield f"{file}.{name}", value


@pytest.mark.parametrize(("name", "members"), tables(), ids=lambda v: v if type(v) is str else "")
def test_each_listed_member_is_missed_by_name(name: str, members: Members) -> None:
    class Thing:
        pass

    whole = Thing()
    for member in members.names:
        setattr(whole, member, None)
    members.check(whole)
    for member in members.names:
        delattr(whole, member)
        with pytest.raises(FrameworkVersionError, match=f"has no '{member}'.* was seen in "):
            members.check(whole)
        setattr(whole, member, None)


def test_a_name_that_a_module_does_not_have() -> None:
    with pytest.raises(FrameworkVersionError, match=r"no torch\._nothing\.f.*in PyTorch 0"):
        imported("torch._nothing", "f", "PyTorch 0")
    with pytest.raises(FrameworkVersionError, match=r"there is no torch\._nothing,"):
        imported("torch", "_nothing", "PyTorch 0")


@contextmanager
def hidden(owner: Any, name: str) -> Iterator[None]:
    value = owner.__dict__[name]
    delattr(owner, name)
    try:
        yield
    finally:
        setattr(owner, name, value)


def refusal(make: Callable[[], nn.Module]) -> str:
    try:
        ShardedEMA(make())
    except FrameworkVersionError as error:
        return str(error)
    return "nothing"


def hide_of_dtensors() -> str:
    def make() -> nn.Module:
        model = nn.Sequential(nn.Linear(3, 4))
        fully_shard(model, mesh=init_device_mesh("cpu", (world(),)))
        return model

    model = make()
    with hidden(DTensor, "__create_chunk_list__"):
        return refusal(lambda: model)


def hide_of_fsdp2() -> str:
    model = nn.Sequential(nn.Linear(3, 4))
    fully_shard(model, mesh=init_device_mesh("cpu", (world(),)))
    state = model._get_fsdp_state()  # type: ignore[operator]
    with hidden(state, "_state_ctx"):
        return refusal(lambda: model)


def hide_of_fsdp1() -> str:
    model = FSDP(nn.Sequential(nn.Linear(3, 4)), device_id=torch.device("cpu"))
    flat: Any = model._handle.flat_param  # type: ignore[union-attr]
    with hidden(flat, "_shard_param_infos"):
        return refusal(lambda: model)


@pytest.mark.parametrize(
    ("hide", "member"),
    [
        (hide_of_dtensors, "__create_chunk_list__"),
        (hide_of_fsdp2, "_state_ctx"),
        (hide_of_fsdp1, "_shard_param_infos"),
    ],
)
def test_a_framework_without_one_is_refused(
    worlds: Worlds, hide: Callable[[], str], member: str
) -> None:
    for said in worlds[2].run(hide):
        assert f"has no '{member}'" in said and "PyTorch 2.8 to 2.13" in said
