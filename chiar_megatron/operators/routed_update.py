"""Each token's own operator, residual and norm by one kernel, where one process holds whole layers."""

from __future__ import annotations

from typing import Any

from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from chiar_megatron.operators.norm import fuses_norms, norm_parameters
from chiar_megatron.operators.rows import TokenRows


def can_fuse_update(x_BSH: Tensor, rows: TokenRows, norm: Any, config: TransformerConfig) -> bool:
    """Whether `fused_update` can stand for the operators' own paths: in training on CUDA in half precision,
    with a fixed number of rows."""
    if rows.rest_N is None or not norm.training or not fuses_norms(x_BSH):
        return False
    from chiar_megatron.operators.kernels.spectral import factorisation

    alone = config.tensor_model_parallel_size == config.context_parallel_size == 1
    return alone and factorisation(x_BSH.shape[-1]) is not None


def fused_update(
    tokens: tuple[Tensor, Tensor],
    rows: TokenRows,
    parameters: tuple[Tensor, Tensor | None],
    norms: tuple[Any, Any],
    users: int,
) -> tuple[Tensor, ...]:
    """`N(x + attended + bias)` for tokens with a row, `N(x + spectral_mixing(x))` for the others, [N, h],
    once for each of 1 or 2 users.

    tokens: x [N, h] and attended [R, h]. parameters: filter and bias [h]. norms (by `Norm`): that of
    tokens without a row, then that of those with one.
    """
    from chiar_megatron.operators.kernels.routed_update import UpdateParameters, routed_update

    own = UpdateParameters(*parameters, *map(norm_parameters, norms))
    return routed_update(*tokens, rows, own, users)
