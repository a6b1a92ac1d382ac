"""An export writes the text that the average writes in training."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from sharded_ema import ShardedEMA, consolidate
from sharded_ema.cli import main


@torch.no_grad()
def greedy(model: PreTrainedModel) -> Tensor:
    start = torch.tensor([[7, 3, 11]])
    output: Tensor = model.generate(
        start, attention_mask=torch.ones_like(start), max_new_tokens=40, min_new_tokens=40,
        do_sample=False, pad_token_id=0,
    )  # fmt: skip
    return output


def in_bfloat16(model: PreTrainedModel) -> PreTrainedModel:
    """Rounded weights in a model built for them; ``to()`` would round rotary frequencies too."""
    rounded = AutoModelForCausalLM.from_config(model.config, dtype=torch.bfloat16)
    rounded.load_state_dict(model.state_dict())
    return rounded.eval()


@pytest.mark.parametrize("tied", [False, True])
def test_bfloat16_export_writes_the_text_of_the_average(tmp_path: Path, tied: bool) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64,
        tie_word_embeddings=tied, initializer_range=0.2, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-2)
    ema = ShardedEMA(model, 0.8)
    ema.attach(optimizer)
    for _ in range(8):
        tokens = torch.randint(2, 64, (4, 16))
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    with ema.swap():
        average = in_bfloat16(model)
    wanted = greedy(average)
    assert not torch.equal(wanted, greedy(in_bfloat16(model))), "can differ"
    ema.save(tmp_path / "ema", step=8)
    ema.close()
    (tmp_path / "hf").mkdir()
    model.config.dtype = None
    model.config.save_pretrained(tmp_path / "hf")
    line = ["consolidate", str(tmp_path / "ema"), str(tmp_path / "out"), "--dtype", "bfloat16"]
    assert main([*line, "--like", str(tmp_path / "hf"), "--max-shard-size", "20KB"]) == 0
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert torch.equal(greedy(loaded.eval()), wanted)
    report = consolidate(
        tmp_path / "ema", tmp_path / "bin", dtype="bfloat16", format="torch", tied="emit",
        like=tmp_path / "hf", progress=False,
    )  # fmt: skip
    assert report.ok
    found = torch.load(tmp_path / "bin" / "pytorch_model.bin", weights_only=True)
    average.load_state_dict(found, strict=True)
    assert torch.equal(greedy(average), wanted)
