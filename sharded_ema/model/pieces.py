"""Pieces of a global tensor in the form that torch.distributed.checkpoint plans with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.tensor import DTensor

from sharded_ema.errors import warn
from sharded_ema.model.internals.pytorch import box_of, local_tensor, wrapper_tensor
from sharded_ema.model.layout import Box, FlatRange

Piece = tuple[Box, Tensor]


class FlatShard(Tensor):
    """Local blocks of a global tensor; to anyone else a tensor of the global shape without data.

    It implements DCP's checkpointable protocol (``__create_write_items__`` and its two
    siblings), so that ``dcp.save``, ``dcp.async_save`` and ``dcp.load`` treat every block as a
    chunk of one N-D tensor and reshard it like a DTensor's. No operation but those that stagers
    need is supported.

    Args:
        shape: global shape.
        pieces: blocks of this rank, each a view of memory that a load may write to.
        writes: whether a save writes the pieces from this rank.
        reads: whether a load fills them.
        dtype, device: of the pieces; needed because there may be none.
    """

    _pieces: list[Piece]
    _writes: bool
    _reads: bool

    @staticmethod
    def __new__(
        cls,
        shape: Sequence[int],
        pieces: Sequence[Piece],
        *,
        dtype: torch.dtype,
        device: torch.device,
        writes: bool = True,
        reads: bool = True,
    ) -> FlatShard:
        self: FlatShard = wrapper_tensor(cls, torch.Size(shape), dtype, device)
        self._pieces = list(pieces)
        self._writes = writes
        self._reads = reads
        return self

    @property
    def pieces(self) -> list[Piece]:
        """The local blocks with their position in the global tensor."""
        return self._pieces

    @property
    def writes(self) -> bool:
        """Whether a save writes them from this rank."""
        return self._writes

    @property
    def reads(self) -> bool:
        """Whether a load fills them."""
        return self._reads

    def __reduce_ex__(self, protocol: Any) -> Any:
        if sum(box.numel for box, _ in self._pieces) < self.numel():
            warn(
                "the state of a sharded average is pickled (torch.save?), which keeps this rank's "
                "pieces only; save it with ema.save() or dcp.save, on all ranks"
            )
        return super().__reduce_ex__(protocol)

    def __create_write_items__(self, fqn: str, obj: Any) -> list[WriteItem]:
        return [
            WriteItem(
                index=MetadataIndex(fqn, torch.Size(box.offsets)),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=_chunk(box),
                    properties=TensorProperties.create_from_tensor(piece),
                    size=self.size(),
                ),
            )
            for box, piece in (self._pieces if self._writes else [])
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [_chunk(box) for box, _ in (self._pieces if self._reads else [])]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        wanted = tuple(index.offset or (0,) * self.dim())
        for box, piece in self._pieces:
            if box.offsets == wanted:
                return piece
        raise KeyError(f"{index.fqn} has no piece at {wanted} on this rank")

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        operation = _STAGING.get(func.name())
        if operation is None:
            raise TypeError(f"{func.name()} is not defined on the pieces of a sharded tensor")
        return operation(func, args, kwargs or {})

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        boxes = [box for box, _ in self._pieces]
        return f"FlatShard(shape={tuple(self.shape)}, dtype={self.dtype}, pieces={boxes})"


def _map(func: Callable[..., Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> FlatShard:
    """Apply an operation that yields a tensor like its input to every piece."""
    source = args[0]
    pieces = [(box, func(piece, *args[1:], **kwargs)) for box, piece in source.pieces]
    example = func(torch.empty(0, dtype=source.dtype, device=source.device), *args[1:], **kwargs)
    return FlatShard(
        source.shape,
        pieces,
        dtype=example.dtype,
        device=example.device,
        writes=source.writes,
        reads=source.reads,
    )


def _new_empty(
    func: Callable[..., Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> FlatShard:
    """``new_empty`` of the global shape, which stagers call to make a like-shaped buffer."""
    return _map(torch.empty_like, args[:1], {k: v for k, v in kwargs.items() if v is not None})


def _copy(func: Callable[..., Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> FlatShard:
    target, source = args[0], args[1]
    if not isinstance(target, FlatShard):
        # PyTorch 2.8 stages 0-d tensors as plain ones, which ranks without them would write too.
        raise TypeError(
            "the dcp.async_save of this PyTorch cannot stage the 0-d tensors of an average; use "
            "its own save(asynchronous=True)"
        )
    for (_, into), (_, piece) in zip(target.pieces, source.pieces, strict=True):
        into.copy_(piece, *args[2:], **kwargs)
    return target


_STAGING: dict[str, Callable[..., FlatShard]] = {
    "aten::detach": _map,
    "aten::alias": _map,
    "aten::clone": _map,
    "aten::empty_like": _map,
    "aten::zeros_like": _map,
    "aten::_to_copy": _map,
    "aten::new_empty": _new_empty,
    "aten::copy_": _copy,
}


def _chunk(box: Box) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(offsets=torch.Size(box.offsets), sizes=torch.Size(box.sizes))


def whole(tensor: Tensor, *, writes: bool = True, reads: bool = True) -> FlatShard:
    """A tensor that every rank holds whole."""
    tensor = tensor.resolve_conj().resolve_neg()  # or its memory would hold other numbers
    return FlatShard(
        tensor.shape,
        [(Box.whole(tensor.shape), tensor)],
        dtype=tensor.dtype,
        device=tensor.device,
        writes=writes,
        reads=reads,
    )


def unwritten(value: Tensor) -> FlatShard:
    """The same local blocks, which another rank writes."""
    return FlatShard(
        value.shape,
        pieces_of(value),
        dtype=value.dtype,
        device=value.device,
        writes=False,
        reads=not isinstance(value, FlatShard) or value.reads,
    )


def pieces_of(value: Tensor) -> list[Piece]:
    """The local blocks of any value that may stand in a state dict."""
    if isinstance(value, FlatShard):
        return value.pieces
    if isinstance(value, DTensor):
        return [(box_of(value), local_tensor(value))]
    return [(Box.whole(value.shape), value)]


def range_pieces(
    box: Box, span: FlatRange, flat: Tensor, order: Sequence[int] | None = None
) -> list[Piece]:
    """A 1-D tensor that holds elements ``span`` of ``box``, as blocks (views).

    Args:
        order: dimensions from the outermost to the innermost, if elements are counted so;
            ``None`` for C order.
    """
    if order is not None:
        back = [order.index(dim) for dim in range(len(order))]
        return [
            (part.permuted(back), piece.permute(back))
            for part, piece in range_pieces(box.permuted(order), span, flat)
        ]
    return [
        (part.shifted(box.offsets), flat[start : start + part.numel].view(part.sizes))
        for start, part in span.boxes(box.sizes)
    ]
