"""From a router's choice to rows, in one launch: count, cut to the capacity, number.

Each program numbers some tokens, and counts for itself what lies before them: flags are a byte each, and
waiting for other programs, or for a second launch, would take longer. The cut is sought among the scores'
bits, and only where there is overflow: a sort for every layer would cost more than the layer's routing.
"""

# Kernels are Triton's language, not typed Python.
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,misc"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024  # tokens that a program numbers
CHUNK = 8192  # tokens counted at once
WARPS = 8
# Bits of a count; the search for the cut adds three at once.
FIELD = tl.constexpr(21)
COUNT = tl.constexpr(2**21 - 1)
# The key of what is not light; every light token's is higher.
LOWEST = tl.constexpr(-(2**31))
HIGHEST = tl.constexpr(2**31 - 1)


def select_rows(
    light_N: Tensor, score_N: Tensor, capacity: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The light tokens (bool) of the highest scores (float32), of equal ones the earlier, as rows.

    Returns kept_N bool; slot_N int64, the row of each kept token, else 0; index_R int64 `[capacity]`, the
    token of each row, ascending, 0 in unused rows; rest_N int32, the other tokens, ascending, as far as
    they go; counts int32 `[2]`: rows used, tokens in rest_N; tally float64 `[4]`: light tokens, those of them
    without a row, the sums of all tokens' scores and of their squares.
    """
    kept, slot, index, rest, counts, tally = _select_op(light_N, score_N, capacity)
    return kept, slot, index, rest, counts, tally


@triton.jit
def _keys(inputs, start, N, SIZE: tl.constexpr):
    """Keys of SIZE tokens, which order as the scores do."""
    light_ptr, score_ptr = inputs
    place = start + tl.arange(0, SIZE)
    light = tl.load(light_ptr + place, mask=place < N, other=0) != 0
    bits = tl.load(score_ptr + place, mask=place < N, other=0.0).to(tl.int32, bitcast=True)
    key = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return tl.where(light, tl.maximum(key, LOWEST + 1), LOWEST)


@triton.jit
def _sum_up(values, place, own):
    """All of them, and those before the token `own`."""
    return tl.sum(values, 0), tl.sum(tl.where(place < own, values, 0), 0)


@triton.jit
def _find_cut(inputs, N, capacity, CHUNK: tl.constexpr):
    """The largest key that `capacity` light tokens reach or pass, where more than so many are light."""
    cut, high = tl.cast(HIGHEST, tl.int64), tl.cast(LOWEST, tl.int64)
    for start in range(0, N, CHUNK):
        key = _keys(inputs, start, N, CHUNK)
        cut = tl.minimum(cut, tl.min(tl.where(key > LOWEST, key, HIGHEST), 0).to(tl.int64))
        high = tl.maximum(high, tl.max(key, 0).to(tl.int64))
    # The interval that holds it is quartered.
    while cut < high:
        third = cut + (3 * (high - cut) + 3) // 4
        second = cut + (high - cut + 1) // 2
        first = cut + (high - cut + 3) // 4
        counts = tl.cast(0, tl.int64)
        for start in range(0, N, CHUNK):
            key = _keys(inputs, start, N, CHUNK)
            # Three counts in one sum.
            reached = (key >= first.to(tl.int32)).to(tl.int64)
            reached += (key >= second.to(tl.int32)).to(tl.int64) << FIELD
            reached += (key >= third.to(tl.int32)).to(tl.int64) << (2 * FIELD)
            counts += tl.sum(reached, 0)
        first_reached = (counts & COUNT) >= capacity
        second_reached = ((counts >> FIELD) & COUNT) >= capacity
        third_reached = (counts >> (2 * FIELD)) >= capacity
        high = tl.where(third_reached, high, third - 1)
        high = tl.where(second_reached, high, second - 1)
        high = tl.where(first_reached, high, first - 1)
        cut = tl.where(first_reached, first, cut)
        cut = tl.where(second_reached, second, cut)
        cut = tl.where(third_reached, third, cut)
    return cut.to(tl.int32)


@triton.jit
def _count_light(light_ptr, own, N, CHUNK: tl.constexpr):
    """Light tokens in all, and before the token `own`."""
    total, before = 0, 0
    for start in range(0, N, CHUNK):
        place = start + tl.arange(0, CHUNK)
        light = tl.load(light_ptr + place, mask=place < N, other=0).to(tl.int32)
        in_chunk, here = _sum_up(light, place, own)
        total += in_chunk
        before += here
    return total, before


@triton.jit
def _count_at_cut(inputs, cut, own, N, CHUNK: tl.constexpr):
    """Tokens above the cut in all, and before the token `own`; those at the cut before it."""
    above, above_before, at_before = 0, 0, 0
    for start in range(0, N, CHUNK):
        key = _keys(inputs, start, N, CHUNK)
        place = start + tl.arange(0, CHUNK)
        in_chunk, here = _sum_up((key > cut).to(tl.int32), place, own)
        above += in_chunk
        above_before += here
        at_before += tl.sum(((key == cut) & (place < own)).to(tl.int32), 0)
    return above, above_before, at_before


@triton.jit
def _number(inputs, outputs, sizes, BLOCK: tl.constexpr, CHUNK: tl.constexpr):
    """The tokens of this program; and of the unused rows those of the same numbers."""
    kept_ptr, slot_ptr, index_ptr, rest_ptr, counts_ptr, tally_ptr = outputs
    N, capacity = sizes
    own = tl.program_id(0) * BLOCK
    place = own + tl.arange(0, BLOCK)
    key = _keys(inputs, own, N, BLOCK)
    total, before = _count_light(inputs[0], own, N, CHUNK)
    if total > capacity:
        cut = _find_cut(inputs, N, capacity, CHUNK)
        above, before, ties_before = _count_at_cut(inputs, cut, own, N, CHUNK)
        tie = (key == cut).to(tl.int32)
        # Of equal ones the earlier.
        fits = ties_before + tl.cumsum(tie, 0) <= capacity - above
        kept = (key > cut).to(tl.int32) + tl.where(fits, tie, 0)
        before += tl.minimum(ties_before, capacity - above)
    else:
        kept = (key > LOWEST).to(tl.int32)
    slot = before + tl.cumsum(kept, 0) - 1
    tl.store(kept_ptr + place, kept.to(tl.int8), mask=place < N)
    tl.store(slot_ptr + place, tl.where(kept > 0, slot, 0).to(tl.int64), mask=place < N)
    tl.store(index_ptr + slot, place.to(tl.int64), mask=kept > 0)
    # Of the tokens up to this one slot + 1 are kept.
    tl.store(rest_ptr + place - slot - 1, place, mask=(place < N) & (kept == 0))
    rows = tl.minimum(total, capacity)
    tl.store(index_ptr + place, tl.zeros([BLOCK], tl.int64), mask=(place >= rows) & (place < capacity))
    if own == 0:
        tl.store(counts_ptr, rows)
        tl.store(counts_ptr + 1, N - rows)
        tl.store(tally_ptr, total.to(tl.float64))
        tl.store(tally_ptr + 1, (total - rows).to(tl.float64))


@triton.jit
def _sum_scores(score_ptr, tally_ptr, N, BLOCK: tl.constexpr):
    """Of all tokens: the sum of scores, and that of their squares."""
    total, square = tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float64)
    for start in range(0, N, 8 * BLOCK):
        for part in tl.static_range(8):  # on their way together
            place = start + part * BLOCK + tl.arange(0, BLOCK)
            score = tl.load(score_ptr + place, mask=place < N, other=0.0).to(tl.float64)
            total += score
            square += score * score
    tl.store(tally_ptr + 2, tl.sum(total, 0))
    tl.store(tally_ptr + 3, tl.sum(square, 0))


@triton.jit
def _select_kernel(inputs, outputs, sizes, BLOCK: tl.constexpr, CHUNK: tl.constexpr):
    """The last program adds up scores, the others number tokens."""
    if tl.program_id(0) == tl.num_programs(0) - 1:
        _sum_scores(inputs[1], outputs[5], sizes[0], BLOCK)
    else:
        _number(inputs, outputs, sizes, BLOCK, CHUNK)


@torch.library.custom_op("chiar_megatron::select_rows", mutates_args=())
def _select_op(
    light: Tensor, score: Tensor, capacity: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    assert len(light) < 2**FIELD.value, "counts would overflow their fields"
    light, score = light.contiguous(), score.contiguous()
    outputs = _empty(light, capacity)
    kept, *others = outputs
    programs = triton.cdiv(max(len(light), capacity), BLOCK) + 1
    _select_kernel[(programs,)](
        (light.view(torch.int8), score),
        (kept.view(torch.int8), *others),
        (len(light), capacity),
        BLOCK,
        CHUNK,
        num_warps=WARPS,
    )
    return outputs


@_select_op.register_fake
def _(light: Tensor, score: Tensor, capacity: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _empty(light, capacity)


def _empty(light: Tensor, capacity: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    n, device = light.shape[0], light.device
    return (
        torch.empty(n, dtype=torch.bool, device=device),
        torch.empty(n, dtype=torch.int64, device=device),
        torch.empty(capacity, dtype=torch.int64, device=device),
        torch.empty(n, dtype=torch.int32, device=device),
        torch.empty(2, dtype=torch.int32, device=device),
        torch.empty(4, dtype=torch.float64, device=device),
    )
