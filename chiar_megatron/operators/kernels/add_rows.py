"""Rows added to the tokens that they belong to, which are read and written where there is a row only."""

# Kernels are Triton's language, not typed Python.
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,misc"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, COLS = 4, 1024  # of a tile


@triton.jit
def _add_rows_kernel(tensors, R, H, ROWS: tl.constexpr, COLS: tl.constexpr):
    total_ptr, rows_ptr, index_ptr, valid_ptr = tensors
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    col = tl.program_id(1) * COLS + tl.arange(0, COLS)[None, :]
    used = tl.load(valid_ptr + row, mask=row < R, other=0) != 0
    token = tl.load(index_ptr + row, mask=used, other=0)[:, None]
    mask = used[:, None] & (col < H)
    added = tl.load(rows_ptr + row.to(tl.int64)[:, None] * H + col, mask=mask, other=0.0).to(tl.float32)
    place = total_ptr + token * H + col
    total = tl.load(place, mask=mask, other=0.0).to(tl.float32) + added
    tl.store(place, total.to(total_ptr.dtype.element_ty), mask=mask)


@torch.library.custom_op("chiar_megatron::add_rows", mutates_args=("total",))
def add_rows(total: Tensor, rows: Tensor, index: Tensor, valid: Tensor) -> None:
    """`total[index] += rows` [N, H] and [R, H], in place, of the rows that are valid (bool [R]); index int64
    [R], of those distinct."""
    assert total.is_contiguous()
    (R, H), rows = rows.shape, rows.contiguous()
    if rows.numel():
        _add_rows_kernel[triton.cdiv(R, ROWS), triton.cdiv(H, COLS)](
            (total, rows, index, valid.view(torch.int8)), R, H, ROWS, COLS, num_warps=4
        )
