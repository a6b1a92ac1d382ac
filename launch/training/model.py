"""The model to train: its configuration and weights, its loss, optimizer and learning rate."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from training.options import Options
from training.ranks import RunError

VOCABULARY = 256  # a token is a byte


def build_config(options: Options) -> PreTrainedConfig:
    """The configuration that the flags describe, or the one in ``--model``.

    Raises:
        RunError: ``--model`` has no usable configuration, or one too small for the run.
    """
    if options.model is None:
        return LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=options.hidden_size,
            intermediate_size=options.intermediate_size,
            num_hidden_layers=options.layers,
            num_attention_heads=options.heads,
            num_key_value_heads=options.kv_heads,
            max_position_embeddings=options.context,
            tie_word_embeddings=options.tie_embeddings,
            # Width-scaled (Nguyen and Salazar 2019); the usual 0.02 suits a width of 1,000 and
            # holds a small model at the level of single-byte statistics for 100 steps.
            initializer_range=math.sqrt(2 / (5 * options.hidden_size)),
            bos_token_id=0,  # the byte between documents both ends one and begins the next
            eos_token_id=0,
        )
    if not (options.model / "config.json").is_file():  # or else transformers asks the Hub
        raise RunError(f"--model {options.model}: no config.json there")
    try:
        config = AutoConfig.from_pretrained(options.model)
    except ValueError as error:
        raise RunError(f"--model {options.model}: {error}") from None
    if config.vocab_size < VOCABULARY:
        raise RunError(f"--model {options.model}: vocab_size {config.vocab_size} is below 256")
    longest = getattr(config, "max_position_embeddings", None) or options.context
    if longest < options.context:
        raise RunError(f"--context {options.context} exceeds the model's {longest} positions")
    return config


def build_model(
    config: PreTrainedConfig, options: Options, device: torch.device
) -> PreTrainedModel:
    """The bare model with fresh weights, the same on every rank and at every number of ranks."""
    torch.manual_seed(options.seed)
    dtype = torch.bfloat16 if options.pure_bf16 else torch.float32
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    if options.activation_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    if options.compile:
        for block in blocks(model):
            block.compile()
    return model.to(device)


def blocks(model: PreTrainedModel) -> list[nn.Module]:
    """The transformer blocks, by the class names that the model declares."""
    names = set(model._no_split_modules or ())
    return [module for module in model.modules() if type(module).__name__ in names]


def token_losses(model: nn.Module, windows: torch.Tensor) -> torch.Tensor:
    """Cross-entropy in nats of each next byte: ``(sequences, context)`` in float32."""
    logits = model(input_ids=windows[:, :-1], use_cache=False).logits
    flat = functional.cross_entropy(
        logits.float().flatten(0, 1), windows[:, 1:].flatten(), reduction="none"
    )
    return flat.view(windows.shape[0], -1)


def parameter_groups(model: nn.Module, options: Options) -> list[dict[str, Any]]:
    """What is trained; weight decay for matrices only, as usual for transformers."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": options.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]


def build_optimizer(groups: list[dict[str, Any]], options: Options) -> torch.optim.AdamW:
    """AdamW over some parameter groups."""
    # fused: one call for all tensors; the plain loop costs more than the model on small shards.
    return torch.optim.AdamW(
        groups, lr=options.lr, betas=(options.beta1, options.beta2), fused=True
    )


def learning_rate(step: int, options: Options) -> float:
    """Rate of the ``step``-th optimizer step (from 1): linear warm-up, then a cosine.

    A function of the step alone, so that a resumed run needs no state for it.
    """
    if step <= options.warmup_steps:
        return options.lr * step / options.warmup_steps
    done = (step - options.warmup_steps) / max(1, options.steps - options.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    return options.lr * (options.min_lr_ratio + (1 - options.min_lr_ratio) * cosine)


def save_description(model: PreTrainedModel, path: Path) -> None:
    """Write what an export of the bare ``model`` needs beside its weights: its configurations."""
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    config.dtype = None  # the file of weights says it; a stale value here would win on loading
    path.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(path)
    (model.generation_config or GenerationConfig.from_model_config(config)).save_pretrained(path)
