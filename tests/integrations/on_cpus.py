"""FSDP and DeepSpeed by accelerate, and so by Trainer, on CPUs. Imported before either.

accelerate takes FSDP for a kind of training on GPUs and makes DDP of it here; with this its state
says FSDP, and all that follows is accelerate's own code. DeepSpeed would compile a part that gloo
replaces.
"""

from __future__ import annotations

import os
from typing import Any

os.environ |= {"DS_ACCELERATOR": "cpu", "ACCELERATE_TORCH_DEVICE": "cpu", "HF_HUB_OFFLINE": "1"}
import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

AUTO = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size")
_start = AcceleratorState.__init__


def _start_sharding(
    self: AcceleratorState, *args: Any, fsdp_plugin: Any = None, **kwargs: Any
) -> None:
    _start(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
        self.fsdp_plugin = fsdp_plugin
        self.distributed_type = DistributedType.FSDP
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP


AcceleratorState.__init__ = _start_sharding


def zero(stage: int) -> dict[str, Any]:
    """A configuration of DeepSpeed for Trainer to fill in."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    gathers = {"stage3_gather_16bit_weights_on_model_save": True} if stage == 3 else {}
    return {
        **dict.fromkeys((*AUTO, "gradient_clipping"), "auto"),
        "zero_optimization": {"stage": stage, **gathers},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


def tiny_llama(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=32,
            tie_word_embeddings=False,
        )
    )


class Rows(torch.utils.data.Dataset):
    """Arithmetic sequences with a few wrong numbers in them."""

    def __init__(self, n: int = 128, seed: int = 1) -> None:
        draw = torch.Generator().manual_seed(seed)
        start = torch.randint(0, 32, (n, 1), generator=draw)
        noise = torch.rand(n, 8, generator=draw) < 0.1
        self.ids = (start + 3 * torch.arange(8) + noise) % 32

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[i], "labels": self.ids[i]}


def tokenizer() -> PreTrainedTokenizerFast:
    """Of the words 0 to 27, and four that stand for other things."""
    words = {"<pad>": 0, "<unk>": 1, "<bos>": 2, "<eos>": 3} | {str(i): i + 4 for i in range(28)}
    model = Tokenizer(WordLevel(words, unk_token="<unk>"))
    model.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=model,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<bos>",
        eos_token="<eos>",
    )


def text_rows(kind: str, n: int, seed: int) -> Dataset:
    """The like of :class:`Rows` in words, for TRL."""
    draw = torch.Generator().manual_seed(seed)
    starts = torch.randint(0, 28, (n,), generator=draw).tolist()

    def words(start: int, by: int, count: int) -> str:
        return " ".join(str((start + by * i) % 28) for i in range(count))

    if kind == "sft":
        return Dataset.from_dict({"text": [words(s, 3, 8) for s in starts]})
    return Dataset.from_dict(
        {
            "prompt": [words(s, 3, 4) + " " for s in starts],
            "chosen": [words(s + 12, 3, 4) for s in starts],
            "rejected": [words(s + 12, 5, 4) for s in starts],
        }
    )
