"""Gradients of keys and values of `routed_attention`: one program per block of keys of a head.

Scores stand transposed, [keys, rows]: both of the sums then take the probabilities as their left operand,
straight from registers. To let a program add its share of the queries' gradient by atomic adds as well saves
two matrix products of seven, but was slower, measured on one H100 (16 heads of 64, 2048 tokens, half of
them rows): forward and backward 1.246 ms against 1.108 ms, and its order of summation is not fixed.
"""

# Kernels are Triton's language, not typed Python.
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,misc"

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from chiar_megatron.operators.kernels.routed_attention_tiles import (
    LN_2,
    Saved,
    finished,
    inner_range,
    kept,
    line,
    line_descriptors,
    load_described,
    load_line,
    load_tile,
    padded_head,
    store_tile,
    tuning_of,
    within,
)


def key_gradient(
    grad: Tensor,
    saved: Saved,
    found: tuple[Tensor, Tensor],
    seed: Tensor | None,
    numbers: tuple[Any, ...],
    out: tuple[Tensor, Tensor],
    after: tuple[Tensor | None, ...],
) -> None:
    """Writes them into `out`, both with the same strides. found: what `query_gradient` returned, which takes
    the same numbers; after: cos, sin and `key_sums` of `After`, or three times None."""
    delta, bounds = found
    (R, n, d), (K, g, _) = saved.q.shape, saved.k.shape
    tuning = tuning_of("key_grad", saved.q)
    tiles = tuning.descriptors(saved.q, grad, tuning.block_q)
    lines = (None, None) if tiles[0] is None else line_descriptors(saved.lse, delta, tuning.block_q)
    lines_of_angles = K if after[0] is None else len(after[0])
    _key_gradient_kernel[(triton.cdiv(K, tuning.block_k) * g,)](
        (*saved[:5], grad, saved.lse, delta, seed, bounds, *out, *after),
        # Triton 3.6 takes no descriptors within tuples.
        *tiles,
        *lines,
        (*saved.strides(grad), *out[0].stride()[:2]),
        (R, K, g, lines_of_angles, *numbers),
        **tuning.options(d, n // g),
    )


@triton.jit
def load_numbers(base, row, stop, other, MASKED: tl.constexpr):
    """One number for each of some rows; if MASKED, `other` for those from `stop` on."""
    if MASKED:
        numbers = tl.load(base + row, mask=row < stop, other=other)
    else:
        numbers = tl.load(base + row)
    return numbers


@triton.jit
def _over_rows(
    state,
    kv,
    inputs,
    span,
    numbers,
    HEAD: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    EDGE: tl.constexpr,
):
    """Add to dk (not yet scaled) and dv of one block of keys what the rows start..stop-1 of a head give.

    EDGE as in `_over_keys` of the queries' gradient, only with rows; if it is -1, start and BLOCK_Q are
    multiples of 4.
    """
    dk, dv = state
    k, v, begin, end, key = kv  # each key is seen by the rows [begin, end)
    q_base, q_step, grad_base, grad_step, lse_base, delta_base = inputs
    start, mid, mid_stop, stop = span
    scale, seed_ptr, head, threshold, keep_scale = numbers
    TMA: tl.constexpr = EDGE < 0
    STAGES: tl.constexpr = EDGE if EDGE > 0 else None
    for at in tl.range(start, stop, BLOCK_Q, num_stages=STAGES):
        row = at + tl.arange(0, BLOCK_Q)
        if TMA:
            q = load_described(q_base, q_step, at, BLOCK_Q, HEAD)
            grad = load_described(grad_base, grad_step, at, BLOCK_Q, HEAD)
            lse = load_line(lse_base, q_step, at, BLOCK_Q)
            delta = load_line(delta_base, q_step, at, BLOCK_Q)
        else:
            q = load_tile(q_base, at, q_step, stop, BLOCK_Q, HEAD, EDGE > 0)
            grad = load_tile(grad_base, at, grad_step, stop, BLOCK_Q, HEAD, EDGE > 0)
            lse = load_numbers(lse_base, row, stop, float("inf"), EDGE > 0)
            delta = load_numbers(delta_base, row, stop, 0.0, EDGE > 0)
        s = tl.dot(k, tl.trans(q), input_precision="ieee")
        dp = tl.dot(v, tl.trans(grad), input_precision="ieee")
        if EDGE != 0:
            if EDGE > 0 or at < mid or at + BLOCK_Q > mid_stop:
                s = tl.where(within(row[None, :], begin[:, None], end[:, None]), s, float("-inf"))
        p = tl.exp2(s * scale - lse[None, :])
        if seed_ptr is not None:
            keep = kept(seed_ptr, head, row[None, :], key[:, None], threshold)
            dropped = tl.where(keep, p * keep_scale, 0.0)
            dp = tl.where(keep, dp * keep_scale, 0.0)
        else:
            dropped = p
        dv = tl.dot(dropped.to(grad.dtype), grad, dv, input_precision="ieee")
        ds = (p * (dp - delta[None, :])).to(q.dtype)
        dk = tl.dot(ds, q, dk, input_precision="ieee")
    return dk, dv


@triton.jit
def _key_gradient_kernel(
    tensors,
    q_tiles,
    grad_tiles,
    lse_lines,
    delta_lines,
    strides,
    numbers,
    BLOCKS: tl.constexpr,
):
    HEAD: tl.constexpr = BLOCKS[0]
    BLOCK_Q: tl.constexpr = BLOCKS[1]
    BLOCK_K: tl.constexpr = BLOCKS[2]
    EDGE_STAGES: tl.constexpr = BLOCKS[3]
    BLOCK_D: tl.constexpr = padded_head(HEAD)
    q_ptr, k_ptr, v_ptr, first_ptr, last_ptr, grad_ptr, lse_ptr, delta_ptr, seed_ptr = tensors[:9]
    bounds_ptr, dk_ptr, dv_ptr, cos_ptr, sin_ptr, sums_ptr = tensors[9:]
    q_row, q_head, k_row, k_head, v_row, v_head, grad_row, grad_head, out_row, out_head = strides
    GROUP: tl.constexpr = BLOCKS[4]
    R, K, groups, lines, scale, threshold, keep_scale = numbers
    # Early keys are seen by most rows of their sequence: in their natural order the heavy blocks come first.
    block = tl.program_id(0) // groups
    kv_head = tl.cast(tl.program_id(0) % groups, tl.int64)
    start = block * BLOCK_K
    key = start + tl.arange(0, BLOCK_K)
    k = load_tile(k_ptr + kv_head * k_head, start, k_row, K, BLOCK_K, HEAD, True)
    v = load_tile(v_ptr + kv_head * v_head, start, v_row, K, BLOCK_K, HEAD, True)
    begin = tl.load(bounds_ptr + key, mask=key < K, other=R)
    end = tl.load(bounds_ptr + K + key, mask=key < K, other=R)
    # Both are sorted. Some key of the block is seen by the rows [low, stop), all are by [mid, mid_stop); keys
    # beyond the last are by none.
    low, mid_stop = tl.load(bounds_ptr + start), tl.load(bounds_ptr + K + start)
    mid = tl.load(bounds_ptr + start + BLOCK_K - 1, mask=start + BLOCK_K <= K, other=R)
    stop = tl.load(bounds_ptr + K + tl.minimum(start + BLOCK_K, K) - 1)
    if q_tiles is not None:
        low = low // 4 * 4  # so that the lines' pieces begin at multiples of 16 bytes
        full = low + tl.cdiv(stop - low, BLOCK_Q) * BLOCK_Q
        # Padding may hold anything: a tile that reaches into it comes by pointers, with masks.
        if full > tl.load(bounds_ptr + 2 * K):
            full = low + (stop - low) // BLOCK_Q * BLOCK_Q
    state = (tl.zeros([BLOCK_K, BLOCK_D], tl.float32), tl.zeros([BLOCK_K, BLOCK_D], tl.float32))
    kv = (k, v, begin, end, key)
    for member in tl.range(0, GROUP):
        head = kv_head * GROUP + member
        lse_base, delta_base = lse_ptr + line(head, R), delta_ptr + line(head, R)
        q_base, grad_base = q_ptr + head * q_head, grad_ptr + head * grad_head
        extra = (scale, seed_ptr, head.to(tl.int32), threshold, keep_scale)
        rows = (q_base, q_row, grad_base, grad_row, lse_base, delta_base)
        if q_tiles is not None:
            number = head.to(tl.int32)
            described = (q_tiles, number, grad_tiles, number, lse_lines, delta_lines)
            # The other way round, ptxas makes every matrix instruction wait for the one before.
            span = (full, full, stop, stop)
            state = _over_rows(state, kv, rows, span, extra, HEAD, BLOCK_Q, 1)
            span = (low, mid, mid_stop, full)
            state = _over_rows(state, kv, described, span, extra, HEAD, BLOCK_Q, -1)
        else:
            inner, outer = inner_range(low, mid, mid_stop, stop, BLOCK_Q)
            span = (low, low, inner, inner)
            state = _over_rows(state, kv, rows, span, extra, HEAD, BLOCK_Q, EDGE_STAGES)
            span = (inner, inner, outer, outer)
            state = _over_rows(state, kv, rows, span, extra, HEAD, BLOCK_Q, 0)
            span = (outer, outer, stop, stop)
            state = _over_rows(state, kv, rows, span, extra, HEAD, BLOCK_Q, EDGE_STAGES)
    dk, dv = state
    after = (cos_ptr, sin_ptr, sums_ptr)
    dk = finished(dk, after, key % lines, scale * LN_2, block * groups + kv_head, HEAD)
    store_tile(dk_ptr + kv_head * out_head, start, out_row, K, dk, HEAD)
    store_tile(dv_ptr + kv_head * out_head, start, out_row, K, dv, HEAD)
