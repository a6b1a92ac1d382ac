"""``summary.json``: what a run says of itself at its end, to those who check its exports."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from training.data import load_corpus
from training.options import Options
from training.ranks import RunError
from training.tokenizer import Tokenizer

_NAME = "summary.json"


@dataclass(frozen=True)
class Evaluation:
    """How the losses of a run were measured: enough to measure one again.

    Attributes:
        text: digest of the text.
        prompt: of the generated text.
    """

    data: list[str]
    data_bytes: int
    text: str
    vocab_size: int
    context: int
    sequences: int
    seed: int
    dtype: str
    pure_bf16: bool
    prompt: str

    @classmethod
    def of(cls, options: Options, text: str) -> Evaluation:
        """That of a run with these options on the text of this digest."""
        return cls(
            data=[str(path.resolve()) for path in options.data],
            data_bytes=options.data_bytes,
            text=text,
            vocab_size=options.vocab_size,
            context=options.context,
            sequences=options.eval_sequences,
            seed=options.seed,
            dtype=options.dtype,
            pure_bf16=options.pure_bf16,
            prompt=options.prompt,
        )

    def windows(self, tokenizer: Tokenizer) -> torch.Tensor:
        """The held-out sequences, of the text as it is read again here.

        Raises:
            RunError: it is another text by now.
        """
        corpus = load_corpus([Path(path) for path in self.data], self.data_bytes, self.context)
        if corpus.digest != self.text:
            where = ", ".join(self.data) or "Python's standard library"
            raise RunError(
                f"{where} is not the text that the run was trained on; it has changed since"
            )
        text = corpus.encoded(tokenizer, self.context)
        return text.held_out_windows(self.sequences, self.context)


@dataclass(frozen=True)
class Summary:
    """The end of a run.

    Attributes:
        raw_loss: of the weights on the held-out text, in nats per token.
        ema_loss: the same of each average.
        ema_checkpoint: of the last averages, relative to the output directory.
        generated: ids of the tokens that each average wrote.
        seconds: the whole run, or the part since it was taken up.
    """

    step: int
    raw_loss: float | None
    ema_loss: dict[str, float | None]
    ema_checkpoint: str | None
    evaluation: Evaluation
    generated: dict[str, list[int]]
    seconds: float

    def write(self, out: Path) -> None:
        """Into the output directory of the run."""
        (out / _NAME).write_text(json.dumps(asdict(self), indent=1) + "\n")


def read_summary(run: Path) -> Summary:
    """What the run in this output directory wrote at its end.

    Raises:
        RunError: it has not come to its end, or the file cannot be read.
    """
    path = run / _NAME
    if not path.is_file():
        raise RunError(f"{path} is not there: has the run come to its end?")
    try:
        fields = json.loads(path.read_text())
        return Summary(**fields | {"evaluation": Evaluation(**fields["evaluation"])})
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(f"{path} cannot be read: {error!r}") from None
