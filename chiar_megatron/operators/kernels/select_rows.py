"""From a router's choice to rows, in one launch of one program: count, cut to the capacity, number.

The cut is sought among the scores' bits, and only where there is overflow: a sort for every layer would cost
more than the layer's routing.
"""

# Kernels are Triton's language, not typed Python.
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,misc"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK, WARPS = 8192, 32
# Bits of a count; the search for the cut adds three at once.
FIELD = tl.constexpr(21)
COUNT = tl.constexpr(2**21 - 1)
# The lowest key: every score that is a number lies above it.
LOWEST = tl.constexpr(-(2**31))
HIGHEST = tl.constexpr(2**31 - 1)


def select_rows(
    light_N: Tensor, score_N: Tensor, capacity: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The light tokens (bool) of the highest scores (float32), of equal ones the earlier, as rows.

    Returns kept_N bool; slot_N int64, the row of each kept token, else 0; index_R int64 `[capacity]`, the
    token of each row, ascending, 0 in unused rows; rest_N int32, the other tokens, ascending, as far as
    they go; counts int32 `[2]`: rows used, tokens in rest_N.
    """
    kept, slot, index, rest, counts = _select_op(light_N, score_N, capacity)
    return kept, slot, index, rest, counts


@triton.jit
def _load(light_ptr, score_ptr, start, N, BLOCK_N: tl.constexpr):
    """Light flags (int32) and keys that order as the scores do."""
    place = start + tl.arange(0, BLOCK_N)
    light = tl.load(light_ptr + place, mask=place < N, other=0).to(tl.int32)
    bits = tl.load(score_ptr + place, mask=place < N, other=0.0).to(tl.int32, bitcast=True)
    key = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return place, light, key


@triton.jit
def _select_kernel(inputs, outputs, N, capacity, BLOCK_N: tl.constexpr):
    light_ptr, score_ptr = inputs
    kept_ptr, slot_ptr, index_ptr, rest_ptr, counts_ptr = outputs
    # Every lane keeps figures of its own, which meet once, after the loop.
    lights, least = tl.zeros([BLOCK_N], tl.int32), tl.full([BLOCK_N], HIGHEST, tl.int32)
    most = tl.full([BLOCK_N], LOWEST, tl.int32)
    for start in range(0, N, BLOCK_N):
        place, light, key = _load(light_ptr, score_ptr, start, N, BLOCK_N)
        lights += light
        least = tl.minimum(least, tl.where(light > 0, key, HIGHEST))
        most = tl.maximum(most, tl.where(light > 0, key, LOWEST))
    total, cut, high = tl.sum(lights, 0), tl.min(least, 0).to(tl.int64), tl.max(most, 0).to(tl.int64)
    if total > capacity:
        # The largest key that `capacity` light tokens reach or pass: the interval that holds it is quartered.
        while cut < high:
            third = cut + (3 * (high - cut) + 3) // 4
            second = cut + (high - cut + 1) // 2
            first = cut + (high - cut + 3) // 4
            reached = tl.zeros([BLOCK_N], tl.int64)
            for start in range(0, N, BLOCK_N):
                place, light, key = _load(light_ptr, score_ptr, start, N, BLOCK_N)
                wide, one = key.to(tl.int64), light.to(tl.int64)
                # Three counts in one sum.
                reached += tl.where(wide >= first, one, 0) + tl.where(wide >= second, one << FIELD, 0)
                reached += tl.where(wide >= third, one << (2 * FIELD), 0)
            counts = tl.sum(reached, 0)
            first_reached = (counts & COUNT) >= capacity
            second_reached = ((counts >> FIELD) & COUNT) >= capacity
            third_reached = (counts >> (2 * FIELD)) >= capacity
            high = tl.where(third_reached, high, third - 1)
            high = tl.where(second_reached, high, second - 1)
            high = tl.where(first_reached, high, first - 1)
            cut = tl.where(first_reached, first, cut)
            cut = tl.where(second_reached, second, cut)
            cut = tl.where(third_reached, third, cut)
    else:
        cut = tl.cast(LOWEST, tl.int64)
    ties_left = 0
    if total > capacity:
        above = 0
        for start in range(0, N, BLOCK_N):
            place, light, key = _load(light_ptr, score_ptr, start, N, BLOCK_N)
            above += tl.sum(tl.where(key.to(tl.int64) > cut, light, 0), 0)
        ties_left = capacity - above
    rows = 0
    for start in range(0, N, BLOCK_N):
        place, light, key = _load(light_ptr, score_ptr, start, N, BLOCK_N)
        kept = tl.where(key.to(tl.int64) > cut, light, 0)
        if total > capacity:
            tie = tl.where(key.to(tl.int64) == cut, light, 0)
            fits = tl.where(tl.cumsum(tie, 0) <= ties_left, tie, 0)
            ties_left -= tl.sum(fits, 0)
            kept += fits
        slot = rows + tl.cumsum(kept, 0) - 1
        tl.store(kept_ptr + place, kept.to(tl.int8), mask=place < N)
        tl.store(slot_ptr + place, tl.where(kept > 0, slot, 0).to(tl.int64), mask=place < N)
        tl.store(index_ptr + slot, place.to(tl.int64), mask=kept > 0)
        # Of the tokens up to this one slot + 1 are kept.
        tl.store(rest_ptr + place - slot - 1, place, mask=(place < N) & (kept == 0))
        rows += tl.sum(kept, 0)
    for start in range(rows, capacity, BLOCK_N):
        unused = start + tl.arange(0, BLOCK_N)
        tl.store(index_ptr + unused, tl.zeros([BLOCK_N], tl.int64), mask=unused < capacity)
    tl.store(counts_ptr, rows)
    tl.store(counts_ptr + 1, N - rows)


@torch.library.custom_op("chiar_megatron::select_rows", mutates_args=())
def _select_op(light: Tensor, score: Tensor, capacity: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    assert len(light) < 2**FIELD.value, "counts would overflow their fields"
    light, score = light.contiguous(), score.contiguous()
    outputs = _empty(light, capacity)
    kept, *others = outputs
    block = min(BLOCK, triton.next_power_of_2(max(16, len(light))))
    _select_kernel[(1,)](
        (light.view(torch.int8), score),
        (kept.view(torch.int8), *others),
        len(light),
        capacity,
        block,
        num_warps=WARPS if block == BLOCK else 4,
    )
    return outputs


@_select_op.register_fake
def _(light: Tensor, score: Tensor, capacity: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _empty(light, capacity)


def _empty(light: Tensor, capacity: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    n, device = light.shape[0], light.device
    return (
        torch.empty(n, dtype=torch.bool, device=device),
        torch.empty(n, dtype=torch.int64, device=device),
        torch.empty(capacity, dtype=torch.int64, device=device),
        torch.empty(n, dtype=torch.int32, device=device),
        torch.empty(2, dtype=torch.int32, device=device),
    )
