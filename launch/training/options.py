"""What a run was asked for: all of the command line that the rest of the program reads."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sharded_ema import Schedule


class UsageError(Exception):
    """The run cannot be made as it was asked for; the text has the flag and what to do about it."""


@dataclass(frozen=True)
class Options:
    """The parsed command line; every field is the flag of the same name.

    Attributes:
        deepspeed: its whole configuration; None where it is not used.
    """

    data: list[Path]
    data_bytes: int
    model: Path | None
    hidden_size: int
    layers: int
    heads: int
    kv_heads: int
    intermediate_size: int
    tie_embeddings: bool
    context: int
    vocab_size: int
    workers: int
    steps: int
    batch_size: int
    accumulation: int
    lr: float
    min_lr_ratio: float
    warmup_steps: int
    beta1: float
    beta2: float
    weight_decay: float
    clip_norm: float
    seed: int
    parallel: str
    shard_size: int
    tp_size: int
    deepspeed: dict[str, Any] | None
    dtype: str
    pure_bf16: bool
    activation_checkpointing: bool
    compile: bool
    profiles: dict[str, Schedule]
    ema_start_step: int
    ema_update_every: int
    eval_every: int
    eval_sequences: int
    generate_tokens: int
    prompt: str
    log_every: int
    save_every: int
    keep_last: int
    async_save: bool
    out: Path | None
    resume: str | None

    @property
    def ema(self) -> bool:
        """Whether the run keeps an average at all."""
        return bool(self.profiles)
