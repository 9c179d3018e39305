"""Rotary positions for heads that lie apart in memory: what one pass over them costs, and no more.

A compiler's code for the backward pass, which has to lay three gradients side by side, took 0.44 ms on one
H100 for 32,768 tokens of 16 heads of 64 where its reads and writes take 0.13.
"""

# Kernels are Triton's language, not typed Python.
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,misc"

from __future__ import annotations

from typing import Any, Optional

import torch
import triton
import triton.language as tl
from torch import Tensor

from chiar_megatron.operators.kernels.column_sums import column_sums

BLOCK = 64  # tokens of one head at once
SHARE_BLOCK, TILES = 32, 8  # the same where a program goes through several, one after the other


def split_and_rotate(grouped: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotated queries `[b, s, g, r, d]` and keys `[b, s, g, d]` of `[b, s, g, r + 2, d]`.

    cos, sin: `[s, d/2]` float32. The values, last of each group, are the caller's to take as they lie.
    """
    query, key = _split_op(grouped, cos, sin)
    return query, key


def join_rotated_back(
    grads: tuple[Tensor, Tensor, Tensor], cos: Tensor, sin: Tensor, bias: Optional[Tensor]
) -> tuple[Tensor, Optional[Tensor]]:
    """The gradient `[b, s, g, r + 2, d]` from those of rotated queries, rotated keys and values; with a bias
    `[g·(r + 2)·d]`, added to all tokens before, also its own, in its dtype."""
    joined, sums = _join_op(*grads, cos, sin, bias)
    return joined, None if bias is None else sums


@triton.jit
def _angles(tables, token, col, mask, HALF: tl.constexpr):
    """cos and sin of some tokens, [ROWS, COLS] float32."""
    cos_ptr, sin_ptr = tables
    place = token[:, None] * HALF + col[None, :]
    return tl.load(cos_ptr + place, mask=mask, other=0.0), tl.load(sin_ptr + place, mask=mask, other=0.0)


@triton.jit
def _turned(source, mask, cos, sin, HALF: tl.constexpr):
    """Both halves of a head, float32, rotated."""
    first = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(source + HALF, mask=mask, other=0.0).to(tl.float32)
    return first * cos - second * sin, second * cos + first * sin


@triton.jit
def _store(target, first, second, mask, HALF: tl.constexpr):
    tl.store(target, first.to(target.dtype.element_ty), mask=mask)
    tl.store(target + HALF, second.to(target.dtype.element_ty), mask=mask)


@triton.jit
def _tile(s, heads, HALF: tl.constexpr, ROWS: tl.constexpr):
    """Of this program, one head of ROWS tokens of one sequence: sequence, head, tokens, columns, mask."""
    COLS: tl.constexpr = triton.next_power_of_2(HALF)
    token, col = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, COLS)
    mask = (token < s)[:, None] & (col < HALF)[None, :]
    batch, head = tl.cast(tl.program_id(1) // heads, tl.int64), tl.cast(tl.program_id(1) % heads, tl.int64)
    return batch, head, token, col, mask


@triton.jit
def _within(base, token, stride, col):
    return base + tl.cast(token, tl.int64)[:, None] * stride + col[None, :]


@triton.jit
def _turn_share(pointers, strides, tables, span, sign, turned, HALF: tl.constexpr, ROWS: tl.constexpr):
    """Rotate this program's share of the tokens of one head, from source to target, which may be the same;
    both halves' sums over them, [ROWS, COLS] float32 each.

    span: number of the share, of how many, tokens, tokens of a sequence, lines of tables. Angles are those
    of the token's place in its sequence, or of the key that last_ptr gives it. turned: how many columns are,
    HALF or 0.
    """
    source_ptr, target_ptr = pointers
    source_b, source_s, target_b, target_s = strides
    cos_ptr, sin_ptr, last_ptr = tables
    share, shares, tokens, s, lines = span
    COLS: tl.constexpr = triton.next_power_of_2(HALF)
    col = tl.arange(0, COLS)
    first_sums = tl.zeros([ROWS, COLS], tl.float32)
    second_sums = tl.zeros([ROWS, COLS], tl.float32)
    for tile in range(share, tl.cdiv(tokens, ROWS), shares):
        token = tile * ROWS + tl.arange(0, ROWS)
        inside = token < tokens
        mask = inside[:, None] & (col < HALF)[None, :]
        batch, place = tl.cast(token // s, tl.int64), tl.cast(token % s, tl.int64)
        turn = place
        if last_ptr is not None:
            turn = tl.cast(tl.maximum(tl.load(last_ptr + token, mask=inside, other=0), 0) % lines, tl.int64)
        angle = turn[:, None] * HALF + col[None, :]
        turning = inside[:, None] & (col < turned)[None, :]
        cos = tl.load(cos_ptr + angle, mask=turning, other=1.0)
        sin = tl.load(sin_ptr + angle, mask=turning, other=0.0) * sign
        source = source_ptr + (batch * source_b + place * source_s)[:, None] + col[None, :]
        target = target_ptr + (batch * target_b + place * target_s)[:, None] + col[None, :]
        first, second = _turned(source, mask, cos, sin, HALF)
        _store(target, first, second, mask, HALF)
        first_sums += first
        second_sums += second
    return first_sums, second_sums


@triton.jit
def _turn_kernel(rows, keys, tables, strides, sizes, sign, HALF: tl.constexpr, ROWS: tl.constexpr):
    """The first programs turn rows, the others keys."""
    row_ptr, row_target, last_ptr = rows
    cos_ptr, sin_ptr = tables
    key_ptr, key_target = keys
    row_source_s, row_source_n, row_target_s, row_target_n = strides[:4]
    key_source_s, key_source_g, key_target_s, key_target_g = strides[4:]
    R, heads, K, groups, lines, row_shares, key_shares = sizes
    of_rows = row_shares * heads
    if tl.program_id(0) < of_rows:
        share, head = tl.program_id(0) // heads, tl.cast(tl.program_id(0) % heads, tl.int64)
        pointers = (row_ptr + head * row_source_n, row_target + head * row_target_n)
        by_row = (0, row_source_s, 0, row_target_s)
        span = (share, row_shares, R, R, lines)
        _turn_share(pointers, by_row, (cos_ptr, sin_ptr, last_ptr), span, sign, HALF, HALF, ROWS)
    else:
        number = tl.program_id(0) - of_rows
        share, group = number // groups, tl.cast(number % groups, tl.int64)
        pointers = (key_ptr + group * key_source_g, key_target + group * key_target_g)
        sequence = tl.cast(lines, tl.int64)
        by_key = (sequence * key_source_s, key_source_s, sequence * key_target_s, key_target_s)
        span = (share, key_shares, K, lines, lines)
        _turn_share(pointers, by_key, (cos_ptr, sin_ptr, None), span, sign, HALF, HALF, ROWS)


@triton.jit
def _store_sums(target, sums, HALF: tl.constexpr):
    """Both halves' sums of a share, in a row."""
    col = tl.arange(0, sums[0].shape[1])
    _store(target + col, tl.sum(sums[0], 0), tl.sum(sums[1], 0), col < HALF, HALF)


@triton.jit
def _split_kernel(pointers, tables, strides, sizes, HALF: tl.constexpr, ROWS: tl.constexpr):
    """Queries and the key of each group to where they go, both contiguous."""
    grouped_ptr, query_ptr, key_ptr = pointers
    grouped_b, grouped_s, grouped_g, grouped_r = strides
    s, groups, queries = sizes
    batch, head, token, col, mask = _tile(s, groups * (queries + 1), HALF, ROWS)
    group, member = head // (queries + 1), head % (queries + 1)
    source = grouped_ptr + batch * grouped_b + group * grouped_g + member * grouped_r
    cos, sin = _angles(tables, token, col, mask, HALF)
    first, second = _turned(_within(source, token, grouped_s, col), mask, cos, sin, HALF)
    if member < queries:
        target = query_ptr + (batch * s * groups * queries + group * queries + member) * (2 * HALF)
        stride = groups * queries * (2 * HALF)
    else:
        target = key_ptr + (batch * s * groups + group) * (2 * HALF)
        stride = groups * (2 * HALF)
    _store(_within(target, token, stride, col), first, second, mask, HALF)


@triton.jit
def _join_kernel(pointers, tables, strides, sizes, HALF: tl.constexpr, ROWS: tl.constexpr):
    """Gradients of queries and keys rotated back, of values as they are, side by side; and sums of each
    share's tokens where they are asked for."""
    query_ptr, key_ptr, value_ptr, joined_ptr, sums_ptr = pointers
    cos_ptr, sin_ptr = tables
    query_b, query_s, query_g, query_r, key_b, key_s, key_g, value_b, value_s, value_g = strides
    tokens, s, groups, queries, shares = sizes
    slots = queries + 2
    heads = groups * slots
    share, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    group, member = tl.cast(head // slots, tl.int64), head % slots
    if member < queries:
        source = query_ptr + group * query_g + member * query_r
        by_batch, by_token = tl.cast(query_b, tl.int64), tl.cast(query_s, tl.int64)
    elif member == queries:
        source = key_ptr + group * key_g
        by_batch, by_token = tl.cast(key_b, tl.int64), tl.cast(key_s, tl.int64)
    else:
        source = value_ptr + group * value_g
        by_batch, by_token = tl.cast(value_b, tl.int64), tl.cast(value_s, tl.int64)
    width = tl.cast(heads, tl.int64) * (2 * HALF)
    span, turned = (share, shares, tokens, s, s), (HALF if member <= queries else 0)
    ways = (by_batch, by_token, s * width, width)
    there = (source, joined_ptr + head * (2 * HALF))
    sums = _turn_share(there, ways, (cos_ptr, sin_ptr, None), span, -1.0, turned, HALF, ROWS)
    if sums_ptr is not None:
        _store_sums(sums_ptr + share * width + head * (2 * HALF), sums, HALF)


def _shares(tokens: int) -> int:
    return triton.cdiv(triton.cdiv(tokens, SHARE_BLOCK), TILES)  # type: ignore[no-any-return]


def turn(
    rows: tuple[Tensor, Tensor],
    keys: tuple[Tensor, Tensor],
    last: Tensor,
    tables: tuple[Tensor, Tensor],
    sign: float,
) -> None:
    """Rotate rows `[R, n, d]`, each as its last key, and keys `[K, g, d]`, in one launch; sign -1: back.

    rows, keys: source and target, which may be the same, with a contiguous last dimension. last: `[R]`, where
    below 0 the row means nothing. tables: cos and sin of the keys, or of one sequence of them, contiguous
    float32 `[*, d/2]`.
    """
    (R, n, d), (K, g, _) = rows[0].shape, keys[0].shape
    shares = _shares(R), _shares(K)
    programs = shares[0] * n + shares[1] * g
    if programs:
        _turn_kernel[(programs,)](
            (*rows, last),
            keys,
            tables,
            tuple(stride for x in (*rows, *keys) for stride in x.stride()[:2]),
            (R, n, K, g, max(1, len(tables[0])), *shares),
            sign,
            d // 2,
            SHARE_BLOCK,
            num_warps=4,
        )


@torch.library.custom_op("chiar_megatron::split_and_rotate", mutates_args=())
def _split_op(grouped: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    query, key = _empty_parts(grouped)
    grouped = grouped if grouped.stride(-1) == 1 else grouped.contiguous()
    b, s, g, r, d = query.shape
    if key.numel():
        _split_kernel[triton.cdiv(s, BLOCK), b * g * (r + 1)](
            (grouped, query, key),
            (cos.contiguous(), sin.contiguous()),
            grouped.stride()[:4],
            (s, g, r),
            d // 2,
            BLOCK,
            num_warps=4,
        )
    return query, key


@_split_op.register_fake
def _(grouped: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return _empty_parts(grouped)


def _empty_parts(grouped: Tensor) -> tuple[Tensor, Tensor]:
    b, s, g, slots, d = grouped.shape
    options: dict[str, Any] = {"dtype": grouped.dtype, "device": grouped.device}
    return torch.empty(b, s, g, slots - 2, d, **options), torch.empty(b, s, g, d, **options)


@torch.library.custom_op("chiar_megatron::join_rotated_back", mutates_args=())
def _join_op(
    grad_query: Tensor,
    grad_key: Tensor,
    grad_value: Tensor,
    cos: Tensor,
    sin: Tensor,
    bias: Optional[Tensor],
) -> tuple[Tensor, Tensor]:
    """The joined gradient, and that of the bias (without one: empty)."""
    joined, sums = _empty_join(grad_query, grad_key, bias)
    grads = [x if x.stride(-1) == 1 else x.contiguous() for x in (grad_query, grad_key, grad_value)]
    b, s, g, r, d = grad_query.shape
    shares, partial = _shares(b * s), None
    if bias is not None:
        partial = torch.empty(shares, len(bias), dtype=torch.float32, device=joined.device)
    if joined.numel():
        _join_kernel[(shares * g * (r + 2),)](
            (*grads, joined, partial),
            (cos.contiguous(), sin.contiguous()),
            (*grads[0].stride()[:4], *grads[1].stride()[:3], *grads[2].stride()[:3]),
            (b * s, s, g, r, shares),
            d // 2,
            SHARE_BLOCK,
            num_warps=4,
        )
    return joined, sums if partial is None else column_sums(partial, sums.dtype)


@_join_op.register_fake
def _(
    grad_query: Tensor, grad_key: Tensor, grad_value: Tensor, cos: Tensor, sin: Tensor, bias: Optional[Tensor]
) -> tuple[Tensor, Tensor]:
    return _empty_join(grad_query, grad_key, bias)


def _empty_join(grad_query: Tensor, grad_key: Tensor, bias: Optional[Tensor]) -> tuple[Tensor, Tensor]:
    b, s, g, r, d = grad_query.shape
    joined = torch.empty(b, s, g, r + 2, d, dtype=grad_key.dtype, device=grad_key.device)
    return joined, joined.new_empty(0) if bias is None else bias.new_empty(bias.shape)
