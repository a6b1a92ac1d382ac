"""Train a byte-level causal language model with a sharded average of its weights.

``torchrun --nproc-per-node 8 train.py --ema``, or ``python train.py`` in one process.
"""

from __future__ import annotations

import json
import math
import os
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedConfig, PreTrainedModel

from averaging import build_average, describe
from corpus import Corpus, load_corpus
from deepspeed_engine import DeepSpeedEngine
from engine import Engine
from evaluation import held_out_loss, token_losses
from generation import greedy, half_precision_model
from language_model import build_config, build_model, learning_rate, save_description
from options import Options, parse_options
from plotting import plot_losses
from ranks import Ranks, RunError, start_ranks
from recording import Recorder
from run_checkpoint import (
    Checkpoint,
    Checkpoints,
    check_settings,
    find_checkpoint,
    run_directory,
    run_settings,
)
from sharded_ema import ShardedEMA
from torch_engine import TorchEngine


@dataclass
class Run:
    """Everything a training step, an evaluation and a checkpoint need."""

    options: Options
    ranks: Ranks
    config: PreTrainedConfig
    corpus: Corpus
    engine: Engine
    ema: ShardedEMA | None
    checkpoints: Checkpoints
    settings: dict[str, Any]
    out: Path
    step: int = 0
    results: dict[str, float] | None = None  # of the last evaluation

    def say(self, text: str) -> None:
        """Print a line once, without tearing the progress bar."""
        if self.ranks.first:
            tqdm.write(text)

    def train_step(self) -> tuple[torch.Tensor, torch.Tensor | float | None]:
        """One optimizer step; this rank's part of the mean loss, and the norm of the gradient."""
        options, ranks, engine = self.options, self.ranks, self.engine
        self.step += 1
        size, context = options.batch_size, options.context
        mine = range(size * ranks.part // ranks.parts, size * (ranks.part + 1) // ranks.parts)
        batch = self.corpus.batch(options.seed, self.step, mine, context).to(ranks.device)
        parts = batch.tensor_split(options.accumulation)
        loss = torch.zeros((), device=ranks.device)
        for number, part in enumerate(parts, start=1):
            with engine.micro_batch(last=number == len(parts)):
                with engine.precision():
                    # Divided by the whole batch, not by this part: shares need not be equal.
                    share = token_losses(engine.model, part).sum() / (size * context)
                # Gradients are averaged over the parts; this makes it a sum.
                engine.backward(share * ranks.parts)
            loss += share.detach()
        return loss, engine.step(learning_rate(self.step, options))

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
        for name in options.profiles if options.generate_bytes else ():
            assert self.ema is not None
            with self.ema.swap(name):
                weights = self.engine.gather()
            if self.ranks.first:
                model = half_precision_model(self.config, weights)
                texts[name] = greedy(model, options.prompt, options.generate_bytes)
        return texts

    def save(self) -> Path:
        """Write a checkpoint of the present step."""
        return self.checkpoints.save(
            self.step, self.engine, self.ema, self.settings, self.results or {}
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the training program; 0 if all went well, 2 if it could not run as asked."""
    options = parse_options(argv)
    with start_ranks(options.parallel != "none", options.tp_size) as ranks:
        try:
            train(options, ranks)
        except RunError as error:
            # On all ranks alike, so the ends of a good run and of a refused one are the same.
            if ranks.first:
                print(f"train.py: error: {error}", file=sys.stderr, flush=True)
            return 2
    return 0


def train(options: Options, ranks: Ranks) -> None:
    """Set the run up or take it up again, train to the last step, and write the results."""
    started = time.monotonic()
    out, found = ranks.on_first(lambda: place(options))
    corpus = ranks.everywhere(
        lambda: load_corpus(options.data, options.data_bytes, options.context)
    )
    digest = corpus.digest
    if len(set(ranks.gather(digest))) > 1:
        raise RunError("the ranks read different text; is --data the same on all machines?")
    config = ranks.everywhere(lambda: build_config(options))
    settings = run_settings(options, config.to_dict(), digest, ranks.size)
    changes = check_settings(found, settings) if found else []

    bare = build_model(config, options, ranks.device)
    ranks.on_first(lambda: save_description(bare, out / "hf"))
    numbers = sum(p.numel() for p in bare.parameters())  # of which an engine may keep a part
    engine = build_engine(bare, options, ranks)
    if found:
        engine.load(found.path)
    ema = ranks.everywhere(lambda: take_up_average(engine, options, found))
    checkpoints = Checkpoints(out, options.keep_last, ranks)
    run = Run(options, ranks, config, corpus, engine, ema, checkpoints, settings, out)
    for line in introduction(run, numbers, found, changes):
        run.say(line)
    if found:
        run.step, run.results = found.step, found.results
        ranks.on_first(lambda: checkpoints.rewind(found))
    recorder = Recorder(out, run.step) if ranks.first else None
    saved = train_steps(run, recorder, found.path if found else None)
    finish(run, recorder, saved, time.monotonic() - started)
    if ema is not None:
        ema.close()


def place(options: Options) -> tuple[Path, Checkpoint | None]:
    """Where the run writes, and the checkpoint it starts from. On rank 0.

    Raises:
        RunError: nothing to resume at the path given, or another run is in the way.
    """
    found = None
    if options.resume not in (None, "auto"):
        path = Path(options.resume)
        found = find_checkpoint(path)
        if found is None:
            raise RunError(f"--resume {path}: no complete checkpoint there")
        home = run_directory(found.path)
        out = options.out or home
        taken = out.resolve() != home.resolve() and find_checkpoint(out) is not None
    else:
        out = options.out or Path("runs", time.strftime("%Y%m%d-%H%M%S"))
        found = find_checkpoint(out)
        taken = found is not None and options.resume is None
    if taken:
        raise RunError(
            f"{out} holds a run with checkpoints; go on with --resume auto, or choose another --out"
        )
    if found and found.step > options.steps:
        raise RunError(f"{found.path} is beyond --steps {options.steps}")
    return out, found


def build_engine(bare: PreTrainedModel, options: Options, ranks: Ranks) -> Engine:
    """What trains the model, as ``--parallel`` or ``--deepspeed`` says.

    accelerate is imported for those alone who have it.
    """
    if options.deepspeed is not None:
        return DeepSpeedEngine(bare, options, ranks)
    if options.parallel == "accelerate":
        from accelerate_engine import AccelerateEngine

        return AccelerateEngine(bare, options, ranks)
    return TorchEngine(bare, options, ranks)


def take_up_average(
    engine: Engine, options: Options, found: Checkpoint | None
) -> ShardedEMA | None:
    """Build the average, tie it to the steps, and load it if the checkpoint has it."""
    ema = build_average(engine.model, options)
    if ema is None:
        return None
    engine.attach(ema)
    if found and found.has_average:
        step = ema.load(found.path / "ema")
        if step != found.step:
            raise RunError(f"{found.path}: the average is of step {step}, the rest of {found.step}")
    return ema


def introduction(
    run: Run, numbers: int, found: Checkpoint | None, changes: list[str]
) -> Iterator[str]:
    """The first lines of a run: what is trained, how, on what, and what is averaged."""
    options, ranks = run.options, run.ranks
    stored = "bfloat16" if options.pure_bf16 else "float32"
    kind = run.settings["fixed"]["model.model_type"]
    yield f"model      {kind}, {numbers:,} parameters in {stored}"
    yield (
        f"parallel   {run.engine.layout}, world size {ranks.size}, on {ranks.device.type} "
        f"({torch.get_num_threads()} threads each), computing in {options.dtype}"
    )
    corpus = run.corpus
    yield (
        f"text       {corpus.source}: {corpus.files} files, {len(corpus.train):,} bytes to train "
        f"on, {len(corpus.held_out):,} held out"
    )
    yield (
        f"steps      {options.steps} of {options.batch_size} x {options.context} bytes, "
        f"writing to {run.out}"
    )
    yield from describe(run.ema, options, ranks)
    if found is None:
        if options.resume == "auto":
            yield f"resume     no complete checkpoint in {run.out}: starting from scratch"
        return
    yield f"resume     from {found.path} at step {found.step}"
    for change in changes:
        yield f"  changed  {change}"
    if run.ema is not None and not found.has_average:
        yield "warning    the checkpoint has no average: a new one starts from its weights"
    if run.ema is None and found.has_average:
        yield "resume     the checkpoint's average is left aside, as --ema is not given"


def train_steps(run: Run, recorder: Recorder | None, saved: Path | None) -> Path:
    """All steps from the present one to the last; the path of the last checkpoint."""
    options, ranks = run.options, run.ranks
    bar = tqdm(
        total=options.steps, initial=run.step, unit="step", disable=not ranks.first, mininterval=1.0
    )
    losses: list[torch.Tensor] = []
    clock, last_step = time.monotonic(), run.step
    while run.step < options.steps:
        loss, norm = run.train_step()
        losses.append(loss)
        bar.update()
        last = run.step == options.steps
        evaluates = run.step % options.eval_every == 0 or last
        if run.step % options.log_every == 0 or evaluates:
            # One exchange for all steps since the last row, none for the others.
            row = {"step": run.step, "train_loss": float(ranks.sum(torch.stack(losses).mean()))}
            if not math.isfinite(row["train_loss"]):
                raise RunError(f"the training loss is {row['train_loss']} at step {run.step}")
            now = time.monotonic()
            done = (run.step - last_step) * options.batch_size * options.context
            row["lr"] = learning_rate(run.step, options)
            row["bytes_per_second"] = done / (now - clock)
            if norm is not None:
                row["grad_norm"] = float(norm)
            if evaluates:
                results = run.evaluate()
                row |= results
                report = "  ".join(f"{name} {value:.4f}" for name, value in results.items())
                run.say(f"step {run.step:>6}  {report}")
            if run.ema is not None:
                row |= {f"ema/{k}": v for k, v in run.ema.metrics(distance=evaluates).items()}
            if recorder is not None:
                recorder.add(row)
            bar.set_postfix(loss=f"{row['train_loss']:.3f}")
            losses.clear()
            clock, last_step = time.monotonic(), run.step
        if run.step % options.save_every == 0 or last:
            before = time.monotonic()
            saved = run.save()
            clock += time.monotonic() - before  # the rate is that of training
    bar.close()
    assert saved is not None  # the last step saves, and a run resumed at its end has its source
    return saved


def link_average(out: Path, average: Path) -> Path:
    """``OUT/ema``, which always leads to the last average: a name that scripts can rely on."""
    link, fresh = out / "ema", out / "ema.tmp"
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(os.path.relpath(average, out))
    fresh.replace(link)
    return link


def finish(run: Run, recorder: Recorder | None, saved: Path, seconds: float) -> None:
    """Write summary.json and loss.png on rank 0 and say where everything lies."""
    generated = run.generate()
    if recorder is None:
        return
    recorder.close()
    options, results = run.options, run.results or {}
    losses = {name: results.get(f"ema_loss/{name}") for name in options.profiles}
    average = saved / "ema" if (saved / "ema").is_dir() and options.ema else None
    summary = {
        "step": run.step,
        "raw_loss": results.get("raw_loss"),
        "ema_loss": losses,
        "ema_checkpoint": os.path.relpath(average, run.out) if average else None,
        "evaluation": {
            "data": [str(path.resolve()) for path in options.data],
            "data_bytes": options.data_bytes,
            "text": run.settings["fixed"]["text"],
            "context": options.context,
            "sequences": options.eval_sequences,
            "seed": options.seed,
            "dtype": options.dtype,
            "pure_bf16": options.pure_bf16,
            "prompt": options.prompt,
        },
        "generated": generated,
        "seconds": round(seconds, 1),
    }
    (run.out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    picture = run.out / "loss.png"
    ranks = f"{options.parallel} on {run.ranks.size} ranks"
    title = f"Held-out loss, {ranks if run.ranks.size > 1 else 'one process'}"
    plot_losses(recorder.rows, list(options.profiles), title, picture)
    run.say(f"done       {run.step} steps in {seconds:.0f} s")
    run.say(f"curves     {picture}")
    run.say(f"checkpoint {saved}")
    if average:
        export, source = run.out / "export", link_average(run.out, average)
        command = ["sharded-ema", "consolidate", source, export, "--like", run.out / "hf"]
        if "ema" not in options.profiles:
            command += ["--profile", next(iter(options.profiles))]
        run.say(f"export     {shlex.join(map(str, command))}")
        check = Path(__file__).with_name("check_export.py")
        command = ["python", os.path.relpath(check), export, run.out]
        run.say(f"check      {shlex.join(map(str, command))}")


if __name__ == "__main__":
    sys.exit(main())
