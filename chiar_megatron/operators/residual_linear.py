"""Linear layers beside a residual, whose input's gradient is added where the residual's lies.

autograd writes each product of a gradient and a weight, then reads it and the residual's gradient to write
their sum: one more pass over all tokens a layer. The residual's gradient is overwritten instead; it must be
nobody else's by then, as that of a norm behind both branches is, whose other user has come before.
"""

from __future__ import annotations

from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from chiar_megatron.operators.rows import TokenRows, take_rows


def linear_and_input(x: Tensor, weight: Tensor, bias: Optional[Tensor]) -> tuple[Tensor, Tensor]:
    """`x Wᵀ + bias` for x [..., h], and x again, for the residual."""
    return _LinearAndInput.apply(x, weight, bias)  # type: ignore[no-any-return,no-untyped-call]


def rows_keys_and_input(
    x_NH: Tensor, rows: TokenRows, weight: Optional[Tensor], bias: Optional[Tensor]
) -> tuple[Tensor, Optional[Tensor], Tensor]:
    """`take_rows(x, rows)` [R, h]; `x Wᵀ + bias`, without a weight None; and x again; by kernels."""
    places = (rows.index_R, rows.valid_R, rows.slot_N, rows.has_row_N)
    return _RowsKeysAndInput.apply(x_NH, weight, bias, *places)  # type: ignore[no-any-return,no-untyped-call]


class _LinearAndInput(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Optional[Tensor]) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight, bias), x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor, grad_x: Tensor) -> tuple[Optional[Tensor], ...]:
        x, weight = ctx.saved_tensors
        grad_NF, total_NH = grad_y.flatten(0, -2), grad_x.flatten(0, -2).contiguous()
        add_product(total_NH, grad_NF, weight)
        grad_bias = grad_NF.sum(0) if ctx.needs_input_grad[2] else None
        return total_NH.view(x.shape), grad_NF.t() @ x.flatten(0, -2), grad_bias


class _RowsKeysAndInput(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Optional[Tensor], bias: Optional[Tensor], *places: Tensor
    ) -> tuple[Tensor, Optional[Tensor], Tensor]:
        ctx.save_for_backward(x, weight, *places[:2])
        keys = None if weight is None else F.linear(x, weight, bias)
        return take_rows(x, TokenRows(*places)), keys, x.view_as(x)

    @staticmethod
    def backward(
        ctx: Any, grad_rows: Tensor, grad_keys: Optional[Tensor], grad_x: Tensor
    ) -> tuple[Optional[Tensor], ...]:
        from chiar_megatron.operators.kernels.add_rows import add_rows

        x, weight, index, valid = ctx.saved_tensors
        total, grad_weight, grad_bias = grad_x.contiguous(), None, None
        if weight is not None and grad_keys is not None:
            add_product(total, grad_keys, weight)
            grad_weight = grad_keys.t() @ x
            grad_bias = grad_keys.sum(0) if ctx.needs_input_grad[2] else None
        add_rows(total, grad_rows, index, valid)
        return total, grad_weight, grad_bias, *[None] * 4


@torch.library.custom_op("chiar_megatron::add_product", mutates_args=("total",))
def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """`total += left @ right` of matrices, in place, where compiled code has torch's `addmm` copy first."""
    torch.addmm(total, left, right, out=total)
