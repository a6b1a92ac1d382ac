"""The loops of the fused update in Triton: one launch for all tensors of a device.

Only :mod:`sharded_ema.averaging.kernels.launches` imports this, and only when an average lies on a
GPU. One program works on one row of a table: addresses and a number of elements.
"""

import subprocess

import triton
import triton.language as tl
from triton.errors import TritonError

# What a compiler or a driver that does not fit raises.
FAILURES = (TritonError, RuntimeError, OSError, subprocess.SubprocessError)
# Elements that a program moves at a time: 16 for each of its threads.
BLOCK = tl.constexpr(2048)
NUM_WARPS = 4


@triton.jit
def _weight(k: tl.constexpr, w0, w1, w2, w3, w4, w5, w6, w7):
    if k == 0:
        w = w0
    elif k == 1:
        w = w1
    elif k == 2:
        w = w2
    elif k == 3:
        w = w3
    elif k == 4:
        w = w4
    elif k == 5:
        w = w5
    elif k == 6:
        w = w6
    else:
        w = w7
    return w


@triton.jit
def _is_nonfinite(value):
    # As bits, which no compiler can reason about.
    if value.dtype == tl.float64:
        found = (value.to(tl.int64, bitcast=True) & 0x7FF0000000000000) == 0x7FF0000000000000
    else:
        found = (value.to(tl.int32, bitcast=True) & 0x7F800000) == 0x7F800000
    return found


@triton.jit
def _move(
    live, shadows, offsets, mask,
    w0, w1, w2, w3, w4, w5, w6, w7,
    SHADOW: tl.constexpr, K: tl.constexpr, GUARD: tl.constexpr, HEAL: tl.constexpr,
    ALIGNED: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Move one block of every shadow; returns which elements were left alone, as 0 and 1."""
    # A mask, even one that is always true, makes accesses of 32 bits out of those of 128.
    if WHOLE:
        value = tl.load(live + offsets).to(SHADOW)
    else:
        value = tl.load(live + offsets, mask=mask, other=0.0).to(SHADOW)
    bad = _is_nonfinite(value)
    for k in tl.static_range(K):
        w = _weight(k, w0, w1, w2, w3, w4, w5, w6, w7)
        shadow = tl.load(shadows + k).to(tl.pointer_type(SHADOW))
        if ALIGNED:
            shadow = tl.multiple_of(shadow, 16)
        if WHOLE:
            old = tl.load(shadow + offsets)
        else:
            old = tl.load(shadow + offsets, mask=mask, other=0.0)
        # lerp as PyTorch computes it, from the nearer end; at 1 nothing of the shadow is left.
        near = tl.abs(w) < 0.5
        new = tl.fma(value - old, tl.where(near, w, w - 1.0), tl.where(near, old, value))
        new = tl.where(w == 1.0, value, new)
        if HEAL:
            new = tl.where(_is_nonfinite(old), value, new)
        if GUARD:
            new = tl.where(bad, old, new)
        if WHOLE:
            tl.store(shadow + offsets, new)
        else:
            tl.store(shadow + offsets, new, mask=mask)
    return bad.to(tl.int32)


@triton.jit
def _row(
    address, shadows, numel, skipped,
    w0, w1, w2, w3, w4, w5, w6, w7,
    LIVE: tl.constexpr, SHADOW: tl.constexpr,
    K: tl.constexpr, GUARD: tl.constexpr, HEAL: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Move all elements of a row whose parameter has the dtype ``LIVE``."""
    live = address.to(tl.pointer_type(LIVE))
    if ALIGNED:
        live = tl.multiple_of(live, 16)
    lanes = tl.arange(0, BLOCK)
    found = tl.zeros([BLOCK], dtype=tl.int32)
    whole = numel // BLOCK * BLOCK
    for start in range(0, whole, BLOCK):
        start = tl.multiple_of(start, BLOCK)
        found += _move(
            live, shadows, start + lanes, lanes < BLOCK,
            w0, w1, w2, w3, w4, w5, w6, w7, SHADOW, K, GUARD, HEAL, ALIGNED, True,
        )  # fmt: skip
    if whole < numel:
        offsets = whole + lanes
        found += _move(
            live, shadows, offsets, offsets < numel,
            w0, w1, w2, w3, w4, w5, w6, w7, SHADOW, K, GUARD, HEAL, ALIGNED, False,
        )  # fmt: skip
    if GUARD:
        count = tl.sum(found, axis=0)
        if count > 0:
            tl.atomic_add(skipped, count.to(tl.int64))


@triton.jit
def _row_of_program(
    table, skipped,
    w0, w1, w2, w3, w4, w5, w6, w7,
    SHADOW: tl.constexpr, K: tl.constexpr, GUARD: tl.constexpr, HEAL: tl.constexpr,
    KINDS: tl.constexpr,
):  # fmt: skip
    """Move the row of this program, as its kind says."""
    row = table + tl.program_id(0).to(tl.int64) * (3 + K)
    address = tl.load(row)
    numel = tl.load(row + 1).to(tl.int32)
    kind = tl.load(row + 2).to(tl.int32)
    for k in tl.static_range(8):
        if (KINDS >> k) & 1:
            if kind == k:
                if k // 2 == 0:
                    _row(
                        address, row + 3, numel, skipped, w0, w1, w2, w3, w4, w5, w6, w7,
                        tl.float32, SHADOW, K, GUARD, HEAL, k % 2 == 1,
                    )  # fmt: skip
                elif k // 2 == 1:
                    _row(
                        address, row + 3, numel, skipped, w0, w1, w2, w3, w4, w5, w6, w7,
                        tl.bfloat16, SHADOW, K, GUARD, HEAL, k % 2 == 1,
                    )  # fmt: skip
                elif k // 2 == 2:
                    _row(
                        address, row + 3, numel, skipped, w0, w1, w2, w3, w4, w5, w6, w7,
                        tl.float16, SHADOW, K, GUARD, HEAL, k % 2 == 1,
                    )  # fmt: skip
                else:
                    _row(
                        address, row + 3, numel, skipped, w0, w1, w2, w3, w4, w5, w6, w7,
                        tl.float64, SHADOW, K, GUARD, HEAL, k % 2 == 1,
                    )  # fmt: skip


@triton.jit
def fused_lerp(
    table, skipped,
    w0, w1, w2, w3, w4, w5, w6, w7,
    K: tl.constexpr, GUARD: tl.constexpr, KINDS: tl.constexpr,
):  # fmt: skip
    """``shadow <- lerp(shadow, live, weight)`` of one row, with shadows in fp32.

    Args:
        table: int64 rows: address of the parameter, elements, kind, addresses of K shadows.
        skipped: int64, grows by the elements left alone.
        w0, ..., w7: weights of the profiles, fp32.
        K: number of profiles.
        GUARD: leave elements alone whose parameter is NaN or Inf in the shadow's dtype.
        KINDS: bits of the kinds that are in the table. A kind is twice the number of the dtype
            (fp32, bf16, fp16, fp64), and one more where all addresses are multiples of 16.
    """
    _row_of_program(
        table, skipped, w0, w1, w2, w3, w4, w5, w6, w7, tl.float32, K, GUARD, False, KINDS
    )  # fmt: skip


@triton.jit
def _double(bits):
    # The type that it has already, but for the interpreter.
    return bits.to(tl.int64).to(tl.float64, bitcast=True)


# Numbers that differ at every step would be compiled in as they are, and small ones as int32.
@triton.jit(do_not_specialize=["b0", "b1", "b2", "b3", "b4", "b5", "b6", "b7"])
def fused_lerp_double(
    table, skipped,
    b0: tl.int64, b1: tl.int64, b2: tl.int64, b3: tl.int64,
    b4: tl.int64, b5: tl.int64, b6: tl.int64, b7: tl.int64,
    K: tl.constexpr, GUARD: tl.constexpr, KINDS: tl.constexpr,
):  # fmt: skip
    """As :func:`fused_lerp`, with shadows in fp64.

    Args:
        b0, ..., b7: bits of the weights in fp64, as which no number is passed.
    """
    _row_of_program(
        table, skipped,
        _double(b0), _double(b1), _double(b2), _double(b3),
        _double(b4), _double(b5), _double(b6), _double(b7),
        tl.float64, K, GUARD, False, KINDS,
    )  # fmt: skip


@triton.jit
def _load_weight(weights, k: tl.constexpr, K: tl.constexpr, SHADOW: tl.constexpr):
    return tl.load(weights + k).to(SHADOW) if k < K else tl.full([], 0.0, SHADOW)


@triton.jit
def fused_lerp_by_step(
    table, skipped,
    counter, weights, steps, period,
    DOUBLE: tl.constexpr, K: tl.constexpr, GUARD: tl.constexpr, KINDS: tl.constexpr,
):  # fmt: skip
    """As the others, by the weights of the step that is counted on the device.

    With the guard, elements of a shadow that are NaN or Inf become the parameter's.

    Args:
        counter: int64: the step, and that of the first row of ``weights``.
        weights: fp64 rows of K; a negative one says that nothing moves at this step.
        steps: rows of ``weights``.
        period: so many of the last rows are repeated behind them.
        DOUBLE: whether shadows are in fp64.
    """
    # Before anything is counted the kernel is only tried out.
    index = tl.maximum(tl.load(counter) - tl.load(counter + 1), 0)
    index = tl.where(index < steps, index, steps - period + (index - steps) % period)
    row = weights + index * K
    SHADOW: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    first = tl.load(row)
    if first >= 0.0:
        _row_of_program(
            table, skipped,
            first.to(SHADOW), _load_weight(row, 1, K, SHADOW), _load_weight(row, 2, K, SHADOW),
            _load_weight(row, 3, K, SHADOW), _load_weight(row, 4, K, SHADOW),
            _load_weight(row, 5, K, SHADOW), _load_weight(row, 6, K, SHADOW),
            _load_weight(row, 7, K, SHADOW),
            SHADOW, K, GUARD, GUARD, KINDS,
        )  # fmt: skip
