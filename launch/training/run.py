"""A run, set up or taken up again: all that its steps need, and what it does between them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from sharded_ema import ShardedEMA
from training.checkpoint import (
    Checkpoint,
    Checkpoints,
    check_settings,
    place,
    run_settings,
)
from training.data import Corpus, StepSampler, load_corpus, step_batches
from training.engines import Engine, build_engine
from training.evaluation import greedy, half_precision_model, held_out_loss
from training.model import build_config, build_model, save_description
from training.options import Options
from training.ranks import Ranks, RunError
from training.summary import Evaluation, Summary
from training.tokenizer import Tokenizer, learn_merges

# In the output directory: the step at which the run was told to stop. It goes when the run goes on.
PREEMPTED = "preempted"


@dataclass
class Run:
    """Everything that a training step, an evaluation and a checkpoint need.

    Attributes:
        corpus: in tokens.
        batches: this rank's share of the text of each step to come.
        digest: of the text.
        config: of the model.
        num_parameters: of the whole model, of which an engine may keep a part.
        settings: what its checkpoints record of it.
        out: the output directory.
        source: the checkpoint that it was taken up from.
        changes: settings that are others than in ``source``, for the user to read.
        step: optimizer steps so far.
        results: of the last evaluation.
        saved: the last checkpoint, which may still be under way.
    """

    options: Options
    ranks: Ranks
    corpus: Corpus
    tokenizer: Tokenizer
    batches: Iterator[torch.Tensor]
    digest: str
    config: PreTrainedConfig
    num_parameters: int
    engine: Engine
    ema: ShardedEMA | None
    settings: dict[str, Any]
    out: Path
    checkpoints: Checkpoints
    source: Checkpoint | None
    changes: list[str]
    step: int = 0
    results: dict[str, float] | None = None
    saved: Path | None = None

    def evaluate(self) -> dict[str, float]:
        """Held-out loss of the raw weights and of each average; all ranks take part."""
        results = {"raw_loss": self._held_out_loss()}
        if self.ema is not None:
            for name in self.options.profiles:
                with self.ema.swap(name):
                    results[f"ema_loss/{name}"] = self._held_out_loss()
        self.results = results
        return results

    def _held_out_loss(self) -> float:
        options, engine = self.options, self.engine
        windows = self.corpus.held_out_windows(options.eval_sequences, options.context)
        return held_out_loss(
            engine.model, windows, self.ranks, options.batch_size, engine.precision()
        )

    def generate(self) -> dict[str, list[int]]:
        """The text that each average writes in bfloat16; all ranks take part, the first has it."""
        options, texts = self.options, {}
        for name in options.profiles if options.generate_tokens else ():
            assert self.ema is not None
            with self.ema.swap(name):
                weights = self.engine.gather()
            if self.ranks.first:
                model = half_precision_model(self.config, weights)
                prompt = self.tokenizer.encode_prompt(options.prompt)
                texts[name] = greedy(model, prompt, options.generate_tokens)
        return texts

    def save(self) -> None:
        """Write a checkpoint of the present step."""
        self.saved = self.checkpoints.save(
            self.step, self.engine, self.ema, self.settings, self.results or {}
        )

    def stop_early(self) -> None:
        """Save the present step, if that has not happened, and leave a mark for who starts runs."""
        if self.saved != self.checkpoints.path(self.step):
            self.save()
        self.checkpoints.settle()
        self.ranks.on_first(lambda: (self.out / PREEMPTED).write_text(f"{self.step}\n"))
        if self.ema is not None:
            self.ema.close()

    @property
    def average(self) -> Path | None:
        """The average in the last checkpoint."""
        if self.ema is None or self.saved is None or not (self.saved / "ema").is_dir():
            return None
        return self.saved / "ema"

    def summary(self, generated: dict[str, list[int]], seconds: float) -> Summary:
        """What ``summary.json`` will say."""
        results = self.results or {}
        return Summary(
            step=self.step,
            raw_loss=results.get("raw_loss"),
            ema_loss={name: results.get(f"ema_loss/{name}") for name in self.options.profiles},
            ema_checkpoint=os.path.relpath(self.average, self.out) if self.average else None,
            evaluation=Evaluation.of(self.options, self.digest),
            generated=generated,
            seconds=round(seconds, 1),
        )


def start_run(options: Options, ranks: Ranks) -> Run:
    """Set the run up, or take it up again.

    Raises:
        RunError: it cannot be made as it was asked for; nothing was trained.
    """
    out, source = ranks.on_first(lambda: place(options))
    text = ranks.everywhere(lambda: load_corpus(options.data, options.data_bytes, options.context))
    digest = text.digest
    if len(set(ranks.gather(digest))) > 1:
        raise RunError("the ranks read different text; is --data the same on all machines?")
    tokenizer = Tokenizer(ranks.on_first(lambda: learn_merges(text.train, options.vocab_size)))
    corpus = ranks.everywhere(lambda: text.encoded(tokenizer, options.context))
    config = ranks.everywhere(lambda: build_config(options))
    settings = run_settings(options, config.to_dict(), digest, tokenizer.digest, ranks.size)
    changes = check_settings(source, settings) if source else []

    bare = build_model(config, options)
    ranks.on_first(lambda: save_description(bare, tokenizer, out / "hf"))
    ranks.on_first(lambda: (out / PREEMPTED).unlink(missing_ok=True))
    num_parameters = sum(p.numel() for p in bare.parameters())
    engine = build_engine(bare, options, ranks)
    if source:
        engine.load(source.path)
    ema = ranks.everywhere(lambda: _take_up_average(engine, options, source))
    run = Run(
        options=options,
        ranks=ranks,
        corpus=corpus,
        tokenizer=tokenizer,
        batches=_batches(corpus, options, ranks, source.step if source else 0),
        digest=digest,
        config=config,
        num_parameters=num_parameters,
        engine=engine,
        ema=ema,
        settings=settings,
        out=out,
        checkpoints=Checkpoints(out, options.keep_last, ranks, options.async_save),
        source=source,
        changes=changes,
    )
    if source:
        run.step, run.results, run.saved = source.step, source.results, source.path
        ranks.on_first(lambda: run.checkpoints.rewind(source))
    return run


def _batches(corpus: Corpus, options: Options, ranks: Ranks, step: int) -> Iterator[torch.Tensor]:
    """What this rank reads in the steps after ``step``."""
    size, room = options.batch_size, len(corpus.train) - options.context
    share = range(size * ranks.part // ranks.parts, size * (ranks.part + 1) // ranks.parts)
    sampler = StepSampler(options.seed, step + 1, options.steps, share, room)
    loader = step_batches(corpus.train, options.context, sampler, options.workers, ranks.device)
    return iter(loader)


def _take_up_average(
    engine: Engine, options: Options, source: Checkpoint | None
) -> ShardedEMA | None:
    """Build the average, tie it to the steps, and load it if the checkpoint has it."""
    if not options.ema:
        return None
    ema = ShardedEMA(
        engine.model,
        options.profiles,
        update_every=options.ema_update_every,
        start_step=options.ema_start_step,
        total_steps=options.steps,
    )
    engine.attach(ema)
    if source and source.has_average:
        step = ema.load(source.path / "ema")
        if step != source.step:
            raise RunError(
                f"{source.path}: the average is of step {step}, the rest of {source.step}"
            )
    return ema
