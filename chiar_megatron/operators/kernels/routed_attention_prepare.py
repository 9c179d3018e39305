"""What the gradients of `routed_attention` need first, in one launch: which query rows see each key, and what
the softmax's gradient subtracts, and the sum of the gradient of values."""

# Kernels are Triton's language, not typed Python.
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,misc"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from chiar_megatron.operators.kernels.routed_attention_tiles import line, load_tile, per_row

KEYS = tl.constexpr(128)  # that one program looks up
DELTA_ROWS = 64


def prepare(
    grad: Tensor, out: Tensor, ranges: tuple[Tensor, Tensor], keys: int, value_sums: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """delta, the sum of grad · out [R, n, d] over the head, [n, R] by `per_row`; and the rows that see each
    of K keys, int32 [2K + 1]: every key's first, every key's one behind the last, and where padding begins.
    ranges: first and last key of each row. Stays on the device.

    value_sums: where to add up the gradients of values, `[*, g, d]` by `space_for_value_sums`. As a row's
    probabilities add up to 1 without dropout, they are the sum of grad over all rows.
    """
    R, n, d = out.shape
    delta = per_row(out)
    bounds = torch.empty(2 * keys + 1, dtype=torch.int32, device=out.device)
    programs = triton.cdiv(keys, KEYS.value)
    group = 1 if value_sums is None else n // value_sums.shape[1]
    _prepare_kernel[(programs + triton.cdiv(R, DELTA_ROWS) * n,)](
        (grad, out, delta, *ranges, bounds, value_sums),
        grad.stride()[:2],
        (R, n, group, programs, keys, R.bit_length()),
        d,
        DELTA_ROWS,
    )
    return delta, bounds


def space_for_value_sums(q: Tensor, k: Tensor) -> Tensor:
    """For the sums of `prepare`, of q [R, n, d] and k [K, g, d]."""
    (R, n, d), g = q.shape, k.shape[1]
    shape = (triton.cdiv(R, DELTA_ROWS) * (n // g), g, d)
    return torch.empty(shape, dtype=torch.float32, device=q.device)


@triton.jit
def _count(first_ptr, last_ptr, edge, sizes, WHICH: tl.constexpr):
    """How many rows end before each edge (WHICH 0), begin up to it (1), or are no padding (2)."""
    R, steps = sizes
    low = edge * 0
    high = low + R
    for _ in range(steps):
        middle = (low + high) >> 1
        open_ = low < high
        first = tl.load(first_ptr + middle, mask=open_, other=0)
        last = tl.load(last_ptr + middle, mask=open_, other=-1)
        # Padding rows stand at the end: beyond every key, all three stay sorted.
        if WHICH == 0:
            counts = (last < edge) & (first <= last)
        elif WHICH == 1:
            counts = (first <= edge) & (first <= last)
        else:
            counts = first <= last
        low = tl.where(open_ & counts, middle + 1, low)
        high = tl.where(open_ & (counts == 0), middle, high)
    return low


@triton.jit
def _prepare_kernel(tensors, grad_strides, sizes, HEAD: tl.constexpr, ROWS: tl.constexpr):
    """The first programs look up rows, which waits for memory, the others write delta."""
    grad_ptr, out_ptr, delta_ptr, first_ptr, last_ptr, bounds_ptr, sums_ptr = tensors
    grad_row, grad_head = grad_strides
    R, heads, group, programs, K, steps = sizes
    if tl.program_id(0) < programs:
        key = tl.program_id(0) * KEYS + tl.arange(0, KEYS)
        search = (R, steps)
        tl.store(bounds_ptr + key, _count(first_ptr, last_ptr, key, search, 0), mask=key < K)
        tl.store(bounds_ptr + K + key, _count(first_ptr, last_ptr, key, search, 1), mask=key < K)
        if tl.program_id(0) == 0:
            tl.store(bounds_ptr + 2 * K, _count(first_ptr, last_ptr, 0, search, 2))
    else:
        number = tl.program_id(0) - programs
        start = number // heads * ROWS
        head = tl.cast(number % heads, tl.int64)
        grad = load_tile(grad_ptr + head * grad_head, start, grad_row, R, ROWS, HEAD, True)
        out = load_tile(out_ptr + head * HEAD, start, heads * HEAD, R, ROWS, HEAD, True)
        row = start + tl.arange(0, ROWS)
        delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1)
        tl.store(delta_ptr + line(head, R) + row, delta, mask=row < R)
        if sums_ptr is not None:
            first = tl.load(first_ptr + row, mask=row < R, other=0)
            last = tl.load(last_ptr + row, mask=row < R, other=-1)
            seen = tl.where((first <= last)[:, None], grad.to(tl.float32), 0.0)  # padding may hold anything
            col = tl.arange(0, grad.shape[1])
            # [blocks, group, g, d]: the heads of a group are added up later, like blocks.
            place = (number // heads * group + head % group) * (heads // group) + head // group
            tl.store(sums_ptr + place * HEAD + col, tl.sum(seen, 0), mask=col < HEAD)
