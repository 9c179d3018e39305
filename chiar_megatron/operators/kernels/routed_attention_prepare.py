"""What the gradients of `routed_attention` need first, in one launch: which query rows see each key, and what
the softmax's gradient subtracts."""

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


def prepare(grad: Tensor, out: Tensor, ranges: tuple[Tensor, Tensor], keys: int) -> tuple[Tensor, Tensor]:
    """delta, the sum of grad · out [R, n, d] over the head, [n, R] by `per_row`; and the rows that see each
    of K keys, int32 [2K + 1]: every key's first, every key's one behind the last, and where padding begins.
    ranges: first and last key of each row. Stays on the device.
    """
    R, n, d = out.shape
    delta = per_row(out)
    bounds = torch.empty(2 * keys + 1, dtype=torch.int32, device=out.device)
    programs = triton.cdiv(keys, KEYS.value)
    _prepare_kernel[(programs + triton.cdiv(R, DELTA_ROWS) * n,)](
        (grad, out, delta, *ranges, bounds),
        grad.stride()[:2],
        (R, n, programs, keys, R.bit_length()),
        d,
        DELTA_ROWS,
    )
    return delta, bounds


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
    grad_ptr, out_ptr, delta_ptr, first_ptr, last_ptr, bounds_ptr = tensors
    grad_row, grad_head = grad_strides
    R, heads, programs, K, steps = sizes
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
