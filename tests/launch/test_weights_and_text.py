"""What a run starts from: the weights, drawn part by part, and the text, in tokens and batches."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel

from tests.launch.programs import LAUNCH, ROOT, execute
from training.data import StepSampler, load_corpus, step_batches
from training.flags import parse_options
from training.model import InitialWeights, build_config, build_model
from training.ranks import RunError
from training.tokenizer import Tokenizer, learn_merges, load_tokenizer

CPU = torch.device("cpu")
PATHS = os.pathsep.join(map(str, (ROOT, LAUNCH)))
SHAPE = ["--hidden-size", "64", "--layers", "3", "--context", "16"]


def model_of(*flags: str) -> PreTrainedModel:
    options = parse_options([*SHAPE, *flags])
    return build_model(build_config(options), options)


def is_meta(module: nn.Module) -> bool:
    tensors = [*module.parameters(), *module.buffers()]
    assert len({tensor.is_meta for tensor in tensors}) == 1
    return tensors[0].is_meta


# ---------------------------------------------------------------------- weights


def test_parts_are_filled_one_by_one() -> None:
    model = model_of()
    weights = InitialWeights(model, 0, CPU)
    layers = list(model.model.layers)
    assert weights.parts == [*layers, model] and is_meta(model)
    weights.fill(layers[1])
    assert [is_meta(layer) for layer in layers] == [True, False, True]
    assert is_meta(model.model.embed_tokens) and is_meta(model.model.norm)
    weights.fill_around(layers[0].mlp.up_proj)
    assert [is_meta(layer) for layer in layers] == [False, False, True]


def test_weights_follow_from_seed_and_name_whatever_the_order() -> None:
    one, other, third = model_of(), model_of(), model_of()
    InitialWeights(one, 0, CPU).fill_all()
    torch.randn(7)
    turned = InitialWeights(other, 0, CPU)
    for part in reversed(turned.parts[:-1]):
        turned.fill(part)
    turned.fill_all()
    InitialWeights(third, 1, CPU).fill_all()
    state, same, differs = (model.state_dict() for model in (one, other, third))
    assert all(torch.equal(state[name], same[name]) for name in state)
    matrices = [name for name, value in state.items() if value.ndim == 2]
    assert not any(torch.equal(state[name], differs[name]) for name in matrices)
    # Blocks that began alike would stay alike in what they learn for long.
    first, second = (layer.mlp.up_proj.weight for layer in list(one.model.layers)[:2])
    assert not torch.equal(first, second)


def test_weights_are_what_the_configuration_asks_for() -> None:
    options = parse_options(SHAPE)
    config = build_config(options)
    model = build_model(config, options)
    weights = InitialWeights(model, 0, CPU)
    weights.fill_all()
    drawn = torch.cat([p.detach().flatten() for p in model.parameters() if p.ndim == 2])
    assert drawn.std().item() == pytest.approx(config.initializer_range, rel=0.02)
    assert all(torch.equal(p, torch.ones_like(p)) for p in model.parameters() if p.ndim == 1)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    built = type(model)(config)  # on the CPU, as everybody builds it
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, built.get_buffer(name)), name
    assert weights.matrices == {p for p in model.parameters() if p.ndim == 2}


def test_a_weight_without_a_value_is_told() -> None:
    model = model_of()
    model.model.layers[1].mlp.scale = nn.Parameter(torch.empty(3, device="meta"))
    weights = InitialWeights(model, 0, CPU)
    weights.fill(model.model.layers[0])
    with pytest.raises(RunError, match=r"no initial values to a LlamaMLP in model\.layers\.1"):
        weights.fill(model.model.layers[1])


# ---------------------------------------------------------------------- text


def test_bytes_are_their_own_tokens(tmp_path: Path) -> None:
    tokenizer = Tokenizer([])
    text = np.frombuffer("prüfen\0a b".encode(), np.uint8)
    assert tokenizer.encode(text) is text
    assert tokenizer.encode_prompt("prüfen") == list("prüfen".encode())
    assert tokenizer.decode([*"prüfen".encode(), 300]) == "prüfen"
    tokenizer.save(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded("a ü\n")["input_ids"] == list("a ü\n".encode())


def test_pairs_are_learned_from_the_text(tmp_path: Path) -> None:
    words = b"the cat and the hat\nthe end" * 20
    text = np.frombuffer(b"\0".join([words, words]), np.uint8)
    merges = learn_merges(text, 270)
    assert 0 < len(merges) <= 14 and merges == learn_merges(text, 270)
    tokenizer = Tokenizer(merges)
    ids = tokenizer.encode(text)
    assert len(ids) < len(text) / 2 and ids.max() >= 256
    cut = list(ids).index(0)  # documents stay apart
    for part in (ids[:cut], ids[cut + 1 :]):
        assert tokenizer.decode(part.tolist()) == words.decode()
    tokenizer.save(tmp_path)
    assert load_tokenizer(tmp_path).merges == merges
    assert load_tokenizer(tmp_path).digest == tokenizer.digest != Tokenizer(merges[:-1]).digest
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded("the hat")["input_ids"] == tokenizer.encode_prompt("the hat")
    assert loaded.decode(tokenizer.encode_prompt("the hat")) == "the hat"


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_are_cut_from_one_and_go_on_at_any_step(corpus: Path, workers: int) -> None:
    text = load_corpus([corpus], 100_000, 16).train
    room = len(text) - 16

    def batches(first: int, share: range, workers: int = 0) -> list[torch.Tensor]:
        sampler = StepSampler(3, first, 6, share, room)
        return list(step_batches(text, 16, sampler, workers, CPU))

    torch.manual_seed(0)
    before = torch.get_rng_state()
    whole = batches(1, range(8), workers)
    assert torch.equal(torch.get_rng_state(), before)
    assert len(whole) == 6 and whole[0].shape == (8, 17) and whole[0].dtype == torch.int64
    halves = zip(batches(1, range(4)), batches(1, range(4, 8)), strict=True)
    assert all(torch.equal(torch.cat(pair), one) for pair, one in zip(halves, whole, strict=True))
    assert all(map(torch.equal, batches(4, range(8)), whole[3:]))
    assert len({tuple(row) for one in whole for row in one.tolist()}) > 40
    joined = bytes(text.tolist())
    assert all(bytes(row) in joined for row in whole[0].tolist())


FILLED_IN_A_LARGE_WORLD = """
import json
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
import training.engines.torch as engine
from training.flags import parse_options
from training.model import InitialWeights, build_config, build_model
from training.ranks import Ranks

options = parse_options(["--layers", "8", "--hidden-size", "64", "--parallel", WAY,
                         "--no-async-save"])
dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=8)
ranks = Ranks(0, 8, engine.torch.device("cpu"))
held = []

class Watched(InitialWeights):
    def fill(self, part):
        super().fill(part)
        storages = {}
        for p in self._model.parameters():
            local = p.to_local() if isinstance(p, DTensor) else p
            if not local.is_meta:
                storage = local.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
        held.append(sum(storages.values()))

engine.InitialWeights = Watched
model = build_model(build_config(options), options)
block = sum(p.nbytes for p in model.model.layers[0].parameters())
rest = model.lm_head.weight.nbytes + model.model.norm.weight.nbytes
engine.TorchEngine(model, options, ranks)
print(json.dumps([8 * block + rest, max(block, rest), max(held)]))
"""


@pytest.mark.dist
@pytest.mark.parametrize("way", ["fsdp2", "fsdp1"])
def test_a_rank_holds_its_shards_and_one_part(way: str) -> None:
    program = f"WAY = {way!r}\n{FILLED_IN_A_LARGE_WORLD}"
    done = execute("-c", program, add={"RANK": "0", "WORLD_SIZE": "8", "PYTHONPATH": PATHS}).good()
    whole, part, most = json.loads(done.out.splitlines()[-1])
    assert part < most <= part + 1.1 * whole / 8 < whole / 2
