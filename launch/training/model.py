"""The model to train: its configuration and weights, its loss, optimizer and learning rate."""

from __future__ import annotations

import copy
import math
from collections.abc import Container, Sequence
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

from training.data import stable_hash
from training.options import Options
from training.ranks import RunError
from training.tokenizer import Tokenizer


def build_config(options: Options) -> PreTrainedConfig:
    """The configuration that the flags describe, or the one in ``--model``.

    Raises:
        RunError: ``--model`` has no usable configuration, or one too small for the run.
    """
    if options.model is None:
        return LlamaConfig(
            vocab_size=options.vocab_size,
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
    if config.vocab_size < options.vocab_size:
        raise RunError(
            f"--model {options.model}: its vocab_size {config.vocab_size} is below the "
            f"{options.vocab_size} of --vocab-size"
        )
    longest = getattr(config, "max_position_embeddings", None) or options.context
    if longest < options.context:
        raise RunError(f"--context {options.context} exceeds the model's {longest} positions")
    return config


def build_model(config: PreTrainedConfig, options: Options) -> PreTrainedModel:
    """The bare model on the meta device: shapes, and no memory. ``InitialWeights`` fills it."""
    dtype = torch.bfloat16 if options.pure_bf16 else torch.float32
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    if options.activation_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    if options.compile:
        for block in blocks(model):
            block.compile()
    return model


def blocks(model: PreTrainedModel) -> list[nn.Module]:
    """The transformer blocks, by the class names that the model declares."""
    names = set(model._no_split_modules or ())
    return [module for module in model.modules() if type(module).__name__ in names]


class InitialWeights:
    """Fresh weights of a model on the meta device, part by part.

    A part is a transformer block, or what is left when all blocks are filled. What spreads the
    model fills a part, shards it, and goes on with the next, so that no rank ever holds more than
    its shards and one part. A part has a seed of its own, by its name: its weights are the same on
    every rank, at every number of ranks and in whatever way the model is spread.

    Attributes:
        parts: the blocks in order, and at last the model itself, which stands for the rest.
        matrices: of the parameters filled so far, those of two dimensions or more.
    """

    def __init__(self, model: PreTrainedModel, seed: int, device: torch.device) -> None:
        self._model, self._seed, self._device = model, seed, device
        self.parts: list[nn.Module] = [*blocks(model), model]
        self.matrices: set[nn.Parameter] = set()
        self._names = {module: name for name, module in model.named_modules()}
        self._modules = {block: list(block.modules()) for block in self.parts[:-1]}
        within = {module for modules in self._modules.values() for module in modules}
        self._modules[model] = [module for module in model.modules() if module not in within]
        self._part_of = {
            module: part for part, modules in self._modules.items() for module in modules
        }

    def fill(self, part: nn.Module) -> None:
        """Give a part its memory on the device, and its weights, if it has none yet.

        Raises:
            RunError: the model's class leaves some of them without a value.
        """
        modules = self._modules[part]
        empty = [module for module in modules if _is_meta(module)]
        if not empty:
            return
        for module in empty:
            module.to_empty(device=self._device, recurse=False)
            for tensor in _floats(module):
                tensor.detach().fill_(math.nan)
        torch.manual_seed(stable_hash(f"weights {self._seed} {self._names[part]}"))
        with torch.no_grad():
            # Children first: some models scale what a child has drawn.
            for module in reversed(modules):
                self._model._init_weights(module)
        for module in empty:
            if any(bool(tensor.isnan().any()) for tensor in _floats(module)):
                kind, where = type(module).__name__, self._names[part] or "the model"
                raise RunError(
                    f"{type(self._model).__name__} gives no initial values to a {kind} in {where}: "
                    "its _init_weights has to"
                )
        if part is self._model:
            self._model.tie_weights()  # each module of a tie was given memory of its own
        self.matrices |= {p for p in _parameters(modules) if p.ndim >= 2}

    def fill_around(self, module: nn.Module) -> None:
        """The same for the part that a module belongs to."""
        self.fill(self._part_of[module])

    def fill_all(self) -> None:
        """The whole model, where each rank holds it whole."""
        for part in self.parts:
            self.fill(part)


def _own(module: nn.Module) -> list[torch.Tensor]:
    return [*module.parameters(recurse=False), *module.buffers(recurse=False)]


def _is_meta(module: nn.Module) -> bool:
    return any(tensor.is_meta for tensor in _own(module))


def _floats(module: nn.Module) -> list[torch.Tensor]:
    return [tensor for tensor in _own(module) if tensor.is_floating_point()]


def _parameters(modules: Sequence[nn.Module]) -> list[nn.Parameter]:
    return [p for module in modules for p in module.parameters(recurse=False)]


def token_losses(model: nn.Module, windows: torch.Tensor) -> torch.Tensor:
    """Cross-entropy in nats of each next token: ``(sequences, context)`` in float32."""
    logits = model(input_ids=windows[:, :-1], use_cache=False).logits
    flat = functional.cross_entropy(
        logits.float().flatten(0, 1), windows[:, 1:].flatten(), reduction="none"
    )
    return flat.view(windows.shape[0], -1)


def parameter_groups(
    model: nn.Module, options: Options, matrices: Container[nn.Parameter] | None = None
) -> list[dict[str, Any]]:
    """What is trained; weight decay for matrices only, as usual for transformers.

    Args:
        matrices: which parameters are matrices, where their shapes no longer tell.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    if matrices is None:
        matrices = {p for p in trained if p.ndim >= 2}
    return [
        {"params": [p for p in trained if p in matrices], "weight_decay": options.weight_decay},
        {"params": [p for p in trained if p not in matrices], "weight_decay": 0.0},
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


def save_description(model: PreTrainedModel, tokenizer: Tokenizer, path: Path) -> None:
    """Write what an export needs beside the weights of the bare ``model``."""
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    config.dtype = None  # the file of weights says it; a stale value here would win on loading
    path.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(path)
    (model.generation_config or GenerationConfig.from_model_config(config)).save_pretrained(path)
    tokenizer.save(path)
