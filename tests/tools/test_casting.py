"""Conversions are those of torch for every pattern of bits that rounds in its own way."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sharded_ema.tools.casting import caster

TORCH = {
    "F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16,
}  # fmt: skip
INTEGER = {8: torch.int64, 4: torch.int32, 2: torch.int16}


def check(values: torch.Tensor, source: str, target: str) -> None:
    assert values.dtype == TORCH[source]
    cast = caster(source, target)
    assert cast is not None
    data = values.view(torch.uint8).numpy()
    found = torch.from_numpy(cast(data).copy()).view(TORCH[target])
    wanted = values.to(TORCH[target])
    assert torch.equal(found.isnan(), wanted.isnan())
    # Which NaN it is differs between processors; everything else is equal in every bit.
    integer, good = INTEGER[wanted.itemsize], ~wanted.isnan()
    assert torch.equal(found.view(integer)[good], wanted.view(integer)[good])


def from_bits(bits: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(bits.reshape(-1).astype("<u4").view("<i4")).view(torch.float32)


def with_tails(kept: int) -> torch.Tensor:
    """All upper ``kept`` bits of fp32, each with tails at, beside and between ties."""
    cut = 32 - kept
    tie = 1 << (cut - 1)
    tails = np.array([0, 1, tie - 1, tie, tie + 1, 2 * tie - 1], "u4")
    return from_bits((np.arange(1 << kept, dtype="u4") << cut)[:, None] | tails)


@pytest.mark.parametrize(("target", "kept"), [("BF16", 16), ("F16", 19), ("F16", 16), ("BF16", 18)])
def test_every_upper_half_of_fp32(target: str, kept: int) -> None:
    # 16 bits are what bfloat16 keeps, 19 those of float16; numbers that become subnormal in it keep
    # fewer, so each number of bits meets the ties of some.
    check(with_tails(kept), "F32", target)


@pytest.mark.parametrize("kept", range(8, 16))
def test_ties_of_subnormal_numbers(kept: int) -> None:
    check(with_tails(kept), "F32", "F16")
    check(with_tails(kept), "F32", "BF16")


@pytest.mark.parametrize("target", ["F32", "BF16", "F16"])
@pytest.mark.parametrize("source", ["BF16", "F16"])
def test_every_number_of_16_bits(source: str, target: str) -> None:
    if source != target:
        bits = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16)
        check(bits.view(TORCH[source]), source, target)


@pytest.mark.parametrize("target", ["F32", "BF16", "F16"])
def test_fp64(target: str) -> None:
    exact = with_tails(16).double()
    check(torch.cat([exact, exact * (1 + 2.0**-40), exact * (1 - 2.0**-40)]), "F64", target)


def test_what_is_kept() -> None:
    zeros = from_bits(np.array([0x00000000, 0x80000000, 0x7F800000, 0xFF800000, 0x7FC00000]))
    cast = caster("F32", "BF16")
    assert cast is not None
    found = cast(zeros.view(torch.uint8).numpy()).view("<u2")
    assert found[:4].tolist() == [0x0000, 0x8000, 0x7F80, 0xFF80] and found[4] & 0x7FFF > 0x7F80
