"""Files of ``torch.save``, and tensors of any dtype, as sources and as bases of the tools."""

from __future__ import annotations

import json
from argparse import Namespace
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sharded_ema.errors import CheckpointCorruptError, CheckpointMismatchError
from sharded_ema.tools.average import average
from sharded_ema.tools.consolidate import consolidate
from sharded_ema.tools.diff import diff
from sharded_ema.tools.inspection import inspect
from tests.helpers.checkpoints import flip, make, meta

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def state() -> dict[str, Tensor]:
    torch.manual_seed(1)
    return {
        "a.w": torch.randn(6, 4).t(),
        "a.b": torch.randn(20)[3:9],
        "head": torch.randn(3, 5, dtype=torch.float64),
        "half": torch.randn(7).bfloat16(),
        "count": torch.tensor(9),
        "mask": torch.tensor([True, False]),
    }


def directory(path: Path, tensors: dict[str, Tensor]) -> Path:
    path.mkdir()
    save_file({n: t.contiguous() for n, t in tensors.items()}, path / "model.safetensors")
    return path


def written(path: Path) -> dict[str, Tensor]:
    return load_file(path / "model.safetensors")


def one_file(path: Path, tensors: dict[str, Tensor]) -> Path:
    torch.save(OrderedDict((n, nn.Parameter(t, requires_grad=False)) for n, t in tensors.items()),
               path / "m.pt")  # fmt: skip
    return path / "m.pt"


def of_lightning(path: Path, tensors: dict[str, Tensor]) -> Path:
    torch.save({"epoch": 3, "state_dict": tensors, "loops": {"a": [1, "x"]}}, path / "m.ckpt")
    return path / "m.ckpt"


def of_ddp(path: Path, tensors: dict[str, Tensor]) -> Path:
    named = {f"module.{name}": tensor for name, tensor in tensors.items()}
    torch.save({"model": named, "optimizer": {"state": {}, "lr": 0.1}}, path / "m.pth")
    return path / "m.pth"


def of_transformers(path: Path, tensors: dict[str, Tensor]) -> Path:
    (path / "m").mkdir()
    names = [f"pytorch_model-0000{i}-of-00002.bin" for i in (1, 2)]
    files = {name: names[i % 2] for i, name in enumerate(tensors)}
    for file in names:
        torch.save({n: t for n, t in tensors.items() if files[n] == file}, path / "m" / file)
    (path / "m" / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": files}))
    return path / "m"


KINDS = [one_file, of_lightning, of_ddp, of_transformers]


@pytest.mark.parametrize("kind", KINDS)
def test_a_side_of_diff(kind: Any, tmp_path: Path) -> None:
    tensors = state()
    there, safe = kind(tmp_path, tensors), directory(tmp_path / "safe", tensors)
    for sides in ((there, safe), (safe, there), (there, there)):
        report = diff(*sides)
        assert report.ok and report.facts["compared_tensors"] == len(tensors), report.text()
    changed = {**tensors, "a.b": tensors["a.b"] + 1}
    report = diff(there, directory(tmp_path / "other", changed))
    assert not report.ok and report.facts["differing_elements"] == 6


@pytest.mark.parametrize("kind", [one_file, of_transformers])
def test_an_input_of_average(kind: Any, tmp_path: Path) -> None:
    tensors = state()
    there = kind(tmp_path, tensors)
    safe = directory(tmp_path / "safe", {n: torch.zeros_like(t) for n, t in tensors.items()})
    for number, inputs in enumerate(([there, safe], [safe, there])):
        out = tmp_path / str(number)
        assert average(inputs, out=out, progress=False).ok
        found = written(out)
        for name in ("a.w", "a.b", "head"):
            assert torch.equal(found[name], tensors[name] / 2), name
        assert found["count"] == (0, 9)[number]


@pytest.mark.parametrize("kind", [one_file, of_lightning, of_transformers])
def test_base_and_like(kind: Any, tmp_path: Path) -> None:
    tensors = state()
    there = kind(tmp_path, tensors)
    said = {"": meta(absent={"count": 2, "names": ["a.w", "count"]})}
    stored = {f"ema.{n}": tensors[n].float().numpy() + 1 for n in ("a.b", "head")}
    source = make(tmp_path / "c", stored, metas=said)
    report = consolidate(source, tmp_path / "out", base=there, like=there, progress=False)
    assert report.ok and report.facts["from_base"] == 4, report.text()
    found = written(tmp_path / "out")
    assert found.keys() == tensors.keys()
    for name in ("a.w", "half", "count", "mask"):
        assert torch.equal(found[name], tensors[name]), name
    assert torch.equal(found["a.b"], tensors["a.b"] + 1)
    report = consolidate(source, tmp_path / "no", like=there, progress=False)
    assert not report.ok and not (tmp_path / "no").exists()


def test_what_they_say(tmp_path: Path) -> None:
    there = one_file(tmp_path, state())
    report = inspect(there, tensors=True)
    assert report.facts["format"] == "torch" and report.facts["tensors"] == 6
    assert {"name": "a.w", "dtype": "F32", "shape": [4, 6]}.items() <= report.facts["list"][
        1
    ].items()


def test_damage_and_what_is_none(tmp_path: Path) -> None:
    there = one_file(tmp_path, state())
    data = there.read_bytes()
    flip(there, data.index(state()["head"].numpy().tobytes()) + 5)
    with pytest.raises(CheckpointCorruptError, match="head"):
        diff(there, there)
    there.write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointCorruptError, match="no archive ends"):
        diff(there, there)
    torch.save(state(), there, _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointCorruptError, match=r"since PyTorch 1.6"):
        diff(there, there)
    torch.save({"optimizer": {"lr": 0.1}}, there)
    with pytest.raises(CheckpointMismatchError, match=r"'optimizer'.*no state dict"):
        diff(there, there)
    torch.save({**state(), "args": Namespace(lr=1)}, there)
    with pytest.raises(CheckpointCorruptError, match=r"forbidden global argparse\.Namespace"):
        diff(there, there)


# ---------------------------------------------------------------------- dtypes

NEW = {
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e8m0fnu: "F8_E8M0",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
}


def test_eight_bit_floats_are_copied_and_compared(tmp_path: Path) -> None:
    raw = torch.arange(60, dtype=torch.uint8)
    tensors = {name: raw.clone().view(dtype) for dtype, name in NEW.items()} | {"w": torch.ones(3)}
    safe = directory(tmp_path / "safe", tensors)
    torch.save(tensors, tmp_path / "m.pt")
    dcp.save(dict(tensors), checkpoint_id=tmp_path / "dcp", no_dist=True)
    for other in ("m.pt", "dcp", "safe"):
        report = diff(safe, tmp_path / other, tensors=True)
        dtypes = {row["name"]: row["dtype"] for row in report.facts["list"]}
        assert report.ok and dtypes == {name: name for name in NEW.values()} | {"w": "F32"}
    source = make(tmp_path / "c", {"ema.v": torch.ones(2).numpy()})
    for format, file in (("safetensors", "model.safetensors"), ("torch", "pytorch_model.bin")):
        out = tmp_path / format
        assert consolidate(source, out, base=safe, format=format, progress=False).ok
        found = load_file(out / file) if format == "safetensors" else torch.load(out / file)
        assert all(torch.equal(found[n].view(torch.uint8), raw) for n in NEW.values())


def narrow(path: Path) -> Path:
    """A model with a tensor of four bits an element, as safetensors stores it."""
    packed = torch.arange(4, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)
    return directory(path, {"w": torch.ones(3), "q.blocks": packed})


def test_smaller_elements_are_no_damage(tmp_path: Path) -> None:
    safe = narrow(tmp_path / "safe")
    report = inspect(safe)
    assert report.ok and "not read, such as q.blocks (F4)" in report.text()
    report = diff(safe, safe)
    assert not report.ok and "not read, such as q.blocks" in report.text()
    source = make(tmp_path / "c", {"ema.v": torch.ones(2).numpy()})
    with pytest.raises(CheckpointMismatchError, match=r"q\.blocks with F4.*--exclude"):
        consolidate(source, tmp_path / "out", base=safe, progress=False)
    report = consolidate(source, tmp_path / "out", base=safe, exclude=["q.*"], progress=False)
    assert report.ok and written(tmp_path / "out").keys() == {"v", "w"}


@pytest.mark.filterwarnings("ignore:ComplexHalf support:UserWarning")
@pytest.mark.parametrize("kind", ["dcp", "torch"])
def test_what_is_left_out_may_be_of_any_dtype(kind: str, tmp_path: Path) -> None:
    odd = torch.ones(3, dtype=torch.complex32)
    tensors = {"w": torch.ones(3), "freqs.c": odd, "other": odd}
    if kind == "dcp":
        dcp.save(dict(tensors), checkpoint_id=tmp_path / "c", no_dist=True)
        source: dict[str, Any] = {"src": tmp_path / "c", "prefix": ""}
    else:
        torch.save(tensors, tmp_path / "m.pt")
        source = {"src": make(tmp_path / "c", {"ema.v": torch.ones(2).numpy()}),
                  "base": tmp_path / "m.pt"}  # fmt: skip
    with pytest.raises(CheckpointMismatchError, match=r"2 tensors .* such as freqs\.c with"):
        consolidate(**source, dst=tmp_path / "out", progress=False)
    report = consolidate(**source, dst=tmp_path / "out", exclude=["freqs*", "oth*"], progress=False)
    assert report.ok and "w" in written(tmp_path / "out")
