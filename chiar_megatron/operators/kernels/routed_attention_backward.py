"""Gradients of `routed_attention`: a kernel per block of query rows for dq, one per block of keys for dk, dv.

The kernel over keys holds scores transposed, [keys, rows]: both of its sums then take the probabilities
as their left operand, straight from registers. To let it add its share of dq by atomic adds as well saves
two matrix products of seven, but was slower, measured on one H100 (16 heads of 64, 2048 tokens, half of
them rows): forward and backward 1.246 ms against 1.108 ms, and its order of summation is not fixed.
"""

# Kernels are Triton's language, not typed Python.
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,misc"

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from chiar_megatron.operators.kernels.routed_attention_prepare import prepare, space_for_value_sums
from chiar_megatron.operators.kernels.routed_attention_tiles import (
    inner_range,
    kept,
    key_range,
    line,
    line_descriptors,
    load_described,
    load_line,
    load_tile,
    padded_head,
    score_scale,
    store_tile,
    tuning_of,
    turned_back,
    within,
)

LN_2 = tl.constexpr(math.log(2))


class Saved(NamedTuple):
    """What the forward pass leaves: q, out [R, n, d]; k, v [K, g, d]; first, last [R]; lse [n, R]."""

    q: Tensor
    k: Tensor
    v: Tensor
    first: Tensor
    last: Tensor
    out: Tensor
    lse: Tensor


class After(NamedTuple):
    """What becomes of gradients before they are written; d by `turns_in_kernels`.

    angles: cos and sin of the keys, or of one sequence of them, contiguous float32 [*, d/2], by which the
    gradients of k, and of q as its last key, are rotated back. row_sums, key_sums, value_sums: None, or where
    to add up each block's gradients, [*, n, d] of queries, [*, g, d] of keys and values, by `space_for_sums`;
    those of values only without dropout.
    """

    angles: tuple[Tensor, Tensor]
    row_sums: Tensor | None
    key_sums: Tensor | None
    value_sums: Tensor | None


def space_for_sums(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Those of `After`."""
    (R, n, d), (K, g, _) = q.shape, k.shape
    rows = triton.cdiv(R, tuning_of("query_grad", q).block_q)
    keys = triton.cdiv(K, tuning_of("key_grad", q).block_k)
    options: dict[str, Any] = {"dtype": torch.float32, "device": q.device}
    of_rows, of_keys = torch.empty(rows, n, d, **options), torch.empty(keys, g, d, **options)
    return of_rows, of_keys, space_for_value_sums(q, k)


def gradients(
    grad: Tensor,
    saved: Saved,
    seed: Tensor | None,
    dropout: tuple[int, float],
    out: tuple[Tensor, ...],
    after: After | None = None,
) -> None:
    """Writes the gradients of q, k and v, for the gradient `grad` [R, n, d] of the output, into `out`: that
    of q contiguous, those of k and v with the same strides, the last of them 1.

    dropout: what `dropout_numbers` says of its probability; it counts where there is a seed.
    """
    q, k = saved.q, saved.k
    R, n, d = q.shape
    saved = saved._replace(first=saved.first.contiguous(), last=saved.last.contiguous())
    dq, dk, dv = out
    if q.numel() == 0 or k.numel() == 0:
        sums = () if after is None else after[1:]
        for empty in (*out, *sums):
            if empty is not None:
                empty.zero_()
        return
    value_sums = None if after is None else after.value_sums
    delta, bounds = prepare(grad, saved.out, (saved.first, saved.last), len(k), value_sums)
    shared = (grad, saved, delta, seed, (score_scale(d), *dropout))
    none = (None, None, None)
    _query_gradient(*shared, dq, none if after is None else (*after.angles, after.row_sums))
    _key_gradient(*shared, bounds, (dk, dv), none if after is None else (*after.angles, after.key_sums))


def _strides(grad: Tensor, saved: Saved) -> tuple[int, ...]:
    tensors = (saved.q, saved.k, saved.v, grad)
    return tuple(stride for x in tensors for stride in x.stride()[:2])


def _query_gradient(
    grad: Tensor,
    saved: Saved,
    delta: Tensor,
    seed: Tensor | None,
    numbers: tuple[Any, ...],
    dq: Tensor,
    after: tuple[Tensor | None, ...],
) -> None:
    (R, n, d), g = saved.q.shape, saved.k.shape[1]
    tuning = tuning_of("query_grad", saved.q)
    _query_gradient_kernel[(triton.cdiv(R, tuning.block_q) * n,)](
        (*saved[:5], grad, saved.lse, delta, seed, dq, *after),
        *tuning.descriptors(saved.k, saved.v, tuning.block_k),
        _strides(grad, saved),
        (R, n, n // g, len(saved.k) if after[0] is None else len(after[0])),
        numbers,
        **tuning.options(d),
    )


def _key_gradient(
    grad: Tensor,
    saved: Saved,
    delta: Tensor,
    seed: Tensor | None,
    numbers: tuple[Any, ...],
    bounds: Tensor,
    out: tuple[Tensor, Tensor],
    after: tuple[Tensor | None, ...],
) -> None:
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
        (*_strides(grad, saved), *out[0].stride()[:2]),
        (R, K, g, lines_of_angles, *numbers),
        **tuning.options(d, n // g),
    )


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

    kv and EDGE as in the forward pass's `_attend`.
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
def _query_gradient_kernel(
    tensors,
    k_tiles,
    v_tiles,
    strides,
    sizes,
    numbers,
    BLOCKS: tl.constexpr,
):
    HEAD: tl.constexpr = BLOCKS[0]
    BLOCK_Q: tl.constexpr = BLOCKS[1]
    BLOCK_K: tl.constexpr = BLOCKS[2]
    EDGE_STAGES: tl.constexpr = BLOCKS[3]
    BLOCK_D: tl.constexpr = padded_head(HEAD)
    q_ptr, k_ptr, v_ptr, first_ptr, last_ptr, grad_ptr, lse_ptr, delta_ptr, seed_ptr = tensors[:9]
    dq_ptr, cos_ptr, sin_ptr, sums_ptr = tensors[9:]
    q_row, q_head, k_row, k_head, v_row, v_head, grad_row, grad_head = strides
    R, heads, group, lines = sizes
    scale, threshold, keep_scale = numbers
    # In the forward pass's order: late rows first.
    block = tl.num_programs(0) // heads - 1 - tl.program_id(0) // heads
    head = tl.cast(tl.program_id(0) % heads, tl.int64)
    start = block * BLOCK_Q
    row = start + tl.arange(0, BLOCK_Q)
    q = load_tile(q_ptr + head * q_head, start, q_row, R, BLOCK_Q, HEAD, True)
    grad = load_tile(grad_ptr + head * grad_head, start, grad_row, R, BLOCK_Q, HEAD, True)
    lse = tl.load(lse_ptr + line(head, R) + row, mask=row < R, other=float("inf"))
    delta = tl.load(delta_ptr + line(head, R) + row, mask=row < R, other=0.0)
    # After what it does not wait for: it may branch.
    first, last, low, mid, mid_stop, stop = key_range(first_ptr, last_ptr, start, R, BLOCK_Q)
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
    if cos_ptr is None:
        dq *= scale * LN_2
    else:
        dq = turned_back(dq, (cos_ptr, sin_ptr), tl.maximum(last, 0) % lines, scale * LN_2, HEAD)
        if sums_ptr is not None:
            tl.store(sums_ptr + (block * heads + head) * HEAD + tl.arange(0, HEAD), tl.sum(dq, 0))
    store_tile(dq_ptr + head * HEAD, start, heads * HEAD, R, dq, HEAD)


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

    EDGE as in `_over_keys`, only with rows; if it is -1, start and BLOCK_Q are multiples of 4.
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
    if cos_ptr is None:
        dk *= scale * LN_2
    else:
        dk = turned_back(dk, (cos_ptr, sin_ptr), key % lines, scale * LN_2, HEAD)
        if sums_ptr is not None:
            tl.store(sums_ptr + (block * groups + kv_head) * HEAD + tl.arange(0, HEAD), tl.sum(dk, 0))
    store_tile(dk_ptr + kv_head * out_head, start, out_row, K, dk, HEAD)
    store_tile(dv_ptr + kv_head * out_head, start, out_row, K, dv, HEAD)
