"""One model out of many shards: the right bytes, all checked, in little memory, or nothing."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as load_torch

from sharded_ema.checkpoint.run import open_checkpoint
from sharded_ema.checkpoint.writing.stock_writer import StockStorageWriter
from sharded_ema.errors import (
    CheckpointCorruptError,
    CheckpointError,
    CheckpointExistsError,
    CheckpointMismatchError,
    CheckpointNotFoundError,
    CheckpointUncommittedError,
    ConfigError,
    EMAError,
)
from sharded_ema.tools.average import average
from sharded_ema.tools.consolidate import consolidate
from tests.helpers.checkpoints import (
    UUID,
    Chunking,
    flip,
    grid,
    make,
    meta,
    meta_bytes,
    ranges,
    rows,
    whole,
)

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
ALL = [whole, rows(3), grid, ranges(3)]


def weights() -> dict[str, np.ndarray]:
    random = np.random.default_rng(1)

    def floats(*shape: int) -> np.ndarray:
        return np.asarray(random.standard_normal(shape), "f4")

    return {
        "layers.2.w": floats(9, 6), "layers.10.w": floats(5, 6, 7), "bias": floats(11),
        "scale": floats(), "empty": floats(0, 4), "conv": floats(3, 2, 4, 5),
    }  # fmt: skip


def checkpoint(path: Path, chunking: Chunking = whole, **options) -> Path:
    tensors = {f"ema.{name}": array for name, array in weights().items()}
    tensors |= {"_frozen.head": np.arange(6, dtype="f4").reshape(2, 3)}
    tensors |= {"_buffers.count": np.array(7), "_buffers.mask": np.array([True, False])}
    return make(path, tensors, chunking, **options)


def expected() -> dict[str, np.ndarray]:
    return weights() | {
        "head": np.arange(6, dtype="f4").reshape(2, 3),
        "count": np.array(7),
        "mask": np.array([True, False]),
    }


def equal(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> bool:
    return found.keys() == wanted.keys() and all(
        found[k].dtype == a.dtype and np.array_equal(found[k], a) for k, a in wanted.items()
    )


def run(source: Path, target: Path, **options):
    return consolidate(source, target, progress=False, **options)


@pytest.mark.parametrize("block", [8, 64, 1 << 22])
@pytest.mark.parametrize("chunking", ALL)
def test_any_chunking_gives_the_same_model(
    tmp_path: Path, chunking: Chunking, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sharded_ema.checkpoint.reading.stream.BLOCK_BYTES", block)
    report = run(checkpoint(tmp_path / "c", chunking), tmp_path / "out")
    assert report.ok
    assert equal(load_file(tmp_path / "out" / "model.safetensors"), expected())


def test_header_says_what_it_is(tmp_path: Path) -> None:
    run(checkpoint(tmp_path / "c"), tmp_path / "out")
    with safe_open(tmp_path / "out" / "model.safetensors", "np") as opened:
        said = opened.metadata()
    manifest = json.loads((tmp_path / "c" / "manifest.json").read_text())
    assert len(said.pop("digest")) == 32
    assert said == {
        "format": "pt", "kind": "ema", "profile": "ema", "decay": "0.999", "num_updates": "100",
        "schedule": '{"decay": 0.999, "type": "Constant"}', "step": "100", "source": UUID,
        "source_digest": manifest["digest"],
    }  # fmt: skip


def test_several_files_and_jobs(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "c", rows(2))
    run(source, tmp_path / "out", max_shard_size=300, jobs=3)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = sorted(p.name for p in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    found: dict[str, np.ndarray] = {}
    for name in files:
        part = load_file(tmp_path / "out" / name)
        assert all(index["weight_map"][key] == name for key in part)
        assert len(part) == 1 or sum(a.nbytes for a in part.values()) <= 300
        found |= part
    assert equal(found, expected())
    assert index["metadata"]["total_size"] == sum(a.nbytes for a in expected().values())


SPECIAL = [0.0, -0.0, 1.0, 1 + 2**-8, 1 + 3 * 2**-8, 65519.0, 65520.0, 1e-40, -1e-7, 3.3895e38,
           float("inf"), float("-inf"), float("nan")]  # fmt: skip


@pytest.mark.parametrize("target", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("source", ["float64", "float32", "bfloat16", "float16"])
def test_conversions_are_those_of_torch(tmp_path: Path, source: str, target: str) -> None:
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (5000,), generator=generator).to(torch.int32)
    values = torch.cat([torch.tensor(SPECIAL), bits.view(torch.float32)]).to(getattr(torch, source))
    if source == "bfloat16":
        array, dtypes = values.view(torch.uint16).numpy(), {"ema.w": "BF16"}
    else:
        array, dtypes = values.numpy(), None
    tensors = {"ema.w": array, "_buffers.n": np.arange(3)}
    run(make(tmp_path / "c", tensors, dtypes=dtypes), tmp_path / "out", dtype=target)
    found = load_torch(tmp_path / "out" / "model.safetensors")
    wanted = values.to(getattr(torch, target))
    assert found["w"].dtype == wanted.dtype and found["n"].dtype == torch.int64
    assert torch.equal(found["w"].isnan(), wanted.isnan())
    good = ~wanted.isnan()
    bits_found, bits_wanted = (
        t[good].view(torch.int32 if target == "float32" else torch.int16)
        for t in (found["w"], wanted)
    )
    assert torch.equal(bits_found, bits_wanted)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_what_float16_cannot_hold_is_told(tmp_path: Path, dtype: str) -> None:
    values = np.array([65519.0, 65520.0, -7e4, np.inf, -np.inf, np.nan, 1e38], "f4")
    make(tmp_path / "c", {"ema.a": values, "ema.b": np.array([1e9, 2.0], "f4")}, rows(2))
    options: dict[str, Any] = {"dtype": dtype, "progress": False, "max_shard_size": 20}
    report = consolidate(tmp_path / "c", tmp_path / "out", **options)
    mean = average([tmp_path / "c", tmp_path / "c"], out=tmp_path / "mean", **options)
    for each in (report, mean):
        assert each.ok
        told = [note for note in each.notes if "beyond float16's 65504" in note]
        assert [note.split()[0] for note in told] == (["4"] if dtype == "float16" else [])


def test_profiles(tmp_path: Path) -> None:
    profiles = {n: meta()["profiles"]["ema"] for n in ("fast", "slow")}
    tensors = {"fast.w": np.ones(3, "f4"), "slow.w": np.zeros(3, "f4"), "_frozen.f": np.ones(2)}
    source = make(tmp_path / "c", tensors, metas={"": meta(profiles=profiles)})
    with pytest.raises(CheckpointMismatchError, match=r"fast.*slow"):
        run(source, tmp_path / "out")
    run(source, tmp_path / "out", profile="slow")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert set(found) == {"w", "f"} and not found["w"].any()


def test_prefixes(tmp_path: Path) -> None:
    tensors = {"a.ema.w": np.ones(3, "f4"), "b.ema.w": np.zeros(3, "f4"), "model.w": np.ones(9)}
    source = make(tmp_path / "c", tensors, metas={"a.": meta(), "b.": meta()})
    with pytest.raises(CheckpointMismatchError, match=r"a\..*b\."):
        run(source, tmp_path / "out")
    run(source, tmp_path / "out", prefix="b.")
    assert equal(load_file(tmp_path / "out" / "model.safetensors"), {"w": np.zeros(3, "f4")})


def test_tied_weights(tmp_path: Path) -> None:
    tensors = {"ema.embed": np.ones((3, 2), "f4")}
    said = {"": meta(aliases={"embed": ["head"]})}
    source = make(tmp_path / "c", tensors, metas=said)
    run(source, tmp_path / "drop", tied="drop")
    run(source, tmp_path / "emit", tied="emit")
    run(source, tmp_path / "default")
    assert set(load_file(tmp_path / "drop" / "model.safetensors")) == {"embed"}
    for name in ("emit", "default"):
        both = load_file(tmp_path / name / "model.safetensors")
        assert equal(both, {"embed": np.ones((3, 2), "f4"), "head": np.ones((3, 2), "f4")})
    like = tmp_path / "like"
    like.mkdir()
    (like / "config.json").write_text("{}")
    run(source, tmp_path / "config", like=like)
    assert set(load_file(tmp_path / "config" / "model.safetensors")) == {"embed"}
    save_file({"head": np.zeros((3, 2), "f4")}, like / "model.safetensors")
    assert run(source, tmp_path / "as", like=like).ok
    assert set(load_file(tmp_path / "as" / "model.safetensors")) == {"head"}


def like_directory(path: Path, arrays: dict[str, np.ndarray]) -> Path:
    path.mkdir()
    save_file(arrays, path / "model.safetensors")
    for name in ("config.json", "tokenizer.json", "generation_config.json"):
        (path / name).write_text(name)
    (path / "pytorch_model.bin").write_text("weights")
    return path


def test_like_copies_the_description_and_no_weights(tmp_path: Path) -> None:
    like = like_directory(tmp_path / "like", expected())
    assert run(checkpoint(tmp_path / "c"), tmp_path / "out", like=like).ok
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert names == {"config.json", "tokenizer.json", "generation_config.json", "model.safetensors"}
    assert (tmp_path / "out" / "config.json").read_text() == "config.json"
    assert equal(load_file(tmp_path / "out" / "model.safetensors"), expected())


DESCRIPTION = (
    "LICENSE.txt", "README.md", "added_tokens.json", "chat_template.jinja", "config.json",
    "generation_config.json", "merges.txt", "preprocessor_config.json", "processor_config.json",
    "special_tokens_map.json", "spiece.model", "tokenizer.json", "tokenizer.model",
    "tokenizer_config.json", "vocab.json",
)  # fmt: skip
THE_USERS = (
    ".env", ".gitattributes", "config.json.bak", "events.out.tfevents.1", "model.onnx", "notes.txt",
    "optimizer.npz", "optimizer.pt", "passwords.json", "rng_state.pth", "train.log",
    "training_args.bin",
)  # fmt: skip
CODE = ("modeling_mine.py", "configuration_mine.py")


@pytest.mark.parametrize("trust_code", [False, True])
def test_like_copies_what_a_model_needs(tmp_path: Path, trust_code: bool) -> None:
    like = tmp_path / "like"
    like.mkdir()
    for name in (*DESCRIPTION, *THE_USERS, *CODE):
        (like / name).write_text(name)
    report = run(checkpoint(tmp_path / "c"), tmp_path / "out", like=like, trust_code=trust_code)
    names = {p.name for p in (tmp_path / "out").iterdir()}
    wanted = {*DESCRIPTION, *(CODE if trust_code else ())}
    assert names == {*wanted, "model.safetensors"}
    assert all((tmp_path / "out" / name).read_text() == name for name in wanted)
    assert any("modeling_mine.py" in note for note in report.notes) is not trust_code


def test_like_follows_links_into_the_cache_of_the_hub_alone(tmp_path: Path) -> None:
    like, blobs = tmp_path / "models--a--b" / "snapshots" / "1", tmp_path / "models--a--b" / "blobs"
    like.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "0").write_text("{}")
    (like / "config.json").symlink_to("../../blobs/0")
    (tmp_path / "id_rsa").write_text("secret")
    (like / "tokenizer.json").symlink_to(tmp_path / "id_rsa")
    (like / "vocab.json").symlink_to(like / "vocab.json")
    assert run(checkpoint(tmp_path / "c"), tmp_path / "out", like=like).ok
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"config.json", "model.safetensors"}
    assert (tmp_path / "out" / "config.json").read_text() == "{}"


@pytest.mark.parametrize("change", [{"missing.w": np.zeros(3, "f4")}, {"bias": np.zeros(12, "f4")}])
def test_like_that_does_not_fit_publishes_nothing(tmp_path: Path, change: dict) -> None:
    like = like_directory(tmp_path / "like", expected() | change)
    report = run(checkpoint(tmp_path / "c"), tmp_path / "out", like=like)
    assert not report.ok and next(iter(change)) in report.text()
    assert {p.name for p in tmp_path.iterdir()} == {"c", "like"}


def test_absent_tensors_are_told(tmp_path: Path) -> None:
    said = {"": meta(absent={"count": 12, "names": ["x"]})}
    report = run(make(tmp_path / "c", {"ema.w": np.ones(2, "f4")}, metas=said), tmp_path / "out")
    assert report.ok and "12 tensors absent" in report.text()


@pytest.mark.parametrize("chunking", ALL)
def test_a_changed_byte_anywhere_is_found(tmp_path: Path, chunking: Chunking) -> None:
    source = make(tmp_path / "c", {"ema.w": np.ones((6, 5), "f4")}, chunking)
    opened = open_checkpoint(source)
    stored = {(c.file, c.byte_offset, c.num_bytes) for c in opened.tensors["ema.w"].chunks()}
    places = []
    for file in source.iterdir():
        size = file.stat().st_size
        places += [(file, position) for position in [*range(0, min(size, 4096), 211), size - 1]]
    places = [p for p in places if not p[0].name.startswith("shard-") or p[1] < 4096]
    places += [(source / name, start + n - 1) for name, start, n in stored]
    for file, position in places:
        flip(file, position)
        with pytest.raises(CheckpointError):
            run(source, tmp_path / "out")
        assert {p.name for p in tmp_path.iterdir()} == {"c"}, "nothing is left"
        flip(file, position)
    assert run(source, tmp_path / "out").ok


def test_damage_is_named(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "c", rows(3))
    chunk = open_checkpoint(source).tensors["ema.bias"].chunks()[1]
    flip(source / chunk.file, chunk.byte_offset)
    with pytest.raises(CheckpointCorruptError) as caught:
        run(source, tmp_path / "out")
    for fact in ("ema.bias", chunk.file, str(chunk.byte_offset)):
        assert fact in str(caught.value)


@pytest.mark.parametrize("fault", ["truncated", "missing", "extra", "other save", "link"])
def test_wrong_files_are_found(tmp_path: Path, fault: str) -> None:
    source = checkpoint(tmp_path / "c", rows(3))
    shard = source / "shard-00001.safetensors"
    if fault == "truncated":
        shard.write_bytes(shard.read_bytes()[:-1])
    elif fault == "missing":
        shard.unlink()
    elif fault == "extra":
        (source / "shard-00009.safetensors").write_bytes(b"")
    elif fault == "other save":
        data = shard.read_bytes()
        shard.write_bytes(data.replace(UUID.encode(), b"f" * 32))
    else:
        shard.rename(tmp_path / "elsewhere")
        shard.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointCorruptError):
        run(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_uncommitted(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "c")
    (source / "manifest.json").unlink()
    with pytest.raises(CheckpointUncommittedError):
        run(source, tmp_path / "out")
    with pytest.raises(CheckpointUncommittedError):
        run(checkpoint(tmp_path / f"c.tmp-{UUID}"), tmp_path / "out")


def test_targets(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "c")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name in ("full", "file"):
        with pytest.raises(CheckpointExistsError):
            run(source, tmp_path / name)
    assert (tmp_path / "full" / "mine").read_text() == (tmp_path / "file").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    assert run(source, tmp_path / "empty").ok
    assert run(source, tmp_path / "deep" / "er").ok


def test_a_target_inside_the_checkpoint_is_refused(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "c")
    with pytest.raises(EMAError):
        run(source, source / "out")
    open_checkpoint(source)


@pytest.mark.parametrize(
    "options", [{"dtype": "int8"}, {"tied": "both"}, {"jobs": 0}, {"max_shard_size": "much"}]
)
def test_wrong_use(tmp_path: Path, options: dict) -> None:
    with pytest.raises(ConfigError):
        run(checkpoint(tmp_path / "c"), tmp_path / "out", **options)
    assert {p.name for p in tmp_path.iterdir()} == {"c"}


def stock_state() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "ema.w": torch.randn(6, 5), "ema.t": torch.randn(6, 5).t(), "ema.s": torch.tensor(4.6),
        "ema.c": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "_buffers.n": torch.arange(3), "_meta": torch.from_numpy(meta_bytes().copy()),
    }  # fmt: skip


def check_stock(target: Path) -> None:
    found = load_torch(target / "model.safetensors")
    wanted = {k.split(".", 1)[1]: t for k, t in stock_state().items() if k != "_meta"}
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[k], t) for k, t in wanted.items())


def test_a_foreign_checkpoint(tmp_path: Path) -> None:
    dcp.save({"ema": stock_state(), "step": 3}, checkpoint_id=tmp_path / "c", no_dist=True)
    report = run(tmp_path / "c", tmp_path / "out")
    assert report.ok and report.facts["metadata"] == "unverified"
    check_stock(tmp_path / "out")


def save_stock(path: Path) -> Path:
    dcp.save(stock_state(), storage_writer=StockStorageWriter(path), no_dist=True)
    return path


def test_our_commit_of_the_stock_format(tmp_path: Path) -> None:
    report = run(save_stock(tmp_path / "c"), tmp_path / "out")
    assert report.facts["metadata"] == "verified"
    check_stock(tmp_path / "out")


@pytest.mark.parametrize("crc", [True, False])
def test_a_changed_byte_of_the_stock_format_is_found(tmp_path: Path, crc: bool) -> None:
    torch.serialization.set_crc32_options(crc)
    try:
        source = save_stock(tmp_path / "c")
    finally:
        torch.serialization.set_crc32_options(True)
    (chunk,) = open_checkpoint(source).tensors["ema.w"].chunks()
    for position in (chunk.byte_offset, chunk.byte_offset - 5, chunk.byte_offset + 60):
        flip(source / chunk.file, position)
        with pytest.raises(CheckpointError):
            run(source, tmp_path / "out")
        flip(source / chunk.file, position)
    assert run(source, tmp_path / "out").ok


# ru_maxrss would include the peak of the process that started this one.
PEAK = """
import re, sys
from pathlib import Path
from typing import Any
from sharded_ema.tools.average import average
from sharded_ema.tools.consolidate import consolidate
assert consolidate(sys.argv[1], sys.argv[2], progress=False, dtype="bfloat16").ok
assert "torch" not in sys.modules
print(int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) // 1024)
"""


@pytest.mark.parametrize("shape", [(4096, 12288), (2, 4096, 6144)])
@pytest.mark.parametrize("chunking", [rows(2), grid])
def test_memory_is_bounded(tmp_path: Path, chunking: Chunking, shape: tuple[int, ...]) -> None:
    source = make(tmp_path / "c", {"ema.w": np.ones(shape, "f4")}, chunking)  # 200 MB
    command = [sys.executable, "-c", PEAK, str(source), str(tmp_path / "out")]
    peak = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(peak.stdout) < 128, "megabytes"


def test_a_checkpoint_of_deepspeed(tmp_path: Path) -> None:
    for step in (1, 2):
        tag = tmp_path / "run" / f"global_step{step}"
        make(tag / "ema", {"ema.w": np.full(3, step, "f4")})
        (tag / "mp_rank_00_model_states.pt").write_bytes(b"weights of DeepSpeed")
    (tmp_path / "run" / "latest").write_text("global_step2\n")
    for number, (path, step) in enumerate(
        [("run", 2), ("run/latest", 2), ("run/global_step1", 1), ("run/global_step1/ema", 1)]
    ):
        run(tmp_path / path, tmp_path / f"out{number}")
        found = load_file(tmp_path / f"out{number}" / "model.safetensors")
        assert equal(found, {"w": np.full(3, step, "f4")})


def test_a_checkpoint_of_deepspeed_without_an_average(tmp_path: Path) -> None:
    tag = tmp_path / "run" / "tag"
    tag.mkdir(parents=True)
    (tag / "mp_rank_00_model_states.pt").write_bytes(b"weights of DeepSpeed")
    (tmp_path / "run" / "latest").write_text("tag")
    for path in (tag, tmp_path / "run"):
        with pytest.raises(CheckpointNotFoundError, match="zero_to_fp32"):
            run(path, tmp_path / "out")
    make(tag / "ema.tmp-0", {"ema.w": np.ones(3, "f4")})
    with pytest.raises(CheckpointNotFoundError, match="zero_to_fp32"):
        run(tag, tmp_path / "out")
    (tmp_path / "run" / "latest").write_text("gone")
    with pytest.raises(CheckpointNotFoundError):
        run(tmp_path / "run", tmp_path / "out")


def test_progress_tells_rate_and_remaining_time(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    consolidate(checkpoint(tmp_path / "c"), tmp_path / "out")
    shown = capsys.readouterr().err
    assert "consolidate" in shown and "B/s" in shown and "<" in shown and "100%" in shown


def test_an_error_in_one_of_several_jobs_stops_all(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "c", rows(2))
    chunk = open_checkpoint(source).tensors["ema.layers.10.w"].chunks()[0]
    flip(source / chunk.file, chunk.byte_offset)
    with pytest.raises(CheckpointCorruptError, match="layers"):
        run(source, tmp_path / "out", max_shard_size=100, jobs=4)
    assert {p.name for p in tmp_path.iterdir()} == {"c"}


@pytest.mark.parametrize(
    ("left", "updates", "told"),
    [
        (0.3, 100, "30% of the average 'ema' is still the weights .* after 1,791 more steps"),
        (0.05, 100, None),
        (1.0, 0, None),  # it has not begun, so it is the weights
    ],
)
def test_an_average_that_is_its_seed_is_told(
    tmp_path: Path, left: float, updates: int, told: str | None
) -> None:
    profiles = {
        "ema": {
            "schedule": {"type": "Constant", "decay": 0.999},
            "decay": 0.999,
            "seed_weight": left,
        }
    }
    described = meta(profiles=profiles, num_updates=updates)
    source = make(tmp_path / "c", {"ema.w": np.ones(3, "f4")}, metas={"": described})
    notes = consolidate(source, tmp_path / "out", progress=False).notes
    assert len(notes) == (told is not None)
    if told is not None:
        assert re.search(told, notes[0]) and "sharded-ema advise" in notes[0]
