"""Tied weights in ``average`` and ``diff``: stored under one name, another, or both."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from sharded_ema.errors import CheckpointMismatchError
from sharded_ema.tools.average import average
from sharded_ema.tools.diff import diff
from tests.helpers.checkpoints import make, meta

TIED = {"tie_word_embeddings": True}
RANDOM = np.random.default_rng(5)
Arrays = dict[str, np.ndarray]


def model(path: Path, tensors: Arrays, config: Any = TIED) -> Path:
    path.mkdir()
    save_file(tensors, path / "model.safetensors")
    if config is not None:
        (path / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    return path


def weights(embed: str, value: np.ndarray, *others: str) -> Arrays:
    return {"norm.weight": value[0].copy()} | {n: value.copy() for n in (embed, *others)}


@pytest.mark.parametrize("config", [TIED, {"text_config": TIED}, {"model_type": "gpt2"}])
@pytest.mark.parametrize(
    ("embed", "head"),
    [("model.embed_tokens.weight", "lm_head.weight"), ("transformer.wte.weight", "lm_head.weight"),
     ("shared.weight", "encoder.embed_tokens.weight"),
     ("model.decoder.embed_tokens.weight", "proj_out.weight")],
)  # fmt: skip
def test_one_has_a_copy(embed: str, head: str, config: Any, tmp_path: Path) -> None:
    a, b = RANDOM.random((2, 6, 4))
    first = model(tmp_path / "a", weights(embed, a), config)
    second = model(tmp_path / "b", weights(embed, b, head), config)
    for number, (inputs, names) in enumerate(
        (([first, second], {embed, head}), ([second, first], {embed}))
    ):
        out = tmp_path / str(number)
        assert average(inputs, out=out, progress=False).ok
        found = load_file(out / "model.safetensors")
        assert found.keys() == names | {"norm.weight"}
        assert all(np.array_equal(found[name], (a + b) / 2) for name in names)
    twin = model(tmp_path / "twin", weights(embed, b), config)
    for sides in ((twin, second), (second, twin)):
        report = diff(*sides)
        assert report.ok and report.facts["compared_tensors"] >= 2, report.text()
    assert not diff(first, second).ok


def test_each_has_another_name(tmp_path: Path) -> None:
    value = RANDOM.random((6, 4))
    first = model(tmp_path / "a", weights("embed_tokens.weight", value))
    second = model(tmp_path / "b", weights("lm_head.weight", value))
    assert diff(first, second).ok and diff(second, first).ok
    assert average([first, second], out=tmp_path / "out", progress=False).ok
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == {"norm.weight", "lm_head.weight"}


def test_what_is_not_tied(tmp_path: Path) -> None:
    value = RANDOM.random((6, 4))
    first = model(tmp_path / "a", weights("embed_tokens.weight", value), {"model_type": "x"})
    own = weights("embed_tokens.weight", value) | {"lm_head.weight": value + 1}
    untied = {"tie_word_embeddings": False}
    for name, tensors, config in (
        ("another head", own, TIED),  # which a file holds although the configuration ties it
        ("another shape", own | {"lm_head.weight": value[:3].copy()}, TIED),
        ("another name", weights("embed_tokens.weight", value, "score.weight"), TIED),
    ):
        second = model(tmp_path / name, tensors, config)
        assert not diff(first, second).ok and not diff(second, first).ok, name
        with pytest.raises(CheckpointMismatchError, match="1 tensors that"):
            average([second, first], out=tmp_path / "out", progress=False)
    tensors = weights("embed_tokens.weight", value, "lm_head.weight")
    pairs = [(untied, untied), (None, None), ("no JSON", None)]
    for number, (one, other) in enumerate(pairs):
        a = model(tmp_path / f"{number}a", weights("embed_tokens.weight", value), one)
        b = model(tmp_path / f"{number}b", tensors, other)
        assert not diff(a, b).ok and not diff(b, a).ok


def test_with_a_checkpoint_of_ours_and_a_file_of_torch(tmp_path: Path) -> None:
    value = RANDOM.random((6, 4))
    said = {"": meta(aliases={"embed_tokens.weight": ["lm_head.weight"]})}
    stored = {f"ema.{name}": v for name, v in weights("embed_tokens.weight", value).items()}
    ours = make(tmp_path / "c", stored, metas=said)
    both = weights("embed_tokens.weight", value, "lm_head.weight")
    torch.save({n: torch.from_numpy(v) for n, v in both.items()}, tmp_path / "both.pt")
    one = model(tmp_path / "one", weights("embed_tokens.weight", value))
    sides = [ours, tmp_path / "both.pt", one, model(tmp_path / "both", both)]
    for a in sides:
        for b in sides:
            assert diff(a, b).ok, (a, b)
    for number, inputs in enumerate(([*sides], [*reversed(sides)], [sides[3], sides[2], sides[1]])):
        out = tmp_path / str(number)
        assert average(inputs, out=out, progress=False).ok
        found = load_file(out / "model.safetensors")
        assert all(np.allclose(v, both[n], rtol=1e-15) for n, v in found.items())
    report = average([tmp_path / "both.pt", ours], out=tmp_path / "l", like=one, progress=False)
    assert report.ok and load_file(tmp_path / "l" / "model.safetensors").keys() == {
        "norm.weight", "embed_tokens.weight",
    }  # fmt: skip
