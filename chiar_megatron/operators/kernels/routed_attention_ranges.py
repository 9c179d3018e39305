"""Which query rows a block of keys concerns, for the gradients of `routed_attention`, in one launch."""

# Kernels are Triton's language, not typed Python.
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,misc"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

RANGES = 32  # blocks of keys that one program looks up


def row_ranges(first: Tensor, last: Tensor, K: int, block_k: int) -> Tensor:
    """Query rows of each block of keys, int32 [5, blocks]: low, mid, mid_stop, stop, valid.

    Some key of the block is seen by the rows [low, stop), all are by [mid, mid_stop); padding begins at row
    `valid`, the same for every block. Stays on the device.
    """
    blocks, R = triton.cdiv(K, block_k), len(first)
    ranges = torch.empty(5, blocks, dtype=torch.int32, device=first.device)
    _row_ranges_kernel[(triton.cdiv(blocks, RANGES),)](
        (first, last, ranges), (R, R.bit_length(), blocks), block_k, RANGES
    )
    return ranges


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
def _row_ranges_kernel(tensors, sizes, BLOCK_K: tl.constexpr, RANGES: tl.constexpr):
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
