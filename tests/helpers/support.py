"""What is supported, as the tests know it: the tables in the README are made of theirs.

``python -m tests.helpers.support`` writes the tables; a test fails when they are not up to date.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.helpers.layouts import ENGINES, WORLDS

README = Path(__file__).parents[2] / "README.md"
BEGIN, END = "<!-- begin: python -m tests.helpers.support -->\n", "<!-- end -->\n"
SHARES_BEGIN = "<!-- begin shares: python -m tests.helpers.support -->\n"


@dataclass(frozen=True)
class Row:
    """One kind of layout.

    Attributes:
        layout: what users call it.
        keeps: what a rank keeps the shadow of.
        swap: what entering a swap takes.
        modes: names in the tables of the tests; a layout is supported if its modes are there.
    """

    layout: str
    keeps: str
    swap: str
    modes: tuple[str, ...]


ROWS = (
    Row(
        "DDP; `replicate` as made of FSDP2",
        "1/R of the parameters",
        "one gather",
        ("ddp", "ddp_bf16", "replicate"),
    ),
    Row(
        "FSDP2: fp32, mixed precision, bf16; shards of any dimension",
        "its shard",
        "local copy",
        ("fsdp2", "fsdp2_mixed", "fsdp2_bf16", "fsdp2_dim1"),
    ),
    Row("HSDP (FSDP2 on two axes)", "1/R of its shard", "one gather", ("hsdp", "hsdp_whole")),
    Row(
        "tensor and expert parallelism, with or without FSDP2",
        "its shard; 1/R of what is replicated",
        "one gather",
        ("tp", "tp_fsdp2", "ep_fsdp2"),
    ),
    Row(
        "FSDP1: FULL_SHARD, SHARD_GRAD_OP, mixed precision, bf16, flat or original parameters",
        "its shard, without padding",
        "local copy",
        ("fsdp1", "fsdp1_flat", "fsdp1_grad_op", "fsdp1_mixed", "fsdp1_bf16"),
    ),
    Row(
        "FSDP1: HYBRID_SHARD, NO_SHARD",
        "1/R of its shard",
        "one gather",
        ("fsdp1_hybrid", "fsdp1_hybrid_flat", "fsdp1_no_shard"),
    ),
    Row("DeepSpeed without ZeRO (stage 0)", "1/R of the masters", "one gather", ("zero0",)),
    Row(
        "DeepSpeed ZeRO 1, 2, 3", "its master partition", "one gather", ("zero1", "zero2", "zero3")
    ),
)


#: Parameters of the model of which tests/model/sources/test_meshes.py measures the shadow on 4
#: ranks.
SHARED_NUMEL = 4_198_400
#: Bytes of it on every rank: where replicas share the work, and with ``shard_replicas=False``.
SHARES = {
    "DDP": (4_198_400, 16_793_600),
    "HSDP, 2 x 2": (4_198_400, 8_396_800),
    "FSDP1 `HYBRID_SHARD`, 2 x 2": (4_198_400, 8_396_800),
}


def worlds() -> dict[str, set[int]]:
    """Every mode of the tests, with the numbers of ranks that it is tested on."""
    found = {mode: set(sizes) for mode, sizes in WORLDS.items()}
    for size, stage, *_ in ENGINES:
        found.setdefault(f"zero{stage}", set()).add(size)
    return found


def table() -> str:
    """The table in Markdown."""
    return BEGIN + "".join(f"{line}\n" for line in _lines()) + END


def _lines() -> Iterator[str]:
    tested = worlds()
    yield "| layout | each rank keeps the shadow of | entering a swap | tested on CPU ranks |"
    yield "|---|---|---|---|"
    yield "| one process | everything | local copy | 1 |"
    for row in ROWS:
        sizes = sorted(set().union(*(tested[mode] for mode in row.modes)))
        yield f"| {row.layout} | {row.keeps} | {row.swap} | {', '.join(map(str, sizes))} |"
    yield "| any of these on GPUs, over NCCL | the same | the same | not run yet: `make test-gpu` |"


def shares() -> str:
    """The table of what replicas save."""
    lines = [
        f"| {SHARED_NUMEL:,} parameters on 4 ranks | shadow on each | `shard_replicas=False` |",
        "|---|---|---|",
    ]
    for layout, (shared, whole) in SHARES.items():
        lines.append(f"| {layout} | {shared:,} bytes | {whole:,} bytes |")
    return SHARES_BEGIN + "".join(f"{line}\n" for line in lines) + END


def main() -> None:
    text = README.read_text()
    for begin, new in ((SHARES_BEGIN, shares()), (BEGIN, table())):
        start = text.index(begin)
        stop = text.index(END, start) + len(END)
        text = text[:start] + new + text[stop:]
    README.write_text(text)


if __name__ == "__main__":
    main()
