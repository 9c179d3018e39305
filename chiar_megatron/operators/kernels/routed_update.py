"""What a post-norm routed layer makes of its tokens, once attention has its rows: `N_i(x + op_i(x))`.

Light tokens take their row of attention, the others are mixed here. Forward: mixing, then `residual_norm`.
Backward the other way round, the spectral path's gradient added in place to what the residual left.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor

from chiar_megatron.operators.kernels.residual_norm import (
    NormParameters,
    Source,
    contiguous_grads,
    for_users,
    like,
    norm_backward,
    norm_forward,
)
from chiar_megatron.operators.kernels.spectral import mix, mix_backward
from chiar_megatron.operators.rows import TokenRows


class UpdateParameters(NamedTuple):
    """filter of spectral mixing and bias of attention's output (or None), [H]; the norm of tokens without a
    row, then that of those with one."""

    filter: Tensor
    bias: Optional[Tensor]
    dark: NormParameters
    light: NormParameters


def routed_update(
    x_NH: Tensor, attended_RH: Tensor, rows: TokenRows, parameters: UpdateParameters, users: int = 1
) -> tuple[Tensor, ...]:
    """`N(x + attended + bias)` for tokens with a row, `N(x + spectral_mixing(x))` for the others, [N, H],
    once for each of 1 or 2 users, whose gradients are added on the way.

    rows must have listed the tokens without one. Gradients to x, attended and all parameters; those of
    unused rows are 0.
    """
    assert rows.rest_N is not None and rows.rest_count is not None
    places = Source(rows.slot_N, rows.has_row_N, rows.index_R, rows.valid_R, rows.rest_N, rows.rest_count)
    (filters, bias, dark, light) = parameters
    return _RoutedUpdate.apply(  # type: ignore[no-any-return,no-untyped-call]
        users, dark.eps, x_NH, attended_RH, *places, filters, bias, *dark[:2], *light[:2]
    )


def _norms(tensors: Sequence[Optional[Tensor]], eps: float) -> list[NormParameters]:
    """From weight and bias of both, in order."""
    pairs = zip(tensors[::2], tensors[1::2], strict=True)
    return [NormParameters(weight, bias, eps) for weight, bias in pairs if weight is not None]


@torch.library.custom_op("chiar_megatron::routed_update", mutates_args=())
def _forward_op(
    tensors: Sequence[Tensor],
    places: Sequence[Tensor],
    bias: Optional[Tensor],
    norms: Sequence[Optional[Tensor]],
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Output and the sum before the norms; tensors: x, attended, filter."""
    x, attended, filters = tensors
    x = x.contiguous()
    source = Source(*places)
    mixed = mix(x, filters, source.rest_N, source.rest_count)
    return norm_forward((x, mixed, bias), attended.contiguous(), source, _norms(norms, eps))


@torch.library.custom_op("chiar_megatron::routed_update_backward", mutates_args=())
def _backward_op(
    grads: Sequence[Tensor],
    tensors: Sequence[Tensor],
    places: Sequence[Tensor],
    norms: Sequence[Optional[Tensor]],
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients to x, attended and filter, and the sums of `norm_backward`; tensors: x, u, filter."""
    x, u, filters = tensors
    source = Source(*places)
    dx, rows, sums = norm_backward(contiguous_grads(grads), u, source, _norms(norms, eps))
    return dx, rows, mix_backward(dx, x, filters, (source.rest_N, source.rest_count), dx), sums


@_forward_op.register_fake
def _(tensors: Sequence[Tensor], *_: Any) -> tuple[Tensor, Tensor]:
    x = tensors[0]
    return x.new_empty(x.shape), x.new_empty(x.shape)


@_backward_op.register_fake
def _(
    grads: Sequence[Tensor],
    tensors: Sequence[Tensor],
    places: Sequence[Tensor],
    norms: Sequence[Optional[Tensor]],
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, _, filters = tensors
    width, weight = x.shape[1], norms[0]
    assert weight is not None
    sums = weight.new_empty(5, width)
    rows = x.new_empty(len(Source(*places).valid_R), width)
    return x.new_empty(x.shape), rows, filters.new_empty(width), sums


class _RoutedUpdate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, users: int, eps: float, x: Tensor, attended: Tensor, *rest: Any) -> Any:
        places, (filters, bias, *norms) = rest[:6], rest[6:]
        out, u = _forward_op([x, attended, filters], places, bias, norms, eps)
        ctx.save_for_backward(x, u, *rest)
        ctx.eps = eps
        return for_users(out, users)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Optional[Tensor], ...]:
        x, u, *rest = ctx.saved_tensors
        places, (filters, bias, *norms) = rest[:6], rest[6:]
        dx, rows, by_filter, sums = _backward_op(grads, [x, u, filters], places, norms, ctx.eps)
        by_norms = [like(line, parameter) for line, parameter in zip(sums, norms, strict=False)]
        return None, None, dx, rows, *[None] * 6, like(by_filter, filters), like(sums[4], bias), *by_norms
