"""What has to be said of values that were written, beyond that they were."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy

from sharded_ema.checkpoint.reading.chunks import Chunk
from sharded_ema.tools.casting import Bytes, widen


@dataclass(slots=True)
class Tally:
    """Counts of one output file, or of all.

    Attributes:
        unchecked: chunks without a checksum among those that went into it.
        overflowed: finite elements that float16 has no room for, so that they are infinite in it.
    """

    unchecked: int = 0
    overflowed: int = 0

    def add(self, other: Tally) -> None:
        """Count what another one has counted."""
        self.unchecked += other.unchecked
        self.overflowed += other.overflowed

    def see_chunks(self, chunks: Sequence[Chunk]) -> None:
        """Count those that nothing can be compared with."""
        self.unchecked += sum(c.digest is None and c.crc32 is None for c in chunks)

    def see_cast(self, block: Bytes, source: str, written: Bytes, target: str) -> None:
        """Count what has become infinite; the other types reach as far as fp32.

        Args:
            block: elements of the dtype ``source``, as uint8.
            written: what they became, of the dtype ``target``.
        """
        if target == "F16":
            infinite = (written.view("<u2") & 0x7FFF) == 0x7C00
            if infinite.any():
                with numpy.errstate(invalid="ignore"):  # of signalling NaN
                    before = widen(block, source)[infinite]
                self.overflowed += int(numpy.isfinite(before).sum())

    def notes(self) -> list[str]:
        """A line for each thing that was met."""
        lines = []
        if self.unchecked:
            lines.append(
                f"{self.unchecked} chunks carry no checksum, so their bytes were not checked"
            )
        if self.overflowed:
            lines.append(
                f"{self.overflowed} elements are beyond float16's 65504 and were written as "
                "infinite; bfloat16 has room for them (--dtype bfloat16)"
            )
        return lines
