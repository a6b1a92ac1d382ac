"""Which dtype an average has, and complex tensors as the real numbers that they are made of."""

from __future__ import annotations

import torch
from torch import Tensor


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
