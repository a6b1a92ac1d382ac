"""Which averages stand in for which weights, of all averages in this process.

Several averages may be made of one model, or of models that share parameters, and what one of them
takes for the weights may be what another has put in their place. So each says here what it stands
in for, for as long as it does.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import AbstractContextManager, ContextDecorator
from typing import Any, ClassVar, TypeVar
from weakref import WeakKeyDictionary, WeakSet

from torch import Tensor
from torch.distributed.fsdp import FlatParameter
from torch.distributed.tensor import DTensor

from sharded_ema.errors import Line, user_line, warn
from sharded_ema.model.internals.pytorch import local_tensor
from sharded_ema.model.inventory import Named

F = TypeVar("F", bound=Callable[..., Any])


class Swap(AbstractContextManager[None], ContextDecorator):
    """What ``swap()`` returns: nothing happens until it is entered, and one that never is warns.

    Args:
        begin: makes what is to be entered.
    """

    def __init__(self, begin: Callable[[], AbstractContextManager[None]]) -> None:
        self._begin = begin
        self._entered: list[AbstractContextManager[None]] = []
        self._unused_at: Line | None = user_line()

    def __call__(self, function: F) -> F:
        self._unused_at = None
        return super().__call__(function)

    def __enter__(self) -> None:
        self._unused_at = None
        swap = self._begin()
        swap.__enter__()
        self._entered.append(swap)

    def __exit__(self, *failure: Any) -> bool | None:
        return self._entered.pop().__exit__(*failure)

    def __del__(self) -> None:
        if self._unused_at is not None:
            warn(
                "swap() was called and not entered, so the raw weights are where they were: write "
                "'with ema.swap():' around what is to see the average",
                line=self._unused_at,
            )


class StandingIn:
    """An average that stands in for weights, until :meth:`end` is called or nothing holds this.

    Args:
        name: of the average.
        tensors: the weights.
    """

    _active: ClassVar[WeakSet[StandingIn]] = WeakSet()

    def __init__(self, name: str, tensors: Iterable[Named]) -> None:
        self.name = name
        self._tensors = list(tensors)
        self._known: WeakKeyDictionary[object, list[str]] = WeakKeyDictionary()
        self._active.add(self)

    def end(self) -> None:
        """The weights are back in their place."""
        self._active.discard(self)

    def replaced(self, tensors: Iterable[Named]) -> list[str]:
        """Names of those of some tensors that it stands in for."""
        mine = {key for named in self._tensors for key in _keys(named)}
        return [named.fqn for named in tensors if not mine.isdisjoint(_keys(named))]

    def replaced_of(self, asker: object, tensors: Iterable[Named]) -> list[str]:
        """The same, remembered for who asks: updates of other models go on during a swap."""
        if asker not in self._known:
            self._known[asker] = self.replaced(tensors)
        return self._known[asker]

    @classmethod
    def others(cls, than: StandingIn | None) -> list[StandingIn]:
        """All that stand in for weights now, but for one."""
        return [each for each in cls._active if each is not than] if cls._active else []


def _keys(named: Named) -> Iterator[Hashable]:
    """What is the same for a tensor in every inventory: the object, and where its memory begins."""
    tensor: Tensor = named.tensor
    # Buffers are replaced freely, and a flat parameter holds many.
    if not named.is_parameter or isinstance(tensor, FlatParameter):
        yield id(named.owner), named.attribute
        return
    yield id(tensor)
    local: Tensor = local_tensor(tensor) if isinstance(tensor, DTensor) else tensor
    if local.numel():
        yield "memory", local.data_ptr()
