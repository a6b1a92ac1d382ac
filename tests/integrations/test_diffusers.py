"""diffusers' EMAModel over our core: its behaviour, its numbers, and what it does when sharded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from sharded_ema import EMAWarning
from sharded_ema.errors import AbsentRankError, ConfigError
from sharded_ema.integrations.diffusers import EMAModel
from tests.helpers.layouts import assert_equal, rank, reference_step
from tests.helpers.pool import WorkerPool
from tests.integrations.facades import (
    ON_CPUS,
    UNET,
    Training,
    assert_list,
    killed_and_resumed,
    shown,
)
from tests.launch.programs import execute, torchrun

Worlds = dict[int, WorkerPool]
SETTINGS: list[dict[str, Any]] = [
    {},
    {"decay": 0.9},
    {"use_ema_warmup": True},
    {"use_ema_warmup": True, "power": 0.75, "update_after_step": 10, "min_decay": 0.3},
    {"decay": 0.95, "update_after_step": 20, "foreach": True},
]


def make_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8))


def changed(net: nn.Module) -> None:
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.randn_like(parameter))


@pytest.fixture(scope="module")
def unet_class() -> Any:
    return pytest.importorskip("diffusers", reason="pip install diffusers").UNet2DModel


def make_unet(unet_class: Any) -> Any:
    torch.manual_seed(0)
    return unet_class(**UNET)


# ---------------------------------------------------------------------- its numbers


@pytest.mark.shows("diffusers", "one process")
@pytest.mark.parametrize("settings", SETTINGS)
def test_numbers_of_the_installed_package(settings: dict[str, Any]) -> None:
    """Over 200 steps the decays are the same to the bit. diffusers rounds an update twice and we
    once, which moves the last place: 1.2e-7 of weights of about 1."""
    theirs_of = pytest.importorskip("diffusers.training_utils", reason="pip install diffusers")
    net = make_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    theirs = theirs_of.EMAModel(net.parameters(), **settings)
    ours = EMAModel(net.parameters(), **settings)
    for _ in range(200):
        x = torch.randn(16, 8)
        (net(x) - x.flip(1)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        theirs.step(net.parameters())
        ours.step(net.parameters())
        assert ours.cur_decay_value == theirs.cur_decay_value
        assert ours.ema.decay["ema"] == theirs.cur_decay_value
    assert ours.optimization_step == theirs.optimization_step == 200
    pairs = list(zip(ours.shadow_params, theirs.shadow_params, strict=True))
    far = max(float((a - b).abs().max()) for a, b in pairs)
    assert far <= 2.4e-7
    plain, state = ours.state_dict(), theirs.state_dict()
    assert {**plain, "shadow_params": 0} == {**state, "shadow_params": 0}


# ---------------------------------------------------------------------- its behaviour


def test_an_unchanged_model_leaves_the_average_as_it_is() -> None:
    net = make_net()
    ema = EMAModel(net.parameters())
    for step in range(1, 5):
        ema.step(net.parameters())
        assert ema.optimization_step == step
    for value, parameter in zip(ema.shadow_params, net.parameters(), strict=True):
        assert torch.equal(value, parameter)


def test_each_changed_model_moves_the_average() -> None:
    net = make_net()
    ema = EMAModel(net.parameters())
    ema.step(net.parameters())
    for _ in range(3):
        before = [value.clone() for value in ema.shadow_params]
        changed(net)
        ema.step(net.parameters())
        for value, old, parameter in zip(ema.shadow_params, before, net.parameters(), strict=True):
            assert not torch.equal(value, old) and not torch.equal(value, parameter)


def test_without_decay_it_is_the_model() -> None:
    net = make_net()
    ema = EMAModel(net.parameters(), decay=0.0)
    for _ in range(3):
        changed(net)
        ema.step(net.parameters())
        for value, parameter in zip(ema.shadow_params, net.parameters(), strict=True):
            assert torch.equal(value, parameter)


def test_frozen_parameters_are_copied() -> None:
    net = make_net()
    net[0].requires_grad_(False)
    ema = EMAModel(net.parameters())
    ema.step(net.parameters())
    changed(net)
    ema.step(net.parameters())
    assert len(ema.shadow_params) == 4
    assert torch.equal(ema.shadow_params[0], net[0].weight)
    assert not torch.equal(ema.shadow_params[2], net[2].weight)


def test_store_copy_to_restore() -> None:
    net = make_net()
    ema = EMAModel(net.parameters())
    with pytest.raises(RuntimeError, match="store"):
        ema.restore(net.parameters())
    for _ in range(3):
        changed(net)
        ema.step(net.parameters())
    weights = [p.detach().clone() for p in net.parameters()]
    ema.store(net.parameters())
    ema.copy_to(net.parameters())
    for parameter, value in zip(net.parameters(), ema.shadow_params, strict=True):
        assert torch.equal(parameter, value)
    ema.restore(net.parameters())
    for parameter, weight in zip(net.parameters(), weights, strict=True):
        assert torch.equal(parameter, weight)
    with pytest.raises(RuntimeError, match="store"):
        ema.restore(net.parameters())


def test_into_another_model_and_lists() -> None:
    net, other, more = make_net(), make_net(), make_net()
    ema = EMAModel(list(net.parameters()))
    for _ in range(3):
        changed(net)
        ema.step(list(net.parameters()))
    ema.copy_to(other.parameters())
    ema.copy_to(list(more.parameters()))
    for a, b, value in zip(other.parameters(), more.parameters(), ema.shadow_params, strict=True):
        assert torch.equal(a, value) and torch.equal(b, value)


def test_state_goes_back_and_forth_with_diffusers() -> None:
    theirs_of = pytest.importorskip("diffusers.training_utils", reason="pip install diffusers")
    net = make_net()
    theirs = theirs_of.EMAModel(net.parameters(), decay=0.97, update_after_step=2)
    for _ in range(50):
        changed(net)
        theirs.step(net.parameters())
    ours = EMAModel(make_net().parameters())
    ours.load_state_dict(theirs.state_dict())  # before the first step, as a script resumes
    back = EMAModel(net.parameters())
    back.step(net.parameters())
    back.load_state_dict(theirs.state_dict())  # and after some
    for _ in range(20):
        changed(net)
        for each in (theirs, ours, back):
            each.step(net.parameters())
    assert ours.optimization_step == ours.ema.num_updates == 70
    for a, b, c in zip(ours.shadow_params, back.shadow_params, theirs.shadow_params, strict=True):
        assert torch.equal(a, b)
        assert torch.allclose(a, c, rtol=1e-6, atol=1e-6)
    theirs.load_state_dict(ours.state_dict())
    assert torch.equal(theirs.shadow_params[0], ours.shadow_params[0])


def test_resumed_in_the_middle_it_is_the_same_to_the_bit() -> None:
    net = make_net()
    whole = EMAModel(net.parameters(), use_ema_warmup=True)
    for _ in range(10):
        changed(net)
        whole.step(net.parameters())
    resumed = EMAModel(make_net().parameters())
    resumed.load_state_dict(whole.state_dict())
    for _ in range(10):
        changed(net)
        whole.step(net.parameters())
        resumed.step(net.parameters())
    for a, b in zip(whole.shadow_params, resumed.shadow_params, strict=True):
        assert torch.equal(a, b)


def test_settings_alone_may_be_loaded() -> None:
    net = make_net()
    ema = EMAModel(net.parameters())
    ema.step(net.parameters())
    ema.load_state_dict({"optimization_step": 90, "decay": 0.99})
    before = ema.shadow_params[0].clone()
    changed(net)
    ema.step(net.parameters())
    assert ema.cur_decay_value == ema.ema.decay["ema"] == 91 / 100
    assert torch.equal(ema.shadow_params[0], before.lerp(net[0].weight.detach(), 1 - 91 / 100))


def test_saved_as_a_model_both_libraries_open(unet_class: Any, tmp_path: Path) -> None:
    theirs_of = pytest.importorskip("diffusers.training_utils")
    unet = make_unet(unet_class)
    ema = EMAModel(unet.parameters(), decay=0.9, model_cls=unet_class, model_config=unet.config)
    ema.save_pretrained(tmp_path / "fresh")  # before any step it is the model
    for _ in range(3):
        changed(unet)
        ema.step(unet.parameters())
    weights = [p.detach().clone() for p in unet.parameters()]
    ema.save_pretrained(tmp_path / "ema")
    assert all(map(torch.equal, weights, unet.parameters()))
    ours = EMAModel.from_pretrained(tmp_path / "ema", unet_class)
    theirs = theirs_of.EMAModel.from_pretrained(tmp_path / "ema", unet_class)
    model = unet_class.from_pretrained(tmp_path / "ema")
    for each in (ours, theirs):
        assert (each.decay, each.optimization_step) == (0.9, 3)
    for a, b, p, value in zip(
        ours.shadow_params, theirs.shadow_params, model.parameters(), ema.shadow_params, strict=True
    ):
        assert torch.equal(a, value) and torch.equal(b, value) and torch.equal(p, value)
    for _ in range(3):
        changed(unet)
        for each in (ema, ours, theirs):
            each.step(unet.parameters())
    for a, b, value in zip(
        ours.shadow_params, theirs.shadow_params, ema.shadow_params, strict=True
    ):
        assert torch.equal(a, value) and torch.allclose(b, value, rtol=1e-6, atol=1e-6)
    fresh = EMAModel.from_pretrained(tmp_path / "fresh", unet_class)
    assert all(map(torch.equal, fresh.shadow_params, make_unet(unet_class).parameters()))


def test_settings_that_are_none() -> None:
    net = make_net()
    with pytest.raises(ConfigError, match="decay"):
        EMAModel(net.parameters(), decay=1.5)
    ema = EMAModel(net.parameters())
    for name in ("min_decay", "optimization_step", "update_after_step", "inv_gamma", "power"):
        with pytest.raises(ConfigError, match=name):
            EMAModel(net.parameters()).load_state_dict({name: "much"})
    with pytest.raises(ConfigError, match="2 tensors"):
        ema.load_state_dict({"shadow_params": list(net[0].parameters())})
    with pytest.raises(ConfigError, match="list of tensors"):
        ema.load_state_dict({"shadow_params": [1]})
    with pytest.raises(ConfigError, match="model_cls"):
        ema.save_pretrained("nowhere")
    with pytest.raises(ConfigError, match="first step"):
        _ = ema.ema
    ema.step(net.parameters())
    with pytest.raises(ConfigError, match="that is not the Sequential"):
        ema.step(make_net().parameters())


@pytest.mark.parametrize("given", [[], [torch.zeros(3)], (p for p in [torch.ones(2)])])
def test_what_is_no_parameters(given: Any) -> None:
    with pytest.raises(ConfigError, match=r"pass model\.parameters\(\) itself"):
        EMAModel(given)


def test_what_diffusers_has_deprecated() -> None:
    with pytest.warns(FutureWarning, match="decay="):
        ema = EMAModel(make_net(), max_value=0.7, min_value=0.2)
    assert (ema.decay, ema.min_decay, ema.use_ema_warmup) == (0.7, 0.2, True)


def test_kept_on_the_host_in_another_dtype() -> None:
    net = make_net()
    ema = EMAModel(net.parameters(), decay=0.5)
    ema.pin_memory()
    ema.to(device="cuda", non_blocking=True)  # stays where it is
    ema.step(net.parameters())
    changed(net)
    ema.step(net.parameters())
    before = [value.clone() for value in ema.shadow_params]
    ema.to(dtype=torch.float64)
    assert all(value.dtype == torch.float64 for value in ema.shadow_params)
    assert all(torch.equal(a, b.float()) for a, b in zip(before, ema.shadow_params, strict=True))
    assert ema.ema.num_updates == 2
    with pytest.raises(ConfigError, match="does not move"):
        EMAModel(net.parameters(), shadow_dtype=torch.bfloat16).step(net.parameters())


def test_an_untried_version_warns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sharded_ema.integrations.diffusers.version", lambda package: "0.99.0")
    with pytest.warns(EMAWarning, match=r"diffusers 0\.99\.0"):
        EMAModel(make_net().parameters())


# ---------------------------------------------------------------------- sharded


def as_a_script(mode: str) -> None:
    """A script's calls, on every rank: made of a bare model, stepped with the wrapped one."""
    training = Training(mode)
    names = [name for name, _ in training.bare.named_parameters()]
    ema = EMAModel(training.bare.parameters(), decay=0.6)
    ema.to("cpu")
    average = training.trained()
    for index in range(1, 7):
        training.step(index)
        ema.step(training.model.parameters())
        reference_step(average, training.trained(), 1.0 - ema.get_decay(index))
    assert_list(ema.shadow_params, average, names)
    for _ in range(2):
        before = training.weights()
        ema.store(training.model.parameters())
        ema.copy_to(training.model.parameters())
        for name, now in training.weights().items():
            assert torch.equal(now, average[name].to(now.dtype)), name
        ema.restore(training.model.parameters())
        assert_equal(training.weights(), before)
    resumed = EMAModel(training.bare.parameters())
    resumed.load_state_dict(ema.state_dict())
    for index in range(7, 10):
        training.step(index)
        for each in (ema, resumed):
            each.step(training.model.parameters())
    for a, b in zip(ema.shadow_params, resumed.shadow_params, strict=True):
        assert torch.equal(a, b)
    other = type(training.bare)()
    ema.copy_to(other.parameters())
    assert all(map(torch.equal, ema.shadow_params, other.parameters()))
    ema.ema.close()
    resumed.ema.close()
    training.end()


@pytest.mark.parametrize("mode", shown("diffusers", "ddp", "fsdp1", "fsdp1_flat", "fsdp2"))
def test_as_a_script_uses_it(mode: str, worlds: Worlds) -> None:
    worlds[2].run(as_a_script, mode)


@pytest.mark.parametrize("mode", shown("diffusers", "zero1", "zero2", "zero3"))
def test_as_a_script_uses_it_under_deepspeed(mode: str, engine_worlds: Worlds) -> None:
    engine_worlds[2].run(as_a_script, mode)


def on_the_main_process(mode: str, options: dict[str, bool]) -> str:
    """``if accelerator.is_main_process:`` around a look at the average; then all look together."""
    training = Training(mode)
    ema = EMAModel(training.bare.parameters(), decay=0.6, timeout=3.0, **options)
    for index in range(1, 4):
        training.step(index)
        ema.step(training.model.parameters())
    error = ""
    if rank() == 0:
        try:
            assert len(ema.shadow_params) == len(list(training.bare.parameters()))
            ema.store(training.model.parameters())
            ema.copy_to(training.model.parameters())
            ema.restore(training.model.parameters())
        except AbsentRankError as raised:
            error = str(raised)
    dist.barrier()
    assert len(ema.shadow_params) == len(list(training.bare.parameters()))
    memory = ema.ema.memory["shadow"]
    ema.ema.close()
    return f"{memory} {error}"


def test_rank_0_alone(worlds: Worlds) -> None:
    """Under DDP every rank has all of it, as in diffusers; shared, the message says what to do."""
    alone, _ = worlds[2].run(on_the_main_process, "ddp", {})
    whole, error = alone.split(" ", 1)
    assert not error
    shared, error = (
        worlds[2].run(on_the_main_process, "ddp", {"shard_replicas": True})[0].split(" ", 1)
    )
    assert int(shared) < 0.6 * int(whole)
    assert "take the call out of 'if accelerator.is_main_process:'" in error


@pytest.mark.stacks
@pytest.mark.parametrize(
    "mode", shown("diffusers", "ddp", "fsdp1", "fsdp2", "zero1", "zero2", "zero3")
)
def test_prepared_by_accelerate(mode: str, unet_class: Any, tmp_path: Path) -> None:
    """A UNet, the loop on what accelerate gathers, bit for bit, and a resume by its files."""
    program = "tests.integrations.diffusers_run"
    execute(*torchrun(2), "-m", program, mode, tmp_path, add=ON_CPUS).good()
    found = json.loads((tmp_path / "found.json").read_text())
    assert all(found[name] is True for name in ("average", "shown", "resumed", "another")), found
    assert found["bytes"] < (1.01 if mode == "ddp" else 0.52)


def lists_of_pieces(mode: str) -> None:
    training = Training(mode)
    with pytest.raises(ConfigError, match="keeps elsewhere"):
        EMAModel(list(training.model.parameters()))
    training.end()


def test_lists_of_what_a_framework_keeps(worlds: Worlds, engine_worlds: Worlds) -> None:
    worlds[2].run(lists_of_pieces, "fsdp1")
    engine_worlds[2].run(lists_of_pieces, "zero3")


# ---------------------------------------------------------------------- the example


def test_the_example_goes_on_after_a_kill(unet_class: Any, tmp_path: Path) -> None:
    """Killed on both ranks and started again, it takes the steps after the save once more, with
    the same losses and the same average; what it ends with is a model."""
    before, after = killed_and_resumed(
        "diffusers_unet.py", tmp_path, "--steps", "7", "--save-every", "3", at_step=6
    )
    randomness = {path.name for path in (tmp_path / "checkpoint-3").glob("random_states_*")}
    assert randomness == {"random_states_0.pkl", "random_states_1.pkl"}
    repeated = before[3:]
    assert repeated and all("average" in line for line in repeated)
    assert [line for line in after if line.startswith("step")][: len(repeated)] == repeated
    assert isinstance(unet_class.from_pretrained(tmp_path / "unet"), nn.Module)
