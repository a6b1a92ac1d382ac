"""Train a causal language model with a sharded average of its weights.

``torchrun --nproc-per-node 8 train.py --ema``, or ``python train.py`` in one process.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

import torch
from torch.distributed.elastic.multiprocessing.errors import record

from training.checkpoint import link_average
from training.display import Progress, conclude, introduce, tell_preempted
from training.flags import parse_options
from training.model import learning_rate, token_losses
from training.options import Options
from training.preemption import watch_signals
from training.ranks import Ranks, RunError, start_ranks
from training.recording import Meter, Recorder
from training.run import Run, start_run


@record  # torchrun then shows what a rank failed with, and not just that it did
def main(argv: Sequence[str] | None = None) -> int:
    """Run the training program; 0 if it ended or was told to stop, 2 if it could not run."""
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
    run = start_run(options, ranks)
    introduce(run)
    progress = Progress(run)
    settings = run.settings if options.wandb else None
    recorder = Recorder(run.out, run.step, settings) if ranks.first else None
    meter = Meter(ranks, run.step, options.batch_size * options.context)
    with watch_signals(ranks) as preemption:
        while run.step < options.steps:
            make_step(run, meter, progress, recorder)
            if run.step < options.steps and preemption.agreed():
                run.stop_early()
                progress.close()
                if recorder is not None:
                    recorder.close()
                tell_preempted(run)
                return
    run.checkpoints.settle()
    progress.close()
    finish(run, recorder, started)


def make_step(run: Run, meter: Meter, progress: Progress, recorder: Recorder | None) -> None:
    """One optimizer step, and what is due after it: a row of metrics, an evaluation, a save."""
    options = run.options
    loss, norm = train_step(run)
    meter.add(loss)
    progress.advance()
    last = run.step == options.steps
    evaluates = run.step % options.eval_every == 0 or last
    if run.step % options.log_every == 0 or evaluates:
        row = meter.row(run.step, learning_rate(run.step, options))
        progress.show_row(row)
        with meter.paused():
            if norm is not None:
                row["grad_norm"] = float(norm)
            if evaluates:
                results = run.evaluate()
                row |= results
                progress.show_results(results)
            if run.ema is not None:
                row |= run.ema.metrics(distance=evaluates)
            if recorder is not None:
                recorder.add(row)
    if run.step % options.save_every == 0 or last:
        with meter.paused():
            run.save()


def train_step(run: Run) -> tuple[torch.Tensor, torch.Tensor | float | None]:
    """One optimizer step; this rank's part of the mean loss, and the norm of the gradient."""
    options, ranks, engine = run.options, run.ranks, run.engine
    run.step += 1
    size, context = options.batch_size, options.context
    batch = next(run.batches).to(ranks.device, non_blocking=True)
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
    # The average follows by itself: it is attached to what steps here.
    return loss, engine.step(learning_rate(run.step, options))


def finish(run: Run, recorder: Recorder | None, started: float) -> None:
    """Write summary and picture on rank 0, and say where everything lies; all ranks take part."""
    seconds = time.monotonic() - started
    generated = run.generate()
    if recorder is not None:
        from training.plotting import plot_losses  # Matplotlib, on this rank alone

        recorder.close()
        run.summary(generated, seconds).write(run.out)
        picture = run.out / "loss.png"
        ways = f"{run.options.parallel} on {run.ranks.size} ranks"
        title = f"Held-out loss, {ways if run.ranks.size > 1 else 'one process'}"
        plot_losses(recorder.rows, list(run.options.profiles), title, picture)
        average = link_average(run.out, run.average) if run.average else None
        conclude(run, picture, average, seconds, recorder.rows)
    if run.ema is not None:
        run.ema.close()


if __name__ == "__main__":
    sys.exit(main())
