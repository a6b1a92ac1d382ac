"""Which tensors an output holds, under which names, from where, and in which format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from torch.distributed.checkpoint import FileSystemReader

from sharded_ema.errors import CheckpointMismatchError, ConfigError
from sharded_ema.tools.consolidate import consolidate
from sharded_ema.tools.naming import parse_substitution
from tests.helpers.checkpoints import make, meta, rows

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
Arrays = dict[str, np.ndarray]


def weights() -> Arrays:
    random = np.random.default_rng(0)
    shapes = {"model.embed": (6, 4), "model.layers.0.w": (4, 4), "model.layers.1.w": (4, 4),
              "head.w": (6, 4), "head.scale": ()}  # fmt: skip
    return {n: np.asarray(random.standard_normal(s), "f4") for n, s in shapes.items()}


def checkpoint(path: Path, arrays: Arrays | None = None, **said: Any) -> Path:
    tensors = {f"ema.{name}": array for name, array in (arrays or weights()).items()}
    tensors["_buffers.steps"] = np.array([3])
    return make(path, tensors, rows(2), metas={"": meta(**said)})


def names(folder: Path) -> set[str]:
    return set(load_file(folder / "model.safetensors"))


def run(source: Path, target: Path, **options: Any) -> Any:
    return consolidate(source, target, progress=False, **options)


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"include": ["head.*"]}, {"head.w", "head.scale"}),
        ({"exclude": ["head.*", "steps"]}, {n for n in weights() if n.startswith("model")}),
        ({"include": ["*.w"], "exclude": ["*.1.*"]}, {"model.layers.0.w", "head.w"}),
        ({"include": ["head.w", "head.s*"]}, {"head.w", "head.scale"}),
        ({"include": ["layers.[0]*"], "rename": [r"s/^model\.//"]}, {"layers.0.w"}),
    ],
)
def test_selection(tmp_path: Path, options: dict[str, Any], wanted: set[str]) -> None:
    run(checkpoint(tmp_path / "c"), tmp_path / "out", **options)
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert set(found) == wanted
    assert all(np.array_equal(found[n], weights()["model." * (n[0] == "l") + n]) for n in wanted)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"include": ["tail.*"]}, "tail"),
        ({"exclude": ["Head.w"]}, "Head.w"),
        ({"include": ["head.w"], "exclude": ["*"]}, "leave no tensor"),
        ({"rename": ["s/transformer/t/"]}, "changes no name"),
        ({"rename": [r"s/^model\.//", "s/^model/m/"]}, "changes no name"),
        ({"rename": [r"s/layers\.\d/x/"]}, r"model\.layers\.0\.w.*model\.layers\.1\.w"),
        ({"rename": ["s/.*//"]}, "name"),
    ],
)
def test_what_fits_nothing_or_collides(tmp_path: Path, options: dict[str, Any], told: str) -> None:
    source = checkpoint(tmp_path / "c")
    with pytest.raises(CheckpointMismatchError, match=told):
        run(source, tmp_path / "out", **options)
    assert {p.name for p in tmp_path.iterdir()} == {"c"}


@pytest.mark.parametrize(
    ("text", "name", "wanted"),
    [
        (r"s/^model\.//", "model.w", "w"),
        ("s/a/b/", "aaa", "baa"),
        ("s/a/b/g", "aaa", "bbb"),
        (r"s|h\.(\d+)|layers/\1|", "h.12.w", "layers/12.w"),
        (r"s/a\/b/c\/d/", "a/b", "c/d"),
        ("s,w$,weight,", "w.w", "w.weight"),
    ],
)
def test_substitutions(text: str, name: str, wanted: str) -> None:
    assert parse_substitution(text)(name) == wanted


@pytest.mark.parametrize(
    "text", ["", "s", "model", "s/a", "s/a/b", "s/a/b/x", "s/a/b/c/", "y/a/b/", "sxaxbx", "s/(/b/",
             r"s/a/\1/", r"s/a/\g<x>/", "s a b "]
)  # fmt: skip
def test_what_is_no_substitution(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match="rename"):
        run(checkpoint(tmp_path / "c"), tmp_path / "out", rename=[text])


def test_tied_names_are_renamed(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "c", aliases={"model.embed": ["head.tied"]})
    run(source, tmp_path / "all", tied="emit", rename=["s/head/lm/", r"s/^model\.//"])
    assert {"embed", "lm.tied"} < names(tmp_path / "all")
    (tmp_path / "like").mkdir()
    wanted = {f"x.{n}": a for n, a in weights().items() if n != "model.embed"}
    wanted |= {"x.head.tied": weights()["model.embed"], "x.steps": np.array([0])}
    save_file(wanted, tmp_path / "like" / "model.safetensors")
    assert run(source, tmp_path / "out", like=tmp_path / "like", rename=["s/^/x./"]).ok
    assert names(tmp_path / "out") == set(wanted)


def base(path: Path, **arrays: np.ndarray) -> Path:
    path.mkdir()
    save_file({n.replace("__", "."): a for n, a in arrays.items()}, path / "model.safetensors")
    return path


ABSENT = {"count": 2, "names": ["body.a", "body.b"]}


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_a_base_fills_what_is_not_stored(tmp_path: Path, dtype: str | None) -> None:
    source = checkpoint(tmp_path / "c", absent=ABSENT, aliases={"model.embed": ["head.tied"]})
    a, b, mask = np.ones((2, 3), "f4"), np.full(5, 2, "f2"), np.array([True, False])
    # Of what is averaged, and of what is tied to it, nothing may come from the base.
    folder = base(
        tmp_path / "base", body__a=a, body__b=b, mask=mask, head__w=np.zeros((6, 4), "f4"),
        head__tied=np.zeros((6, 4), "f4"),
    )  # fmt: skip
    for number, place in enumerate((folder, folder / "model.safetensors")):
        target = tmp_path / f"out{number}"
        assert run(source, target, base=place, dtype=dtype).ok
        with safe_open(target / "model.safetensors", "pt") as file:
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            assert file.metadata()["base"] == "base" and file.metadata()["kind"] == "ema"
        wanted = {n: torch.from_numpy(np.array(x)) for n, x in weights().items()}
        wanted |= {"body.a": torch.from_numpy(a), "body.b": torch.from_numpy(b)}
        wanted["head.tied"] = wanted["model.embed"]
        if dtype is not None:
            wanted = {name: tensor.bfloat16() for name, tensor in wanted.items()}
        wanted |= {"mask": torch.from_numpy(mask), "steps": torch.tensor([3])}
        assert found.keys() == wanted.keys()
        assert all(
            torch.equal(found[n], t) and found[n].dtype == t.dtype for n, t in wanted.items()
        )
    report = run(source, tmp_path / "part", base=folder, include=["body.a", "head.w"])
    assert report.facts["from_base"] == 1  # of those that are written


@pytest.mark.parametrize(("adapters", "told"), [([], "--base DIR"), (["a"], "--like ADAPTER_DIR")])
def test_what_is_absent_is_told(tmp_path: Path, adapters: list[str], told: str) -> None:
    source = checkpoint(tmp_path / "c", absent=ABSENT, adapters=adapters)
    (note,) = run(source, tmp_path / "out").notes
    assert "2 tensors absent" in note and "body.a" in note and told in note


@pytest.mark.parametrize(
    ("arrays", "told"),
    [
        ({"body__a": np.ones(3, "f4")}, "body.b"),
        ({"body__a": np.ones(3), "body__b": np.ones(3), "head__w": np.ones((4, 6))}, "head.w"),
    ],
)
def test_a_base_that_does_not_fit(tmp_path: Path, arrays: Arrays, told: str) -> None:
    source = checkpoint(tmp_path / "c", absent=ABSENT)
    report = run(source, tmp_path / "out", base=base(tmp_path / "base", **arrays))
    assert not report.ok and told in report.text()
    assert not (tmp_path / "out").exists()


def test_a_base_with_too_few_tensors_of_unlisted_names(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "c", absent={"count": 3, "names": ["body.a"]})
    report = run(source, tmp_path / "out", base=base(tmp_path / "base", body__a=np.ones(1)))
    assert not report.ok and "lacks 2 of them" in report.text()


def as_torch() -> dict[str, torch.Tensor]:
    found = {name: torch.from_numpy(np.array(array)) for name, array in weights().items()}
    return found | {"steps": torch.tensor([3]), "empty": torch.empty(0, 4)}


@pytest.mark.parametrize("size", [150, "5GB"])
def test_files_of_torch(tmp_path: Path, size: Any) -> None:
    source = checkpoint(tmp_path / "c", weights() | {"empty": np.empty((0, 4), "f4")})
    assert run(source, tmp_path / "bin", format="torch", max_shard_size=size).ok
    names = {p.name for p in (tmp_path / "bin").iterdir()}
    assert names == {"pytorch_model.bin", "provenance.json"}
    found = torch.load(tmp_path / "bin" / "pytorch_model.bin", weights_only=True)
    assert found.keys() == as_torch().keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in as_torch().items())


@pytest.mark.parametrize("size", [150, "5GB"])
def test_a_checkpoint_of_dcp(tmp_path: Path, size: Any) -> None:
    source = checkpoint(tmp_path / "c", weights() | {"empty": np.empty((0, 4), "f4")})
    run(source, tmp_path / "dcp", format="dcp", dtype="bfloat16", max_shard_size=size)
    assert {p.suffix for p in (tmp_path / "dcp").iterdir()} == {"", ".distcp", ".json"}
    wanted = {n: t.bfloat16() if t.is_floating_point() else t for n, t in as_torch().items()}
    found = {name: torch.zeros_like(tensor) for name, tensor in wanted.items()}
    assert (
        FileSystemReader(tmp_path / "dcp").read_metadata().state_dict_metadata.keys()
        == found.keys()
    )
    dcp.load(found, checkpoint_id=tmp_path / "dcp", no_dist=True)
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


@pytest.mark.parametrize("options", [{"format": "gguf"}, {"base": "b", "adapter": "x"}])
def test_wrong_use(tmp_path: Path, options: dict[str, Any]) -> None:
    if "base" in options:
        options = options | {"base": base(tmp_path / "b", w=np.ones(1))}
    with pytest.raises(ConfigError):
        run(checkpoint(tmp_path / "c", adapters=["x"]), tmp_path / "out", **options)


def test_a_plan_writes_nothing(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "c")
    before = {p.name for p in tmp_path.rglob("*")}
    report = run(source, tmp_path / "out", plan=True, max_shard_size=150, dtype="bfloat16")
    assert report.ok and {p.name for p in tmp_path.rglob("*")} == before
    done = run(source, tmp_path / "out", max_shard_size=150, dtype="bfloat16")
    files = {p.name for p in (tmp_path / "out").glob("*.safetensors")}
    assert {each["file"] for each in report.facts["plan"]} == files and report.facts[
        "files"
    ] == len(files) > 1
    shared = set(report.facts) - {"plan", "seconds"}
    assert {n: done.facts[n] for n in shared} == {n: report.facts[n] for n in shared}
