"""What is measured of a model: its loss on the held-out text, and the text that it writes."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from training.model import token_losses
from training.ranks import Ranks


@torch.no_grad()
def held_out_loss(
    model: nn.Module,
    windows: torch.Tensor,
    ranks: Ranks,
    batch_size: int,
    precision: AbstractContextManager[Any],
) -> float:
    """Mean loss per token over ``windows``; every rank takes its part and gets the result.

    A sharded forward pass is collective, so all ranks make equally many of them, of the same
    size; where the sequences do not divide, some are computed and not counted.
    """
    share = -(-len(windows) // ranks.parts)
    mine = torch.arange(share) * ranks.parts + ranks.part
    counted = (mine < len(windows)).to(ranks.device, torch.float64)
    part = windows[mine.clamp(max=len(windows) - 1)].to(ranks.device)
    total = torch.zeros((), dtype=torch.float64, device=ranks.device)
    was_training = model.training
    model.eval()
    try:
        with precision:
            for start in range(0, share, batch_size):
                these = slice(start, start + batch_size)
                sums = token_losses(model, part[these]).double().sum(dim=1)
                total += (sums * counted[these]).sum()
    finally:
        model.train(was_training)
    return float(ranks.sum(total)) / (len(windows) * (windows.shape[1] - 1))


def loss_of_export(model: PreTrainedModel, windows: torch.Tensor) -> float:
    """Mean loss per token of a whole model in this one process, on the CPU."""
    alone = Ranks(0, 1, torch.device("cpu"))
    return held_out_loss(model, windows, alone, batch_size=16, precision=nullcontext())


def half_precision_model(
    config: PreTrainedConfig, weights: Mapping[str, torch.Tensor]
) -> PreTrainedModel:
    """A model with these weights rounded to bfloat16, in which it also computes.

    It is built in bfloat16, as ``from_pretrained`` builds it: ``model.to(torch.bfloat16)`` would
    round the frequencies of rotary embeddings too.
    """
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict({name: value.to(torch.bfloat16) for name, value in weights.items()})
    return model


def greedy(model: PreTrainedModel, prompt: list[int], length: int) -> list[int]:
    """The ``length`` most likely tokens after the prompt, in turn, or as many as there is room.

    Computed on one thread: sums in another order can make another token the most likely one.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _generate(model, prompt, length, do_sample=False, min_new_tokens=length)
    finally:
        torch.set_num_threads(threads)


def sample(model: PreTrainedModel, prompt: list[int], length: int, seed: int) -> list[int]:
    """A continuation of the prompt, drawn at random."""
    torch.manual_seed(seed)
    return _generate(model, prompt, length, do_sample=True, temperature=0.7)


@torch.no_grad()
def _generate(model: PreTrainedModel, prompt: list[int], length: int, **how: Any) -> list[int]:
    start = torch.tensor([prompt])
    room = model.config.max_position_embeddings - start.shape[1]
    how["max_new_tokens"] = max(1, min(length, room))
    if "min_new_tokens" in how:
        how["min_new_tokens"] = how["max_new_tokens"]
    generate: Any = model.generate  # typed as a submodule by nn.Module
    model.eval()
    output = generate(start, attention_mask=torch.ones_like(start), pad_token_id=0, **how)
    return output[0, start.shape[1] :].tolist()
