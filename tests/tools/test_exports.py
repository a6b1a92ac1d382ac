"""Exports under the names, in the dtypes and with the files of the model that they are like."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as load_torch
from safetensors.torch import save_file as save_torch

from sharded_ema.checkpoint.files import Directory
from sharded_ema.checkpoint.run import open_checkpoint
from sharded_ema.cli import main
from sharded_ema.errors import (
    CheckpointCorruptError,
    CheckpointMismatchError,
    CheckpointNotFoundError,
    ConfigError,
)
from sharded_ema.tools.average import average
from sharded_ema.tools.consolidate import consolidate
from sharded_ema.tools.verify import verify
from sharded_ema.tools.watch import watch
from tests.helpers.checkpoints import UUID, Chunking, flip, grid, make, meta, ranges, rows, whole

Arrays = dict[str, np.ndarray]
DIFFUSERS = "diffusion_pytorch_model"


def weights() -> Arrays:
    random = np.random.default_rng(3)
    return {
        f"blocks.{i}.{name}": random.standard_normal((4, 3)).astype("f4")
        for i in range(2)
        for name in ("wo", "norm", "router")
    }


def checkpoint(path: Path, arrays: Arrays, chunking: Chunking = whole, **said: Any) -> Path:
    tensors = {f"ema.{name}": array for name, array in arrays.items()}
    return make(path, tensors, chunking, metas={"": meta(**said)})


def run(source: Path, target: Path, **options: Any) -> Any:
    return consolidate(source, target, progress=False, **options)


def equal(found: Arrays, wanted: Arrays) -> bool:
    return found.keys() == wanted.keys() and all(
        found[name].dtype == array.dtype and np.array_equal(found[name], array)
        for name, array in wanted.items()
    )


def load_all(folder: Path) -> Arrays:
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


# ---------------------------------------------------------------------- files


@pytest.mark.parametrize(
    ("file", "stem"),
    [
        (f"{DIFFUSERS}.safetensors", DIFFUSERS),
        (f"{DIFFUSERS}.fp16.safetensors", DIFFUSERS),
        ("model.fp16.safetensors", "model"),
        ("consolidated.safetensors", "consolidated"),
        ("consolidated-00001-of-00001.safetensors", "consolidated"),
    ],
)
def test_files_are_called_as_those_of_the_model(tmp_path: Path, file: str, stem: str) -> None:
    source = checkpoint(tmp_path / "c", weights())
    like = tmp_path / "like"
    like.mkdir()
    save_file(weights(), like / file)
    (like / f"{stem}.safetensors.index.json").write_text(
        json.dumps({"weight_map": dict.fromkeys(weights(), file)})
    )
    assert run(source, tmp_path / "one", like=like).ok
    assert {p.name for p in (tmp_path / "one").iterdir()} == {f"{stem}.safetensors"}
    assert run(source, tmp_path / "more", like=like, max_shard_size=100).ok
    index = json.loads((tmp_path / "more" / f"{stem}.safetensors.index.json").read_text())
    names = {p.name for p in (tmp_path / "more").glob("*.safetensors")}
    assert len(names) > 1 and set(index["weight_map"].values()) == names
    assert equal(load_all(tmp_path / "one"), weights())
    assert equal(load_all(tmp_path / "more"), weights())


def test_an_index_names_the_files_of_a_variant(tmp_path: Path) -> None:
    like = tmp_path / "like"
    like.mkdir()
    save_file(weights(), like / "a.safetensors")
    save_file({"other": np.ones(2, "f4")}, like / "b.safetensors")
    index = {"weight_map": dict.fromkeys(weights(), "a.safetensors")}
    (like / "model.safetensors.index.fp16.json").write_text(json.dumps(index))
    assert run(checkpoint(tmp_path / "c", weights()), tmp_path / "out", like=like).ok
    (like / "model.safetensors.index.fp16.json").unlink()
    report = run(tmp_path / "c", tmp_path / "all", like=like)
    assert not report.ok and "other" in report.text() and not (tmp_path / "all").exists()


def test_what_diffusers_reads_has_its_name_without_weights_to_show_it(tmp_path: Path) -> None:
    like = tmp_path / "like"
    like.mkdir()
    (like / "config.json").write_text('{"_class_name": "UNet2DModel", "_diffusers_version": "1"}')
    source = checkpoint(tmp_path / "c", weights())
    assert run(source, tmp_path / "out", like=like, dtype="float16").ok
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "config.json", f"{DIFFUSERS}.safetensors",
    }  # fmt: skip
    assert (tmp_path / "out" / "config.json").read_bytes() == (like / "config.json").read_bytes()
    assert run(source, tmp_path / "bin", like=like, format="torch").ok
    assert (tmp_path / "bin" / f"{DIFFUSERS}.bin").is_file()


def pipeline(path: Path) -> Path:
    (path / "unet").mkdir(parents=True)
    for name in ("vae", "scheduler", "safety", "../secret"):
        (path / name).mkdir()
    parts = {key: ["diffusers", "Some"] for key in ("unet", "vae", "scheduler", "safety")}
    parts |= {"_class_name": "P", "feature_extractor": [None, None], "../secret": ["a", "b"]}
    (path / "model_index.json").write_text(json.dumps(parts))
    (path / "scheduler" / "scheduler_config.json").write_text("{}")
    for name in ("unet", "vae", "../secret"):
        (path / name / "config.json").write_text('{"_diffusers_version": "1"}')
    (path / "vae" / ".env").write_text("secret")
    (path / "safety" / "pytorch_model.bin").write_bytes(b"pickled")
    zeros = {name: np.zeros_like(array) for name, array in weights().items()}
    save_file(zeros, path / "unet" / f"{DIFFUSERS}.safetensors")
    # Names of the other component as well, but of other shapes.
    other = {name: np.zeros((2, 2), "f4") for name in weights()}
    save_file(other, path / "vae" / f"{DIFFUSERS}.safetensors")
    return path


def test_a_pipeline_is_whole(tmp_path: Path) -> None:
    like = pipeline(tmp_path / "like")
    source = checkpoint(tmp_path / "c", weights())
    out = tmp_path / "out"
    report = run(source, out, like=like, max_shard_size=100)
    assert report.ok and report.facts["copied"] == 6
    files = {str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()}
    assert {name for name in files if not name.startswith("unet/")} == {
        "model_index.json", "scheduler/scheduler_config.json", "safety/pytorch_model.bin",
        "vae/config.json", f"vae/{DIFFUSERS}.safetensors",
    }  # fmt: skip
    assert {"unet/config.json", f"unet/{DIFFUSERS}.safetensors.index.json"} < files
    assert f"unet/{DIFFUSERS}.safetensors" not in files, "the weights of the base are not copied"
    assert equal(load_all(out / "unet"), weights())
    for name in ("model_index.json", f"vae/{DIFFUSERS}.safetensors"):
        assert (out / name).read_bytes() == (like / name).read_bytes()
    assert verify(out).ok and verify(out).facts["provenance"]["source"] == UUID
    # One component of it is a model directory like others.
    assert run(source, tmp_path / "part", like=like / "unet").ok
    assert {p.name for p in (tmp_path / "part").iterdir()} == {
        "config.json", f"{DIFFUSERS}.safetensors",
    }  # fmt: skip


def test_a_pipeline_without_such_a_component_is_refused(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "c", {"x": np.ones((5, 5), "f4")})
    report = run(source, tmp_path / "out", like=pipeline(tmp_path / "like"))
    assert not report.ok and {p.name for p in tmp_path.iterdir()} == {"c", "like", "secret"}


def test_watch_knows_its_exports_of_a_pipeline(tmp_path: Path) -> None:
    like = pipeline(tmp_path / "like")
    checkpoint(tmp_path / "run" / "step_1", weights())

    def look(**options: Any) -> list[Any]:
        return list(watch(tmp_path / "run", tmp_path / "out", like=like, once=True, **options))

    assert [report.ok for report in look()] == [True]
    assert look() == []
    (like / "scheduler" / "scheduler_config.json").write_text("{ }")
    assert look() == [], "other components are not compared"
    (like / "unet" / "config.json").write_text("{ }")
    assert len(look()) == 1 and look() == []
    assert len(look(dtype=["float16", "*.norm=float32"])) == 1
    assert look(dtype=["float16", "*.norm=float32"]) == []


# ---------------------------------------------------------------------- dtypes


def dtypes(file: Path) -> dict[str, str]:
    with safe_open(file, "np") as opened:
        return {name: opened.get_slice(name).get_dtype() for name in opened.keys()}  # noqa: SIM118


def like_mixed(path: Path, wide: str) -> Path:
    path.mkdir()
    tensors = {
        name: torch.zeros(array.shape, dtype=torch.float32 if wide in name else torch.bfloat16)
        for name, array in weights().items()
    }
    save_torch(tensors, path / "model.safetensors")
    return path


def test_narrow_exports_keep_wide_what_the_model_keeps_wide(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "c", weights())
    like = like_mixed(tmp_path / "like", wide="router")
    assert run(source, tmp_path / "a", like=like, dtype="bfloat16").ok
    found = load_torch(tmp_path / "a" / "model.safetensors")
    for name, array in weights().items():
        wanted = torch.from_numpy(array)
        assert torch.equal(found[name], wanted if "router" in name else wanted.bfloat16()), name
        assert found[name].dtype == (torch.float32 if "router" in name else torch.bfloat16)
    # A pattern says otherwise, the last one that fits; without a dtype all stay as they are.
    given = ["*=float16", "blocks.0.router=bfloat16", "float16"]
    assert run(source, tmp_path / "b", like=like, dtype=given).ok
    said = dtypes(tmp_path / "b" / "model.safetensors")
    assert {name for name, dtype in said.items() if dtype != "F16"} == {"blocks.0.router"}
    assert run(source, tmp_path / "c2", like=like).ok
    assert set(dtypes(tmp_path / "c2" / "model.safetensors").values()) == {"F32"}


def test_a_model_that_is_wide_everywhere_keeps_nothing(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "c", weights())
    like = like_mixed(tmp_path / "like", wide="")
    assert run(source, tmp_path / "out", like=like, dtype="float16").ok
    assert set(dtypes(tmp_path / "out" / "model.safetensors").values()) == {"F16"}


@pytest.mark.parametrize(
    "given", ["fp8", ["float32", "float16"], "=float16", "*=", ["blocks=float64"]]
)
def test_dtypes_that_cannot_be(tmp_path: Path, given: Any) -> None:
    with pytest.raises(ConfigError, match="dtype"):
        run(checkpoint(tmp_path / "c", weights()), tmp_path / "out", dtype=given)


def test_a_dtype_for_no_tensor_is_refused(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "c", weights())
    with pytest.raises(CheckpointMismatchError, match="fits no tensor"):
        run(source, tmp_path / "out", dtype=["bfloat16", "*.gate=float32"])
    arguments = ["--dtype", "bfloat16", "--dtype", "*.norm=float32", "--no-progress"]
    assert main(["consolidate", str(source), str(tmp_path / "out"), *arguments]) == 0
    said = dtypes(tmp_path / "out" / "model.safetensors")
    assert {name for name, dtype in said.items() if dtype == "F32"} == {
        "blocks.0.norm", "blocks.1.norm",
    }  # fmt: skip


CONFIG = """{
  "model_type": "x", "rope": [0.0, Infinity],
  "text_config": {"torch_dtype": "bfloat16"}, "vision_config": {"dtype" : "torch.float16"},
  "quantization_config": {"bnb_4bit_compute_dtype": "bfloat16"},
  "dtype": "bfloat16"
}
"""


@pytest.mark.parametrize(
    ("given", "said"),
    [(None, "float32"), ("float16", "float16"), (["bfloat16", "*.norm=float32"], "bfloat16")],
)
def test_the_configuration_says_what_was_written(tmp_path: Path, given: Any, said: str) -> None:
    like = tmp_path / "like"
    like.mkdir()
    (like / "config.json").write_text(CONFIG)
    assert run(checkpoint(tmp_path / "c", weights()), tmp_path / "out", like=like, dtype=given).ok
    text = (tmp_path / "out" / "config.json").read_text()
    config, before = json.loads(text), json.loads(CONFIG)
    assert config.pop("dtype") == config["text_config"].pop("torch_dtype") == said
    assert config["vision_config"].pop("dtype") == said
    for changed in (before, before["text_config"], before["vision_config"]):
        changed.pop("dtype", changed.pop("torch_dtype", None))
    assert config == before, "nothing else has changed"


@pytest.mark.parametrize("text", ['{"model_type": "x"}', '{"_class_name": "y"}', "{", "[]"])
def test_a_configuration_that_says_no_dtype(tmp_path: Path, text: str) -> None:
    like = tmp_path / "like"
    like.mkdir()
    (like / "config.json").write_text(text)
    assert run(checkpoint(tmp_path / "c", weights()), tmp_path / "out", like=like).ok
    found = (tmp_path / "out" / "config.json").read_text()
    if "model_type" in text:
        assert json.loads(found) == {"model_type": "x", "dtype": "float32"}
    else:
        assert found == text


# ---------------------------------------------------------------------- experts

NUM_EXPERTS, WIDE, HIGH = 5, 3, 4
MIXTRAL = ("block_sparse_moe", ("w1", "w3"), "w2")
QWEN = ("mlp", ("gate_proj", "up_proj"), "down_proj")


def fused() -> Arrays:
    random = np.random.default_rng(4)

    def floats(*shape: int) -> np.ndarray:
        return random.standard_normal(shape).astype("f4")

    return {
        "layers.0.mlp.experts.gate_up_proj": floats(NUM_EXPERTS, 2 * HIGH, WIDE),
        "layers.0.mlp.experts.down_proj": floats(NUM_EXPERTS, WIDE, HIGH),
        "layers.0.mlp.gate.weight": floats(NUM_EXPERTS, WIDE),
        "norm.weight": floats(WIDE),
    }


def released(style: tuple[str, tuple[str, str], str], arrays: Arrays) -> Arrays:
    """One expert per tensor, by a plain loop."""
    module, (gate, up), down = style
    start = f"layers.0.{module}"
    found = {
        "norm.weight": arrays["norm.weight"],
        f"{start}.gate.weight": arrays["layers.0.mlp.gate.weight"],
    }
    for e in range(NUM_EXPERTS):
        both = arrays["layers.0.mlp.experts.gate_up_proj"][e]
        found[f"{start}.experts.{e}.{gate}.weight"] = both[:HIGH].copy()
        found[f"{start}.experts.{e}.{up}.weight"] = both[HIGH:].copy()
        found[f"{start}.experts.{e}.{down}.weight"] = arrays["layers.0.mlp.experts.down_proj"][e]
    return found


def like_release(path: Path, style: Any) -> Path:
    path.mkdir()
    zeros = {name: np.zeros_like(array) for name, array in released(style, fused()).items()}
    save_file(zeros, path / "model.safetensors")
    return path


@pytest.mark.parametrize("block", [12, 64, 1 << 22])
@pytest.mark.parametrize("size", ["5GB", 100, 300])
@pytest.mark.parametrize("chunking", [whole, rows(2), grid, ranges(3)])
def test_experts_are_written_one_by_one(
    tmp_path: Path, chunking: Chunking, size: Any, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sharded_ema.checkpoint.reading.stream.BLOCK_BYTES", block)
    style = QWEN if size == 100 else MIXTRAL
    source = checkpoint(tmp_path / "c", fused(), chunking)
    like = like_release(tmp_path / "like", style)
    assert run(source, tmp_path / "out", like=like, max_shard_size=size).ok
    assert equal(load_all(tmp_path / "out"), released(style, fused()))
    if size == 300:  # those of one stored tensor stay together, as they have room
        for stored in ("w1", "w2"):
            holding = [
                file for file in (tmp_path / "out").glob("*.safetensors")
                if any(stored in name for name in load_file(file))
            ]  # fmt: skip
            assert len(holding) == (2 if stored == "w1" else 1)


def test_experts_are_read_once_and_checked_to_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    actual = Directory.read_into

    def counted(self: Directory, name: str, buffer: Any, position: int) -> None:
        read.append(buffer.nbytes)
        actual(self, name, buffer, position)

    source = checkpoint(tmp_path / "c", fused(), rows(5))
    like = like_release(tmp_path / "like", MIXTRAL)
    monkeypatch.setattr(Directory, "read_into", counted)
    assert run(source, tmp_path / "out", like=like).ok
    stored = sum(array.nbytes for array in fused().values())
    assert stored <= sum(read) <= stored + 4096 + 16, "each byte once, and the description"
    read.clear()
    assert run(source, tmp_path / "cut", like=like, max_shard_size=200).ok
    assert sum(read) - 4096 < 1.5 * stored, "a file reads the chunks that it has a part of"
    # The last chunk belongs to the last expert; a file that ends before it must not miss damage.
    last = source / "shard-00004.safetensors"
    with safe_open(last, "np") as opened:
        assert any("gate_up_proj" in name for name in opened.keys())  # noqa: SIM118
    flip(
        source / "shard-00004.safetensors", (source / "shard-00004.safetensors").stat().st_size - 1
    )
    with pytest.raises(CheckpointCorruptError):
        run(source, tmp_path / "bad", like=like, max_shard_size=100)
    assert not (tmp_path / "bad").exists()


@pytest.mark.parametrize("tool", ["consolidate", "average"])
def test_damage_that_one_of_the_files_met_is_found(
    tmp_path: Path, tool: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A chunk whose end a file does not need is read to its end: the next read may be sound."""
    monkeypatch.setattr("sharded_ema.checkpoint.reading.stream.BLOCK_BYTES", 48)
    monkeypatch.setattr("sharded_ema.tools.sums.BLOCK_BYTES", 48)
    actual, met = Directory.read_into, set[int]()

    def flaky(self: Directory, name: str, buffer: Any, position: int) -> None:
        actual(self, name, buffer, position)
        if position == first.byte_offset and not met:
            met.add(position)
            buffer[0] ^= 1

    sources = [checkpoint(tmp_path / name, fused()) for name in ("c", "d")]
    like = like_release(tmp_path / "like", MIXTRAL)
    fused_key = "ema.layers.0.mlp.experts.gate_up_proj"
    (first,) = open_checkpoint(sources[0]).tensors[fused_key].chunks()
    monkeypatch.setattr(Directory, "read_into", flaky)
    with pytest.raises(CheckpointCorruptError, match="gate_up_proj"):
        if tool == "average":
            average(sources, out=tmp_path / "out", like=like, max_shard_size=100, progress=False)
        else:
            run(sources[0], tmp_path / "out", like=like, max_shard_size=100)
    assert met and not (tmp_path / "out").exists()


def test_experts_in_narrow_dtypes_and_in_means(tmp_path: Path) -> None:
    first = checkpoint(tmp_path / "c", fused(), rows(2))
    other = {name: array * np.float32(0.5) for name, array in fused().items()}
    second = checkpoint(tmp_path / "d", other, ranges(3))
    like = like_release(tmp_path / "like", MIXTRAL)
    given = ["bfloat16", "*.experts.1.w3.weight=float32"]
    assert run(first, tmp_path / "out", like=like, dtype=given).ok
    found = load_torch(tmp_path / "out" / "model.safetensors")
    for name, array in released(MIXTRAL, fused()).items():
        wide = torch.from_numpy(array)
        assert torch.equal(found[name], wide if "1.w3" in name else wide.bfloat16()), name
    report = average([first, second], out=tmp_path / "mean", like=like, progress=False)
    assert report.ok
    wanted = {name: array * np.float32(0.75) for name, array in released(MIXTRAL, fused()).items()}
    assert equal(load_all(tmp_path / "mean"), wanted)


def test_experts_that_are_not_all_there_stay_fused(tmp_path: Path) -> None:
    like = like_release(tmp_path / "like", MIXTRAL)
    arrays = load_file(like / "model.safetensors")
    del arrays["layers.0.block_sparse_moe.experts.4.w3.weight"]
    save_file(arrays, like / "model.safetensors")
    report = run(checkpoint(tmp_path / "c", fused()), tmp_path / "out", like=like)
    assert not report.ok and "gate_up_proj" in report.text() and not (tmp_path / "out").exists()


def test_what_is_frozen_comes_from_a_base_with_its_names(tmp_path: Path) -> None:
    like = like_release(tmp_path / "base", MIXTRAL)
    kept = {name: array for name, array in fused().items() if name != "norm.weight"}
    source = checkpoint(tmp_path / "c", kept, absent={"count": 1, "names": ["norm.weight"]})
    report = run(source, tmp_path / "out", base=like)
    assert report.ok and report.facts["from_base"] == 1
    wanted = released(MIXTRAL, fused()) | {"norm.weight": np.zeros(WIDE, "f4")}
    assert equal(load_all(tmp_path / "out"), wanted)


# ---------------------------------------------------------------------- ties


def test_tied_weights_are_stored_once_by_torch(tmp_path: Path) -> None:
    tied = {"aliases": {"a": ["b"]}}
    source = checkpoint(tmp_path / "c", {"a": np.ones((100, 100), "f4")}, **tied)
    report = run(source, tmp_path / "out", format="torch", tied="emit")
    assert report.facts["tensors"] == 2 and report.facts["bytes"] == 40_000
    found = torch.load(tmp_path / "out" / "pytorch_model.bin", weights_only=True)
    assert found.keys() == {"a", "b"} and found["a"].data_ptr() == found["b"].data_ptr()
    assert (tmp_path / "out" / "pytorch_model.bin").stat().st_size < 60_000
    # In two dtypes they are two tensors.
    run(source, tmp_path / "two", format="torch", dtype=["float32", "b=float16"])
    found = torch.load(tmp_path / "two" / "pytorch_model.bin", weights_only=True)
    assert found["a"].dtype == torch.float32 and found["b"].dtype == torch.float16


# ---------------------------------------------------------------------- where it came from


@pytest.mark.parametrize("format", ["safetensors", "torch", "dcp"])
def test_verify_finds_where_an_export_came_from(tmp_path: Path, format: str, capsys: Any) -> None:
    source = checkpoint(tmp_path / "c", weights())
    out = tmp_path / "out"
    assert run(source, out, format=format, max_shard_size=100).ok
    report = verify(out)
    said = report.facts["provenance"]
    manifest = json.loads((source / "manifest.json").read_text())
    assert report.ok and said == {
        "kind": "ema", "profile": "ema", "step": 100, "num_updates": 100, "decay": 0.999,
        "schedule": {"type": "Constant", "decay": 0.999}, "source": UUID,
        "source_digest": manifest["digest"],
    }  # fmt: skip
    assert main(["verify", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["facts"]["provenance"] == said
    files = [p for p in out.iterdir() if p.suffix in (".safetensors", ".bin", ".distcp")]
    assert report.facts["files"] == len(files) + (format == "dcp")
    for file in files[:2]:
        for position in (file.stat().st_size // 2, file.stat().st_size - 1):
            flip(file, position)
            assert not verify(out).ok and main(["verify", str(out)]) == 1
            flip(file, position)
    files[0].unlink()
    assert not verify(out).ok
    with pytest.raises(ConfigError, match="diff"):
        verify(out, model=source)


def test_each_file_goes_its_own_way(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "c", weights())
    run(source, tmp_path / "out", max_shard_size=100)
    file = min((tmp_path / "out").glob("*.safetensors"))
    assert verify(file).ok and verify(file).facts["provenance"]["source"] == UUID
    text = file.read_bytes().replace(b'"step":"100"', b'"step":"101"')
    file.write_bytes(text)
    assert not verify(file).ok
    # A file of another save among them is not the same export.
    make(tmp_path / "d", {f"ema.{n}": a for n, a in weights().items()}, uuid=UUID[::-1])
    run(tmp_path / "d", tmp_path / "other", max_shard_size=100)
    file.write_bytes((tmp_path / "other" / file.name).read_bytes())
    report = verify(tmp_path / "out")
    assert not report.ok and "another export" in report.text()


def test_what_is_no_export_is_none(tmp_path: Path) -> None:
    save_file(weights(), tmp_path / "model.safetensors")
    with pytest.raises(CheckpointNotFoundError):
        verify(tmp_path)
    sources = [checkpoint(tmp_path / name, weights()) for name in ("c", "d")]
    average(sources, out=tmp_path / "mean", progress=False)
    said = verify(tmp_path / "mean").facts["provenance"]
    assert said["sources"] == [str(source) for source in sources] and said["weights"] == [0.5, 0.5]
    assert [save["source"] for save in said["saves"]] == [UUID, UUID]
