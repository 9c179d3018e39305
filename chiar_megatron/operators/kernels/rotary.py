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
def _rotary_kernel(
    pointers, tables, source_strides, target_strides, sizes, sign, HALF: tl.constexpr, ROWS: tl.constexpr
):
    """From source to target, which may be the same."""
    source_ptr, target_ptr = pointers
    source_b, source_s, source_g, source_r = source_strides
    target_b, target_s, target_g, target_r = target_strides
    s, groups, heads = sizes
    batch, head, token, col, mask = _tile(s, groups * heads, HALF, ROWS)
    group, member = head // heads, head % heads
    source = source_ptr + batch * source_b + group * source_g + member * source_r
    target = target_ptr + batch * target_b + group * target_g + member * target_r
    cos, sin = _angles(tables, token, col, mask, HALF)
    first, second = _turned(_within(source, token, source_s, col), mask, cos, sin * sign, HALF)
    _store(_within(target, token, target_s, col), first, second, mask, HALF)


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
    """Gradients of queries and keys rotated back, of values as they are, side by side; and sums of the
    tokens' where they are asked for."""
    query_ptr, key_ptr, value_ptr, joined_ptr, sums_ptr = pointers
    query_b, query_s, query_g, query_r, key_b, key_s, key_g, value_b, value_s, value_g = strides
    s, groups, queries = sizes
    heads = queries + 2
    batch, head, token, col, mask = _tile(s, groups * heads, HALF, ROWS)
    group, member = head // heads, head % heads
    cos, sin = _angles(tables, token, col, mask, HALF)
    if member < queries:
        source = query_ptr + batch * query_b + group * query_g + member * query_r
        stride = query_s
    elif member == queries:
        source = key_ptr + batch * key_b + group * key_g
        stride = key_s
    else:
        source = value_ptr + batch * value_b + group * value_g
        stride = value_s
        cos, sin = tl.full(cos.shape, 1.0, tl.float32), tl.zeros(sin.shape, tl.float32)
    first, second = _turned(_within(source, token, stride, col), mask, cos, -sin, HALF)
    width = groups * heads * (2 * HALF)
    target = joined_ptr + batch * s * width + head * (2 * HALF)
    _store(_within(target, token, width, col), first, second, mask, HALF)
    if sums_ptr is not None:
        row = batch * tl.num_programs(0) + tl.program_id(0)
        sums = sums_ptr + row * width + head * (2 * HALF) + col
        _store(sums, tl.sum(first, 0), tl.sum(second, 0), col < HALF, HALF)


def turn(source: Tensor, target: Tensor, cos: Tensor, sin: Tensor, sign: float) -> None:
    """Rotate source into target, which may be the same: `[b, s, g, r, d]`, any strides with a contiguous last
    dimension. cos, sin: `[s, d/2]` float32. sign -1: back."""
    if source.numel() == 0:
        return
    if source.stride(-1) != 1:
        source = source.contiguous()
    b, s, g, r, d = source.shape
    _rotary_kernel[triton.cdiv(s, BLOCK), b * g * r](
        (source, target),
        (cos, sin),
        source.stride()[:4],
        target.stride()[:4],
        (s, g, r),
        sign,
        d // 2,
        BLOCK,
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
    blocks, partial = triton.cdiv(s, BLOCK), None
    if bias is not None:
        partial = torch.empty(b * blocks, len(bias), dtype=torch.float32, device=joined.device)
    if joined.numel():
        _join_kernel[blocks, b * g * (r + 2)](
            (*grads, joined, partial),
            (cos.contiguous(), sin.contiguous()),
            (*grads[0].stride()[:4], *grads[1].stride()[:3], *grads[2].stride()[:3]),
            (s, g, r),
            d // 2,
            BLOCK,
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
