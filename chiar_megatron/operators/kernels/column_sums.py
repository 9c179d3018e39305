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
    write_column_sums((partial, sums.view(1, -1)))
    return sums


def write_column_sums(*pairs: tuple[Tensor, Tensor]) -> None:
    """The same of each pair's first into its second `[x, y]`, whose rows may lie apart; x·y as many as there
    are columns."""
    tasks = [
        (partial, sums, len(partial), sums.numel(), sums.shape[1], sums.stride(0))
        for partial, sums in pairs
        if sums.numel()
    ]
    programs = sum(triton.cdiv(task[3], COLS) for task in tasks)
    if programs:
        _column_sums_kernel[(programs,)](tuple(tasks), len(tasks), ROWS, COLS, num_warps=WARPS)


@triton.jit
def add_pairs(a, b, c, d):
    """To reduce two tensors at once: threads then wait for each other once."""
    return a + c, b + d


@triton.jit
def _column_sums_kernel(tasks, TASKS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    program = tl.program_id(0)  # among those of one task
    for task in tl.static_range(TASKS):
        partial_ptr, sums_ptr, P, W, run, stride = tasks[task]
        if (program >= 0) & (program < tl.cdiv(W, COLS)):
            col = program * COLS + tl.arange(0, COLS)[None, :]
            sums = tl.zeros([ROWS, COLS], tl.float32)
            for start in range(0, P, ROWS):
                row = start + tl.arange(0, ROWS)[:, None]
                place = partial_ptr + row.to(tl.int64) * W + col
                sums += tl.load(place, mask=(row < P) & (col < W), other=0.0)
            total = tl.sum(sums, 0)[None, :].to(sums_ptr.dtype.element_ty)
            tl.store(sums_ptr + col // run * stride + col % run, total, mask=col < W)
        program -= tl.cdiv(W, COLS)
