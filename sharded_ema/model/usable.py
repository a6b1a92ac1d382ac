"""Which tensors of a model cannot be averaged, whatever the framework."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from sharded_ema.errors import BindError, EMAWarning
from sharded_ema.model.layout import Shape


def refuse_lazy(prefix: str, module: nn.Module) -> None:
    """Refuse parameters and buffers whose shape is not known yet.

    Args:
        prefix: what the names of the module's own tensors begin with.

    Raises:
        BindError: see above.
    """
    for name, tensor in (*module._parameters.items(), *module._buffers.items()):
        if tensor is not None and is_lazy(tensor):
            raise BindError(
                f"{prefix}{name} of a {type(module).__name__} is not initialised yet; run a "
                "forward before making the average"
            )


def warn_of_complex(buffers: Iterable[tuple[str, Tensor]]) -> None:
    """Warn of buffers that no save can hold, before the first save fails because of them."""
    found = [name for name, buffer in buffers if buffer.is_complex()]
    if found:
        warnings.warn(
            f"the buffers {found[:3]} are complex, which checkpoints cannot hold: save() refuses "
            'them. Register them with persistent=False, or pass buffers="ignore"',
            EMAWarning,
            stacklevel=6,
        )


def refuse_unusable(fqn: str, tensor: Tensor, shape: Shape) -> None:
    """Refuse a parameter that cannot be averaged, or stored if it is frozen.

    Args:
        shape: global shape.

    Raises:
        BindError: see above.
    """
    if tensor.is_complex() and tensor.requires_grad:
        raise BindError(f"parameter {fqn} is complex; only real parameters can be averaged")
    if tensor.layout != torch.strided:
        raise BindError(f"parameter {fqn} has the layout {tensor.layout}; make it dense")
    overlaps = zip(tensor.shape, tensor.stride(), strict=True)
    if any(size > 1 and stride == 0 for size, stride in overlaps):
        raise BindError(
            f"parameter {fqn} is an expanded view, whose elements share memory; make it contiguous"
        )
    if tensor.requires_grad and tensor.dtype == torch.float4_e2m1fn_x2:
        raise BindError(
            f"parameter {fqn} packs two elements into a byte; average the parameters before "
            "they are quantised"
        )
    if (
        tensor.requires_grad
        and is_traceable_wrapper_subclass(tensor)
        and not isinstance(tensor, DTensor)
    ):
        raise BindError(
            f"parameter {fqn} is a {type(tensor).__name__}, which keeps its elements in other "
            "tensors; only plain tensors can be averaged. Convert the model after making its "
            "average, or exclude it"
        )
    if tensor.is_meta:
        raise BindError(
            f"parameter {fqn} is on the meta device; materialise the model (to_empty and "
            "initialise, or load a checkpoint) before making its average"
        )
    if not math.prod(shape):
        raise BindError(
            f"parameter {fqn} has shape {shape}, that is 0 elements; remove it from the model"
        )
