"""The end of every sum over tokens: partial sums of a kernel's programs, added up and rounded in one launch.

torch's own sum of so few rows fills a buffer first, and its rounding is a launch more for each parameter.
"""

# Kernels are Triton's language, not typed Python.
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,misc"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, COLS, WARPS = 256, 16, 8  # of a tile; few columns, so that many programs share the work


def column_sums(partial: Tensor, dtype: torch.dtype) -> Tensor:
    """Sums over the first dimension of `[P, ...]` float32, contiguous, in `dtype`; the same in every run."""
    sums = torch.empty(partial.shape[1:], dtype=dtype, device=partial.device)
    write_column_sums(partial, sums.view(1, -1))
    return sums


def write_column_sums(partial: Tensor, sums: Tensor) -> None:
    """The same into `sums` [x, y], whose rows may lie apart; x·y as many as there are columns."""
    width = sums.numel()
    if width:
        _column_sums_kernel[(triton.cdiv(width, COLS),)](
            (partial, sums),
            (len(partial), width, sums.shape[1], sums.stride(0)),
            ROWS,
            COLS,
            num_warps=WARPS,
        )


@triton.jit
def add_pairs(a, b, c, d):
    """To reduce two tensors at once: threads then wait for each other once."""
    return a + c, b + d


@triton.jit
def _column_sums_kernel(tensors, sizes, ROWS: tl.constexpr, COLS: tl.constexpr):
    partial_ptr, sums_ptr = tensors
    P, W, run, stride = sizes
    col = tl.program_id(0) * COLS + tl.arange(0, COLS)[None, :]
    sums = tl.zeros([ROWS, COLS], tl.float32)
    for start in range(0, P, ROWS):
        row = start + tl.arange(0, ROWS)[:, None]
        sums += tl.load(partial_ptr + row.to(tl.int64) * W + col, mask=(row < P) & (col < W), other=0.0)
    total = tl.sum(sums, 0)[None, :]
    place = col // run * stride + col % run
    tl.store(sums_ptr + place, total.to(sums_ptr.dtype.element_ty), mask=col < W)
