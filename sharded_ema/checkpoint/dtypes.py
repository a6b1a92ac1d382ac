"""Names that safetensors gives to torch dtypes."""

from __future__ import annotations

import torch

from sharded_ema.errors import CheckpointWriteError

SAFETENSORS_NAME: dict[torch.dtype, str] = {
    torch.complex128: "C128",
    torch.complex64: "C64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
    torch.float8_e8m0fnu: "F8_E8M0",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.uint16: "U16",
    torch.uint32: "U32",
    torch.uint64: "U64",
    torch.bool: "BOOL",
}


def safetensors_name(dtype: torch.dtype, key: str) -> str:
    """Name of a dtype.

    Raises:
        CheckpointWriteError: safetensors has none for it.
    """
    if dtype not in SAFETENSORS_NAME:
        raise CheckpointWriteError(
            f"{key} has dtype {dtype}, which safetensors cannot store; nothing was committed. "
            'For a buffer, pass buffers="ignore"'
        )
    return SAFETENSORS_NAME[dtype]


TORCH_DTYPE: dict[str, torch.dtype] = {name: dtype for dtype, name in SAFETENSORS_NAME.items()}
