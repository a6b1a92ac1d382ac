"""The tokenizer: bytes as they are, or byte pairs learned from the training text.

The ids of a byte are the byte itself, and byte pairs (Sennrich et al. 2016) come after them in the
order in which they were learned; so a vocabulary of 256 is text byte by byte. It is one of the
tokenizers library, which exports carry as ``tokenizer.json``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer as Encoder
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

NUM_BYTES = 256
SEPARATOR = b"\0"  # between documents; occurs in no text file, so it also ends a generation

Merges = list[tuple[str, str]]


class Tokenizer:
    """Text to ids and back.

    Args:
        merges: the pairs, in the order in which they are joined; none for bytes.
    """

    def __init__(self, merges: Sequence[tuple[str, str]]) -> None:
        self.merges = [(left, right) for left, right in merges]
        tokens = [*_BYTES, *(left + right for left, right in self.merges)]
        vocabulary = {token: number for number, token in enumerate(tokens)}
        self._encoder = _byte_level(models.BPE(vocab=vocabulary, merges=self.merges))

    @property
    def digest(self) -> str:
        """Identifies what the ids mean; a resumed run must read the same."""
        pairs = json.dumps(self.merges).encode()
        return hashlib.blake2b(pairs, digest_size=16).hexdigest()

    def encode(self, text: np.ndarray) -> np.ndarray:
        """Ids of the tokens of a text of bytes; what is no UTF-8 in it is replaced."""
        if not self.merges:
            return text
        documents = text.tobytes().split(SEPARATOR)
        encoded = self._encoder.encode_batch(
            [document.decode(errors="replace") for document in documents]
        )
        ids = [number for one in encoded for number in (*one.ids, SEPARATOR[0])]
        return np.array(ids[:-1], np.uint32)

    def encode_prompt(self, prompt: str) -> list[int]:
        """Ids of a prompt."""
        return list(self._encoder.encode(prompt).ids)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of some ids; those that mean nothing are left out."""
        return str(self._encoder.decode([i for i in ids if i < NUM_BYTES + len(self.merges)]))

    def save(self, path: Path) -> None:
        """Write what ``AutoTokenizer`` reads into a directory."""
        PreTrainedTokenizerFast(tokenizer_object=self._encoder).save_pretrained(path)


def learn_merges(text: np.ndarray, vocab_size: int) -> Merges:
    """The pairs of a vocabulary of this size, learned from a text of bytes.

    A text too small for so many pairs gives fewer.
    """
    if vocab_size == NUM_BYTES:
        return []
    encoder = _byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=list(_BYTES), show_progress=False
    )
    documents = text.tobytes().split(SEPARATOR)
    encoder.train_from_iterator(
        (document.decode(errors="replace") for document in documents), trainer
    )
    return [(left, right) for left, right in json.loads(encoder.to_str())["model"]["merges"]]


def load_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer that :meth:`Tokenizer.save` wrote into a directory."""
    model = json.loads((path / "tokenizer.json").read_text())["model"]
    return Tokenizer([(left, right) for left, right in model["merges"]])


def _byte_level(model: models.BPE) -> Encoder:
    encoder = Encoder(model)
    encoder.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    encoder.decoder = decoders.ByteLevel()
    return encoder


def _byte_names() -> tuple[str, ...]:
    """The printable character that stands for each byte in byte-level vocabularies.

    Printable bytes stand for themselves, the others follow from U+0100 on (Radford et al. 2019,
    GPT-2).
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(NUM_BYTES) if byte not in printable]
    return tuple(
        chr(byte if byte in printable else NUM_BYTES + others.index(byte))
        for byte in range(NUM_BYTES)
    )


_BYTES = _byte_names()
