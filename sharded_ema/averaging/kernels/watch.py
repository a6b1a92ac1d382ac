"""Whether the tensors that a plan was made of still are what its kernels read.

A tensor may get other memory, another shape or other strides under its own name. This is asked
before every update, so it asks no more than what can make an update wrong.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from operator import is_

from torch import Tensor

from sharded_ema.averaging.kernels.batches import TINY_NUMEL
from sharded_ema.model.memory import Layouts, pick


class Watch:
    """Remembers how some tensors are read, and how they lay then.

    Those that the kernels read themselves are read as they are at the time: it is enough that they
    are the same objects and that none has shrunk to what would be broadcast. Where nothing
    converts them a new dtype or device would fail midway, so they must have the memory that they
    had; of the smallest of these the shape is left to the kernels to refuse. Of those that are read
    through views, and of those that are other objects each time, as buffers are, everything
    counts.

    Args:
        live: the tensors; the same order holds below.
        direct: ids of those that the kernels read as they are.
        copied: ids of those that are copied to where the kernels read them.
    """

    def __init__(
        self, live: Sequence[Tensor], direct: Collection[int], copied: Collection[int]
    ) -> None:
        self._live = list(live)
        self._direct = [i for i, t in enumerate(live) if id(t) in direct]
        self._copied = [i for i, t in enumerate(live) if id(t) in copied]
        known = {*self._direct, *self._copied}
        self._viewed = [i for i, t in enumerate(live) if t.numel() and i not in known]
        self._prepare()

    def _prepare(self) -> None:
        live, count = self._live, len(self._live)
        held = sorted([*self._direct, *self._copied])
        shrinks = sorted(
            [i for i in self._copied if live[i].numel() > 1]
            + [i for i in self._direct if live[i].numel() >= TINY_NUMEL]
        )
        self._pick_held = pick(held, count)
        self._held = [live[i] for i in held]
        self._pick_direct = pick(self._direct, count)
        self._pointers = [live[i].data_ptr() for i in self._direct]
        self._pick_shrinks = pick(shrinks, count)
        self._numels = [live[i].numel() for i in shrinks]
        self._pick_viewed = pick(self._viewed, count)
        self._layouts = Layouts([live[i] for i in self._viewed])

    def holds(self, live: Sequence[Tensor]) -> bool:
        """Whether an update would read these tensors, element by element."""
        if not all(map(is_, self._pick_held(live), self._held)):
            changing = [i for i in (*self._direct, *self._copied) if live[i] is not self._live[i]]
            if not Layouts([self._live[i] for i in changing]).hold([live[i] for i in changing]):
                return False
            self._direct = [i for i in self._direct if i not in changing]
            self._copied = [i for i in self._copied if i not in changing]
            self._viewed = sorted([*self._viewed, *changing])
            self._prepare()
        return (
            self._pointers == list(map(Tensor.data_ptr, self._pick_direct(live)))
            and self._numels == list(map(Tensor.numel, self._pick_shrinks(live)))
            and self._layouts.hold(self._pick_viewed(live))
        )
