"""Gradient of queries of `routed_attention`: one program per block of rows of a head.

The same launch finds what the gradients of keys and values then need: which rows see each key, what the
softmax's gradient subtracts, and the sum of the gradients of values.
"""

# Kernels are Triton's language, not typed Python.
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,misc"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from chiar_megatron.operators.kernels.routed_attention_tiles import (
    LN_2,
    Saved,
    finished,
    inner_range,
    kept,
    key_range,
    line,
    load_described,
    load_tile,
    padded_head,
    per_row,
    rows_before,
    store_tile,
    tuning_of,
    within,
)

BOUNDS = tl.constexpr(512)  # that one program looks up: it waits for memory, so few of them with much each


def query_gradient(
    grad: Tensor,
    saved: Saved,
    seed: Tensor | None,
    numbers: tuple[Any, ...],
    dq: Tensor,
    after: tuple[Tensor | None, ...],
) -> tuple[Tensor, Tensor]:
    """Writes it into dq [R, n, d], contiguous. numbers: factor of the scores, and `dropout_numbers`; after:
    cos, sin, `row_sums` and `value_sums` of `After`, or four times None. Stays on the device.

    Returns delta, the sum of grad · out [R, n, d] over the head, [n, R] by `per_row`; and the rows that see
    each of K keys, int32 [2K + 1]: every key's first, every key's one behind the last, and where padding
    begins.
    """
    (R, n, d), (K, g, _) = saved.q.shape, saved.k.shape
    tuning = tuning_of("query_grad", saved.q)
    delta = per_row(saved.q)
    bounds = torch.empty(2 * K + 1, dtype=torch.int32, device=grad.device)
    lookups = triton.cdiv(len(bounds), BOUNDS.value)
    lines = K if after[0] is None else len(after[0])
    _query_gradient_kernel[(lookups + saved.blocks.shape[1] * n,)](
        (*saved, grad, delta, bounds, seed, dq, *after),
        *tuning.descriptors(saved.k, saved.v, tuning.block_k),
        saved.strides(grad),
        (R, K, n, n // g, lines, lookups, R.bit_length()),
        numbers,
        **tuning.options(d),
    )
    return delta, bounds


def space_for_value_sums(q: Tensor, k: Tensor, blocks: Tensor) -> Tensor:
    """For those of `After`, of q [R, n, d] and k [K, g, d]: the heads of a group are added up like blocks."""
    (_, n, d), g = q.shape, k.shape[1]
    return torch.empty(blocks.shape[1] * (n // g), g, d, dtype=torch.float32, device=q.device)


@triton.jit
def _over_keys(
    dq,
    rows,
    kv,
    span,
    numbers,
    HEAD: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EDGE: tl.constexpr,
):
    """Add to dq of one block of rows, not yet scaled, what the keys start..stop-1 give.

    EDGE: 0 where every row of the block sees all of these keys, else the stages of a loop with masks. It is
    -1 for a loop with masks outside [mid, mid_stop) whose tiles come by descriptors: kv then has a descriptor
    and the head's number for each of k and v, instead of a pointer to the head and the stride of a row.
    """
    q, grad, lse, delta, row, first, last = rows
    k_base, k_step, v_base, v_step = kv
    start, mid, mid_stop, stop = span
    scale, seed_ptr, head, threshold, keep_scale = numbers
    TMA: tl.constexpr = EDGE < 0
    STAGES: tl.constexpr = EDGE if EDGE > 0 else None
    for at in tl.range(start, stop, BLOCK_K, num_stages=STAGES):
        if TMA:
            k = load_described(k_base, k_step, at, BLOCK_K, HEAD)
            v = load_described(v_base, v_step, at, BLOCK_K, HEAD)
        else:
            k = load_tile(k_base, at, k_step, stop, BLOCK_K, HEAD, EDGE > 0)
            v = load_tile(v_base, at, v_step, stop, BLOCK_K, HEAD, EDGE > 0)
        key = at + tl.arange(0, BLOCK_K)
        s = tl.dot(q, tl.trans(k), input_precision="ieee")
        dp = tl.dot(grad, tl.trans(v), input_precision="ieee")
        if EDGE != 0:
            if EDGE > 0 or at < mid or at + BLOCK_K > mid_stop:
                s = tl.where(within(key[None, :], first[:, None], last[:, None] + 1), s, float("-inf"))
        p = tl.exp2(s * scale - lse[:, None])
        if seed_ptr is not None:
            dp = tl.where(kept(seed_ptr, head, row[:, None], key[None, :], threshold), dp * keep_scale, 0.0)
        ds = p * (dp - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
    return dq


@triton.jit
def _look_up(first_ptr, last_ptr, bounds_ptr, at, sizes):
    """Write the bounds at `at`, all by one search: how many rows end before a key, how many begin up to it,
    and how many are no padding."""
    R, K, steps = sizes
    before = at < K
    edge = tl.where(before, at, tl.where(at < 2 * K, at - K, 2**31 - 1))
    found = rows_before(first_ptr, last_ptr, edge, before, (R, steps))
    tl.store(bounds_ptr + at, found, mask=at <= 2 * K)


@triton.jit
def _query_gradient_kernel(tensors, k_tiles, v_tiles, strides, sizes, numbers, BLOCKS: tl.constexpr):
    """The first programs look up rows, which waits for memory."""
    R, K, heads, group, lines, lookups, steps = sizes
    number = tl.program_id(0) - lookups
    if number < 0:
        at = tl.program_id(0) * BOUNDS + tl.arange(0, BOUNDS)
        _look_up(tensors[3], tensors[4], tensors[10], at, (R, K, steps))
    else:
        block = number // heads
        head = tl.cast(number % heads, tl.int64)
        blocks = (tl.num_programs(0) - lookups) // heads
        place = (block, blocks, head, R, heads, group, lines)
        _one_block(tensors, (k_tiles, v_tiles), strides, place, numbers, BLOCKS)


@triton.jit
def _one_block(tensors, tiles, strides, place, numbers, BLOCKS: tl.constexpr):
    """Gradient of one block of rows of a head, and what `query_gradient` leaves of these rows."""
    HEAD: tl.constexpr = BLOCKS[0]
    BLOCK_Q: tl.constexpr = BLOCKS[1]
    BLOCK_K: tl.constexpr = BLOCKS[2]
    EDGE_STAGES: tl.constexpr = BLOCKS[3]
    BLOCK_D: tl.constexpr = padded_head(HEAD)
    q_ptr, k_ptr, v_ptr, first_ptr, last_ptr, out_ptr, lse_ptr, blocks_ptr, grad_ptr = tensors[:9]
    delta_ptr, _, seed_ptr, dq_ptr, cos_ptr, sin_ptr, row_sums_ptr, value_sums_ptr = tensors[9:]
    k_tiles, v_tiles = tiles
    q_row, q_head, k_row, k_head, v_row, v_head, grad_row, grad_head = strides
    block, blocks, head, R, heads, group, lines = place
    scale, threshold, keep_scale = numbers
    start, row_stop = tl.load(blocks_ptr + block), tl.load(blocks_ptr + blocks + block)
    row = start + tl.arange(0, BLOCK_Q)
    q = load_tile(q_ptr + head * q_head, start, q_row, row_stop, BLOCK_Q, HEAD, True)
    grad = load_tile(grad_ptr + head * grad_head, start, grad_row, row_stop, BLOCK_Q, HEAD, True)
    out = load_tile(out_ptr + head * HEAD, start, heads * HEAD, row_stop, BLOCK_Q, HEAD, True)
    lse = tl.load(lse_ptr + line(head, R) + row, mask=row < row_stop, other=float("inf"))
    delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1)
    tl.store(delta_ptr + line(head, R) + row, delta, mask=row < row_stop)
    # After what it does not wait for: it may branch.
    first, last, low, mid, mid_stop, stop = key_range(first_ptr, last_ptr, start, row_stop, BLOCK_Q)
    if value_sums_ptr is not None:
        # A row's probabilities add up to 1 without dropout, so values get as much as rows. Padding may hold
        # anything.
        seen = tl.where((first <= last)[:, None], grad.to(tl.float32), 0.0)
        line_of_sums = (block * group + head % group) * (heads // group) + head // group
        col = tl.arange(0, BLOCK_D)
        tl.store(value_sums_ptr + line_of_sums * HEAD + col, tl.sum(seen, 0), mask=col < HEAD)
    rows = (q, grad, lse, delta, row, first, last)
    extra = (scale, seed_ptr, head.to(tl.int32), threshold, keep_scale)
    dq = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    if k_tiles is not None:
        kv_head = (head // group).to(tl.int32)
        kv = (k_tiles, kv_head, v_tiles, kv_head)
        dq = _over_keys(dq, rows, kv, (low, mid, mid_stop, stop), extra, HEAD, BLOCK_K, -1)
    else:
        kv = (k_ptr + head // group * k_head, k_row, v_ptr + head // group * v_head, v_row)
        inner, outer = inner_range(low, mid, mid_stop, stop, BLOCK_K)
        span = (low, low, inner, inner)
        dq = _over_keys(dq, rows, kv, span, extra, HEAD, BLOCK_K, EDGE_STAGES)
        span = (inner, inner, outer, outer)
        dq = _over_keys(dq, rows, kv, span, extra, HEAD, BLOCK_K, 0)
        span = (outer, outer, stop, stop)
        dq = _over_keys(dq, rows, kv, span, extra, HEAD, BLOCK_K, EDGE_STAGES)
    # Padding rows may have met gradients that are no numbers.
    dq = tl.where((first <= last)[:, None], dq, 0.0)
    after = (cos_ptr, sin_ptr, row_sums_ptr)
    dq = finished(dq, after, tl.maximum(last, 0) % lines, scale * LN_2, block * heads + head, HEAD)
    store_tile(dq_ptr + head * HEAD, start, heads * HEAD, row_stop, dq, HEAD)
