"""What the gradients of `routed_attention` need first, in one launch: which query rows a block of keys
concerns, and what the softmax's gradient subtracts."""

# Kernels are Triton's language, not typed Python.
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,misc"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from chiar_megatron.operators.kernels.routed_attention_tiles import line, load_tile, per_row

RANGES = tl.constexpr(32)  # blocks of keys that one program looks up
DELTA_ROWS = 64


def prepare(
    grad: Tensor, out: Tensor, ranges: tuple[Tensor, Tensor], keys: int, block_k: int
) -> tuple[Tensor, Tensor]:
    """delta, the sum of grad · out [R, n, d] over the head, [n, R] by `per_row`; and the query rows of each
    block of keys, int32 [5, blocks]: low, mid, mid_stop, stop, valid.

    Some key of the block is seen by the rows [low, stop), all are by [mid, mid_stop); padding begins at row
    `valid`, the same for every block. ranges: first and last key of each row. Stays on the device.
    """
    (R, n, d), blocks = out.shape, triton.cdiv(keys, block_k)
    delta = per_row(out)
    bounds = torch.empty(5, blocks, dtype=torch.int32, device=out.device)
    programs = triton.cdiv(blocks, RANGES.value)
    _prepare_kernel[(programs + triton.cdiv(R, DELTA_ROWS) * n,)](
        (grad, out, delta, *ranges, bounds),
        grad.stride()[:2],
        (R, n, programs, blocks, R.bit_length()),
        d,
        DELTA_ROWS,
        block_k,
    )
    return delta, bounds


@triton.jit
def _count(first_ptr, last_ptr, edge, sizes, WHICH: tl.constexpr):
    """How many rows end before each edge (WHICH 0), begin up to it (1), or are no padding (2)."""
    R, steps, _ = sizes
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
def _write_ranges(tensors, sizes, BLOCK_K: tl.constexpr):
    """Bounds of this program's blocks; sizes: R, R.bit_length(), blocks."""
    first_ptr, last_ptr, out_ptr = tensors
    blocks = sizes[2]
    block = tl.program_id(0) * RANGES + tl.arange(0, RANGES)
    mask = block < blocks
    start = block * BLOCK_K
    # Not cut to the number of keys: a short last block is nobody's in full, and so always masked.
    end = start + (BLOCK_K - 1)
    tl.store(out_ptr + block, _count(first_ptr, last_ptr, start, sizes, 0), mask=mask)
    tl.store(out_ptr + blocks + block, _count(first_ptr, last_ptr, end, sizes, 0), mask=mask)
    tl.store(out_ptr + 2 * blocks + block, _count(first_ptr, last_ptr, start, sizes, 1), mask=mask)
    tl.store(out_ptr + 3 * blocks + block, _count(first_ptr, last_ptr, end, sizes, 1), mask=mask)
    tl.store(out_ptr + 4 * blocks + block, _count(first_ptr, last_ptr, start, sizes, 2), mask=mask)


@triton.jit
def _prepare_kernel(
    tensors, grad_strides, sizes, HEAD: tl.constexpr, ROWS: tl.constexpr, BLOCK_K: tl.constexpr
):
    """The first programs write ranges, which waits for memory, the others delta."""
    grad_ptr, out_ptr, delta_ptr, first_ptr, last_ptr, bounds_ptr = tensors
    grad_row, grad_head = grad_strides
    R, heads, programs, blocks, steps = sizes
    if tl.program_id(0) < programs:
        _write_ranges((first_ptr, last_ptr, bounds_ptr), (R, steps, blocks), BLOCK_K)
    else:
        number = tl.program_id(0) - programs
        start = number // heads * ROWS
        head = tl.cast(number % heads, tl.int64)
        grad = load_tile(grad_ptr + head * grad_head, start, grad_row, R, ROWS, HEAD, True)
        out = load_tile(out_ptr + head * HEAD, start, heads * HEAD, R, ROWS, HEAD, True)
        row = start + tl.arange(0, ROWS)
        delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1)
        tl.store(delta_ptr + line(head, R) + row, delta, mask=row < R)
