"""Check an exported average in a fresh process: it loads, and loses what training said it loses.

``python check_export.py EXPORT_DIR RUN_DIR`` recomputes the held-out loss of the exported model on
the text of the run and compares it with the one in the run's ``summary.json``. If the average also
wrote some text in training (``--generate-tokens``), the export must write the same.
Exit code: 0 they agree, 1 they do not, 2 wrong use or unreadable input.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM

from training.evaluation import greedy, loss_of_export, sample
from training.ranks import RunError
from training.summary import read_summary
from training.tokenizer import load_tokenizer

# bfloat16 carries three digits; training then evaluates in it and this program does not.
TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}


def main(argv: Sequence[str] | None = None) -> int:
    """Compare, show a sample, and say where the files lie."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("export", type=Path, help="directory that `sharded-ema consolidate` wrote")
    parser.add_argument("run", type=Path, help="output directory of the training run")
    parser.add_argument("--profile", help="which average was exported (default: as its files say)")
    parser.add_argument("--tolerance", type=float, help="in nats (default: 1e-4; bfloat16 2e-2)")
    parser.add_argument("--prompt", default="def ", help="of the sample (default: %(default)r)")
    parser.add_argument("--sample-tokens", type=int, default=200, help="(default: %(default)s)")
    args = parser.parse_args(argv)
    try:
        return check(args)
    except (RunError, OSError) as error:
        print(f"check_export.py: error: {error}", file=sys.stderr)
        return 2


def check(args: argparse.Namespace) -> int:
    """The check itself; its exit code."""
    summary = read_summary(args.run)
    evaluation = summary.evaluation
    profile = args.profile or exported_profile(args.export, list(summary.ema_loss))
    expected = summary.ema_loss.get(profile)
    if expected is None:
        known = ", ".join(summary.ema_loss) or "none"
        raise RunError(f"{args.run} reports no loss of an average {profile!r} (it has: {known})")

    tokenizer = load_tokenizer(args.run / "hf")
    windows = evaluation.windows(tokenizer)
    model = AutoModelForCausalLM.from_pretrained(args.export, local_files_only=True)
    weights = {str(p.dtype).removeprefix("torch.") for p in model.parameters()}
    loss = loss_of_export(model, windows)

    lowest = "bfloat16" if {"bfloat16", "float16"} & {*weights, evaluation.dtype} else "float32"
    tolerance = TOLERANCE[lowest] if args.tolerance is None else args.tolerance
    difference = abs(loss - expected)
    print(
        f"export     {args.export}: {type(model).__name__}, "
        f"{model.num_parameters():,} parameters in {', '.join(sorted(weights))}"
    )
    print(f"held out   {len(windows)} sequences of {evaluation.context} tokens")
    print(
        f"loss       exported average {loss:.6f}, training said {expected:.6f} nats per token "
        f"for {profile!r} at step {summary.step} (raw weights {summary.raw_loss:.6f})"
    )
    good = difference <= tolerance
    print(
        f"compare    difference {difference:.2e}, tolerance {tolerance:.0e}: "
        f"{'they agree' if good else 'THEY DIFFER'}"
    )
    written = summary.generated.get(profile)
    if written is not None:
        prompt = tokenizer.encode_prompt(evaluation.prompt)
        same = greedy_text(args.export, prompt, len(written)) == written
        good = good and same
        print(
            f"text       most likely {len(written)} tokens in bfloat16, from the export and in "
            f"training: {'they agree' if same else 'THEY DIFFER'}"
        )
    if not good:
        print(
            "           the export is not the average that training evaluated at its last step; "
            f"export {args.run / summary.ema_checkpoint}",
            file=sys.stderr,
        )
    start = tokenizer.encode_prompt(args.prompt)
    text = tokenizer.decode(start + sample(model, start, args.sample_tokens, evaluation.seed))
    print("sample     " + text.replace("\n", "\n           "))
    print(f"curves     {args.run / 'loss.png'}")
    print(f"files      {', '.join(sorted(path.name for path in args.export.iterdir()))}")
    return 0 if good else 1


def greedy_text(export: Path, prompt: list[int], length: int) -> list[int]:
    """What the export writes in bfloat16, whatever it is stored in."""
    model = AutoModelForCausalLM.from_pretrained(
        export, dtype=torch.bfloat16, local_files_only=True
    )
    return greedy(model, prompt, length)


def exported_profile(export: Path, known: list[str]) -> str:
    """Which average an export holds, as the header of its first file of weights says."""
    files = sorted(export.glob("*.safetensors"))
    if not files:
        raise RunError(f"{export} holds no .safetensors file")
    try:
        with safe_open(files[0], "pt") as opened:
            header = opened.metadata() or {}
    except SafetensorError as error:
        raise RunError(f"{files[0]} cannot be read: {error}") from None
    if "profile" in header:
        return header["profile"]
    if len(known) != 1:
        raise RunError(f"{files[0]} does not say which average it is; give --profile")
    return known[0]


if __name__ == "__main__":
    sys.exit(main())
