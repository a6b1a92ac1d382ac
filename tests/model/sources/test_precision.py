"""The average is as precise as what it averages: models in fp64, complex, mixed; all layouts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from sharded_ema import ShardedEMA, consolidate, diff, verify
from sharded_ema.errors import BindError, CheckpointMismatchError, StateError
from tests.helpers.layouts import rank, whole, world
from tests.helpers.pool import WorkerPool

Worlds = dict[int, WorkerPool]

DECAY = 0.75


class Mixed(nn.Module):
    """Parameters of four dtypes, which meet in its output; odd sizes."""

    def __init__(self, *dtypes: torch.dtype) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Scaled(dtype) for dtype in dtypes])

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([layer(x).abs().square().mean().float() for layer in self.layers]).sum()


class Scaled(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 7).to(dtype) + torch.randn(5, 7).to(dtype) * 0.1)
        if dtype.is_complex:
            self.weight.data += 1j * torch.randn(5, 7)
        self.bias = nn.Parameter(torch.randn(3).to(dtype))

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.weight.dtype)
        return torch.cat([self.weight @ x, self.bias])


REAL = (torch.float64, torch.bfloat16, torch.float32)
LAYOUTS: dict[str, tuple[torch.dtype, ...]] = {
    "plain": (*REAL, torch.complex64, torch.complex128),
    "ddp": (*REAL, torch.complex64, torch.complex128),
    "ddp_whole": (*REAL, torch.complex64),
    "fsdp2": (*REAL, torch.complex64, torch.complex128),
    "hsdp": (*REAL, torch.complex64),
    "fsdp1": (torch.float64, torch.bfloat16),  # which refuses complex ones
}


def build(layout: str, seed: int = 0) -> tuple[nn.Module, Mixed]:
    """A model in a layout, and the module inside."""
    torch.manual_seed(seed)
    bare = Mixed(*LAYOUTS[layout])
    target: nn.Module = bare
    if layout.startswith("ddp"):
        target = DistributedDataParallel(bare)
    elif layout in ("fsdp2", "hsdp"):
        shape = (world(),) if layout == "fsdp2" else (2, world() // 2)
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])
        for layer in bare.layers:
            fully_shard(layer, mesh=mesh)
    elif layout == "fsdp1":
        for index, layer in enumerate(bare.layers):
            bare.layers[index] = FSDP(layer, use_orig_params=True, device_id=torch.device("cpu"))
        target = bare
    return target, bare


def make(layout: str, target: nn.Module, **settings: Any) -> ShardedEMA:
    return ShardedEMA(target, DECAY, shard_replicas=layout != "ddp_whole", timeout=60, **settings)


def gather(target: nn.Module, bare: Mixed) -> dict[str, Tensor]:
    """Full parameters by their bare names."""
    for module in bare.modules():
        if hasattr(module, "reshard"):
            module.reshard()
    with FSDP.summon_full_params(target, writeback=False):
        return {
            name.replace("_fsdp_wrapped_module.", ""): whole(p)
            for name, p in bare.named_parameters()
        }


def wide(tensor: Tensor) -> Tensor:
    """As real fp64 numbers."""
    return (torch.view_as_real(tensor) if tensor.is_complex() else tensor).double()


def change(bare: Mixed, step: int) -> None:
    """What an optimizer might do: the same on all ranks, and by itself in no gradient."""
    with torch.no_grad():
        for number, (_, parameter) in enumerate(sorted(bare.named_parameters())):
            parameter.mul_(0.9 + 0.01 * step + 0.001 * number)


def tolerance(dtype: torch.dtype) -> float:
    return 1e-14 if dtype in (torch.float64, torch.complex128) else 1e-6


def train_save_and_load(layout: str, path: str) -> None:
    target, bare = build(layout)
    ema = make(layout, target)
    expected = {name: wide(p) for name, p in gather(target, bare).items()}
    dtypes = {name: p.dtype for name, p in bare.named_parameters()}
    dtypes = {name.replace("_fsdp_wrapped_module.", ""): d for name, d in dtypes.items()}
    for step in range(6):
        change(bare, step)
        ema.update()
        for name, now in gather(target, bare).items():
            expected[name] = DECAY * expected[name] + (1 - DECAY) * wide(now)

    def compare() -> None:
        for name, found in gather(target, bare).items():
            assert found.dtype is dtypes[name]
            bound = 1e-2 if found.dtype is torch.bfloat16 else tolerance(found.dtype)
            assert torch.allclose(wide(found), expected[name], rtol=bound, atol=bound), name

    before = gather(target, bare)
    with ema.swap():
        compare()
    for name, now in gather(target, bare).items():
        assert torch.equal(now, before[name])
    sizes = {torch.float64: 8, torch.complex64: 8, torch.complex128: 16}
    shares = 1 if layout in ("plain", "ddp_whole") else world()
    total = sum(38 * sizes.get(dtype, 4) for dtype in LAYOUTS[layout])
    assert abs(ema.memory["ideal"] - total / shares) <= total / 4
    assert ema.memory["shadow"] == ema.memory["ideal"]
    for format in ("safetensors", "dcp"):
        ema.save(f"{path}/{format}", step=6, format=format)
    ema.save(f"{path}/later", step=6, asynchronous=True).result()
    if rank() == 0:
        torch.save(expected, f"{path}/expected")
    for name in ("safetensors", "dcp", "later"):
        target, bare = build(layout, seed=1)
        change(bare, 1)
        ema = make(layout, target)
        assert ema.load(f"{path}/{name}", verify=True) == 6
        with ema.swap():
            compare()


def load_elsewhere(layout: str, path: str) -> None:
    target, bare = build(layout, seed=1)
    ema = make(layout, target)
    assert ema.load(path, strict=False) == 6
    expected = torch.load(f"{Path(path).parent}/expected")
    with ema.swap():
        for name, found in gather(target, bare).items():
            bound = 1e-2 if found.dtype is torch.bfloat16 else tolerance(found.dtype)
            assert torch.allclose(wide(found), expected[name], rtol=bound, atol=bound), name


def check_export(path: Path, format: str) -> None:
    """The export has what the loop has, in the dtypes that the model has but for bfloat16."""
    assert verify(path / "safetensors").ok and verify(path / "dcp").ok
    assert diff(path / "safetensors", path / "dcp").ok
    out = path / f"export-{format}"
    report = consolidate(path / "safetensors", out, format=format, progress=False)
    assert report.ok
    if format == "torch":
        found = torch.load(out / "pytorch_model.bin", weights_only=True)
    else:
        found = load_file(out / "model.safetensors")
    assert ("complex64" in str(report.notes)) == (format == "safetensors")
    expected = torch.load(path / "expected")
    assert found.keys() == expected.keys()
    seen = set()
    for name, value in found.items():
        seen.add(value.dtype)
        bound = 1e-14 if value.dtype in (torch.float64, torch.complex128) else 1e-6
        assert torch.allclose(wide(value), expected[name], rtol=bound, atol=bound), name
    assert {torch.float64, torch.float32} <= seen


@pytest.mark.parametrize(
    ("layout", "size"),
    [
        ("ddp", 2),
        ("ddp", 3),
        ("ddp_whole", 2),
        ("fsdp2", 2),
        ("fsdp2", 3),
        ("hsdp", 4),
        ("fsdp1", 2),
    ],
)
def test_models_of_several_dtypes(worlds: Worlds, layout: str, size: int, tmp_path: Path) -> None:
    worlds[size].run(train_save_and_load, layout, str(tmp_path))
    check_export(tmp_path, "torch")
    others = [("fsdp2", 2), ("ddp", 2)] if layout != "fsdp1" else [("ddp", 2)]
    for other, ranks in others:
        if set(LAYOUTS[other]) == set(LAYOUTS[layout]):
            worlds[ranks].run(load_elsewhere, other, str(tmp_path / "safetensors"))


def test_a_model_of_several_dtypes_in_one_process(worlds: Worlds, tmp_path: Path) -> None:
    train_save_and_load("plain", str(tmp_path))
    check_export(tmp_path, "torch")
    check_export(tmp_path, "safetensors")
    worlds[3].run(load_elsewhere, "ddp", str(tmp_path / "safetensors"))
    worlds[2].run(load_elsewhere, "fsdp2", str(tmp_path / "dcp"))


def test_an_explicit_dtype_holds_for_all() -> None:
    model = Mixed(*LAYOUTS["plain"])
    for asked, complex_dtype in (
        (torch.float32, torch.complex64),
        (torch.float64, torch.complex128),
        (torch.bfloat16, torch.complex64),  # PyTorch has no complex numbers of two bfloat16
    ):
        ema = ShardedEMA(model, 0.5, shadow_dtype=asked)
        for name, parameter in model.named_parameters():
            want = complex_dtype if parameter.is_complex() else asked
            assert ema.state_dict()[f"ema.{name}"].dtype is want
        for parameter in model.parameters():
            parameter.data *= 1.5
        ema.update()
        with ema.swap():
            pass


def test_the_state_of_one_process_has_the_dtypes_and_shapes_of_the_model() -> None:
    model = Mixed(*LAYOUTS["plain"])
    state = ShardedEMA(model, 0.5).state_dict()
    for name, parameter in model.named_parameters():
        found = state[f"ema.{name}"]
        assert type(found) is Tensor and found.shape == parameter.shape
        half = parameter.dtype is torch.bfloat16
        assert found.dtype is (torch.float32 if half else parameter.dtype)


def test_complex_and_real_are_not_taken_for_each_other(tmp_path: Path) -> None:
    models = {dtype: Scaled(dtype) for dtype in (torch.float32, torch.complex64, torch.complex128)}
    emas = {dtype: ShardedEMA(model, 0.5) for dtype, model in models.items()}
    for dtype, ema in emas.items():
        for format in ("safetensors", "dcp"):
            ema.save(tmp_path / f"{dtype}-{format}", step=1, format=format)
            for other, into in emas.items():
                if dtype.is_complex == other.is_complex:
                    into.load(tmp_path / f"{dtype}-{format}")
                    continue
                what = "complex" if dtype.is_complex else "real"
                with pytest.raises(CheckpointMismatchError, match=f"weight is {what} there"):
                    into.load(tmp_path / f"{dtype}-{format}")
                with pytest.raises(CheckpointMismatchError, match=f"weight is {what} there"):
                    into.load_state_dict({k: v.clone() for k, v in ema.state_dict().items()
                                          if not k.startswith("_buffers")})  # fmt: skip


def test_numbers_that_are_conjugated_lazily_are_refused() -> None:
    model = Scaled(torch.complex64)
    model.bias = nn.Parameter(torch.randn(3, dtype=torch.complex64).conj())
    with pytest.raises(BindError, match=r"parameter bias is conjugated lazily"):
        ShardedEMA(model, 0.5)
    model.bias = nn.Parameter(model.bias.detach().resolve_conj())
    ema = ShardedEMA(model, 0.5)
    model.weight.data = model.weight.data.conj()
    for call in (ema.update, ema.state_dict, ema.metrics):
        with pytest.raises(StateError, match=r"parameter weight .* conjugated lazily"):
            call()


def transposed_in_place(layout: str) -> None:
    """Followed where a rank has the whole of a tensor, refused by name where replicas share it."""
    torch.manual_seed(0)
    for rows in (6, 1100):
        bare = nn.Linear(rows, rows, bias=False)
        target: nn.Module = bare
        if layout == "ddp":
            target = DistributedDataParallel(bare)
        else:
            fully_shard(bare, mesh=init_device_mesh("cpu", (world(),)))
        ema = ShardedEMA(target, 0.5, timeout=30)
        ema.update()
        if layout == "ddp":
            bare.weight.data = bare.weight.data.t()
            for call in (ema.update, ema.state_dict, lambda ema=ema: ema.swap().__enter__()):
                with pytest.raises(StateError, match="parameter weight changed its memory format"):
                    call()
            bare.weight.data = bare.weight.data.t()
            ema.update()
            continue
        block = bare.weight._local_tensor  # type: ignore[attr-defined]
        loop, strides = block.detach().clone(), block.stride()
        flat = block.data.as_strided((block.numel(),), (1,))
        block.data = flat.view(block.shape[::-1]).t()
        assert block.stride() != strides
        ema.update()
        loop.lerp_(block.detach(), 0.5)
        with ema.swap():
            assert torch.equal(block.detach(), loop)


@pytest.mark.parametrize("layout", ["ddp", "fsdp2"])
def test_strides_that_change_in_place(worlds: Worlds, layout: str) -> None:
    worlds[2].run(transposed_in_place, layout)


def small_replicas_that_are_kept_whole() -> None:
    """What one replica keeps whole is followed on all of them, and handed out as it then lies."""
    torch.manual_seed(0)
    model = nn.ParameterList([torch.randn(4, 4), torch.randn(4, 4)])
    holder = nn.Module()
    holder.parts = model
    target = DistributedDataParallel(holder)
    ema = ShardedEMA(target, 0.5, timeout=30)
    loop = [p.detach().clone() for p in model]
    for parameter in model:
        parameter.data = parameter.data.t()
    ema.update()
    for kept, parameter in zip(loop, model, strict=True):
        kept.lerp_(parameter.detach(), 0.5)
    with ema.swap():
        for kept, parameter in zip(loop, model, strict=True):
            assert torch.equal(parameter.detach(), kept)


def test_strides_of_what_one_replica_keeps_whole(worlds: Worlds) -> None:
    worlds[2].run(small_replicas_that_are_kept_whole)


def test_a_shape_that_a_swap_changes_is_put_back() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    ema = ShardedEMA(model, 0.5)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with ema.swap():
        model[0].weight.data = model[0].weight.data[:2]
        model[1].weight.data = model[1].weight.data.t()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])
    ema.update()
