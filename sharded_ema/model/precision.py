"""Which dtype an average has, and complex tensors as the real numbers that they are made of."""

from __future__ import annotations

import torch
from torch import Tensor

from sharded_ema.config import dtype_name
from sharded_ema.errors import ConfigError


def as_dtype(dtype: object, what: str) -> torch.dtype | None:
    """A dtype that a user has given: PyTorch's, numpy's, or the name of one.

    Args:
        dtype: ``None`` for none.
        what: the name of the argument, for the message.

    Raises:
        ConfigError: PyTorch has none of that name.
    """
    if dtype is None:
        return None
    found = getattr(torch, dtype_name(dtype), None)
    if not isinstance(found, torch.dtype):
        raise ConfigError(f"{what} must be a dtype such as torch.bfloat16, got {dtype!r}")
    return found


def average_dtype(parameter: torch.dtype, asked: torch.dtype | None) -> torch.dtype:
    """The dtype of an average: at least fp32, and at least as precise as its parameter.

    Args:
        parameter: dtype of what is averaged.
        asked: a real dtype that is wanted instead. The parts of complex numbers have it too, but
            for those below fp32, of which PyTorch has no complex numbers to compute with.
    """
    wide = asked or (torch.float64 if _real(parameter) is torch.float64 else torch.float32)
    if not parameter.is_complex:
        return wide
    return torch.complex128 if wide is torch.float64 else torch.complex64


def _real(dtype: torch.dtype) -> torch.dtype:
    return dtype.to_real() if dtype.is_complex else dtype


def real_view(tensor: Tensor) -> Tensor:
    """The same memory as real numbers: complex ones get a last dimension of 2, others stay."""
    return torch.view_as_real(tensor.detach()) if tensor.is_complex() else tensor
