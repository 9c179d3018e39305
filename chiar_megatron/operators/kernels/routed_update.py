"""What a post-norm routed layer makes of its tokens, once attention has its rows: `N_i(x + op_i(x))`.

Light tokens take their row of attention, the others are mixed here. Forward: mixing, then `residual_norm`.
Backward the other way round, the spectral path's gradient added in place to what the residual left.
"""

# Ops are registered by annotations that must not be strings in disguise.
# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

from typing import Any, Optional

import torch
from torch import Tensor

from chiar_megatron.operators.kernels.residual_norm import (
    NormParameters,
    Source,
    norm_backward,
    norm_forward,
    parameter_grads,
)
from chiar_megatron.operators.kernels.spectral import mix, mix_backward
from chiar_megatron.operators.rows import TokenRows


def routed_update(
    x_NH: Tensor, attended_RH: Tensor, filter_H: Tensor, rows: TokenRows, norms: list[NormParameters]
) -> Tensor:
    """`N(x + attended)` for tokens with a row, `N(x + spectral_mixing(x))` for the others, [N, H].

    norms: that of tokens without a row, then that of those with one. rows must have listed both.
    Gradients to x, attended, the filter and both norms; those of unused rows are 0.
    """
    assert rows.rest_N is not None and rows.rest_count is not None
    (dark, dark_bias, eps), (light, light_bias, _) = norms
    places = [rows.slot_N, rows.has_row_N, rows.valid_R, rows.rest_N, rows.rest_count]
    parameters = [filter_H, dark, light]
    out, _ = _update_op(x_NH, attended_RH, places, parameters, dark_bias, light_bias, eps)
    return out  # type: ignore[no-any-return]


def _norms(
    parameters: list[Tensor], dark_bias: Optional[Tensor], light_bias: Optional[Tensor], eps: float
) -> list[NormParameters]:
    return [NormParameters(parameters[1], dark_bias, eps), NormParameters(parameters[2], light_bias, eps)]


@torch.library.custom_op("chiar_megatron::routed_update", mutates_args=())
def _update_op(
    x: Tensor,
    attended: Tensor,
    places: list[Tensor],
    parameters: list[Tensor],
    dark_bias: Optional[Tensor],
    light_bias: Optional[Tensor],
    eps: float,
) -> tuple[Tensor, Tensor]:
    x = x.contiguous()
    mixed = mix(x, parameters[0], places[3], places[4])
    norms = _norms(parameters, dark_bias, light_bias, eps)
    return norm_forward(x, mixed, attended.contiguous(), Source(*places[:3]), norms)


@torch.library.custom_op("chiar_megatron::routed_update_backward", mutates_args=())
def _update_backward_op(
    grad: Tensor,
    saved: list[Tensor],
    places: list[Tensor],
    parameters: list[Tensor],
    dark_bias: Optional[Tensor],
    light_bias: Optional[Tensor],
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients to x, attended and filter, and the norms' `[4, H]`; saved: x and u."""
    norms = _norms(parameters, dark_bias, light_bias, eps)
    dx, rows, sums = norm_backward(grad.contiguous(), saved[1], Source(*places[:3]), norms)
    by_filter = mix_backward(dx, saved[0], parameters[0], (places[3], places[4]), dx)
    return dx, rows, by_filter, sums


@_update_op.register_fake
def _(x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape)


@_update_backward_op.register_fake
def _(
    grad: Tensor, saved: list[Tensor], places: list[Tensor], *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, width = saved[0], saved[0].shape[1]
    by_filter = x.new_empty(width, dtype=torch.float32)
    sums = x.new_empty(4, width, dtype=torch.float32)
    return x.new_empty(x.shape), x.new_empty(len(places[2]), width), by_filter, sums


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, _, places, parameters, dark_bias, light_bias, ctx.eps = inputs
    ctx.save_for_backward(x, output[1], *places, *parameters, dark_bias, light_bias)


def _grads(ctx: Any, grad: Tensor, _: Any) -> tuple[Any, ...]:
    x, u, *others = ctx.saved_tensors
    places, parameters, (dark_bias, light_bias) = others[:5], others[5:8], others[8:]
    dx, rows, by_filter, sums = _update_backward_op(
        grad, [x, u], places, parameters, dark_bias, light_bias, ctx.eps
    )
    dark, by_dark_bias = parameter_grads(sums[:2], parameters[1], dark_bias)
    light, by_light_bias = parameter_grads(sums[2:], parameters[2], light_bias)
    by_parameters = [by_filter.to(parameters[0].dtype), dark, light]
    return dx, rows, [None] * 5, by_parameters, by_dark_bias, by_light_bias, None


_update_op.register_autograd(_grads, setup_context=_save)
