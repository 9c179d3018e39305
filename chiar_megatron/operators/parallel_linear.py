"""megatron-core's parallel linear layers, for tokens `[b, s, ...]` and for some rows of them.

Where one process holds the whole matrix, the product is a plain one that torch.compile sees through.
Under sequence parallelism tokens arrive and leave as this rank's part of the sequence.
"""

from __future__ import annotations

import torch.nn.functional as F
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from chiar_megatron.operators.transfers import (
    copy_to_ranks,
    gather_sequence,
    reduce_from_ranks,
    reduce_scatter_sequence,
    sharded_linear,
)


def parallel_linear(
    linear: ColumnParallelLinear | RowParallelLinear, x_BSX: Tensor, biased: bool = True
) -> Tensor:
    """`[b, s, in]` to `[b, s, out]`, with bias if not said otherwise. What is this rank's share is `out` of
    a column-parallel layer and `in` of a row-parallel one; under sequence parallelism the other side has a
    part of s."""
    if linear.config.tensor_model_parallel_size == 1:
        return F.linear(x_BSX, linear.weight, linear.bias if biased else None)
    if linear.sequence_parallel:
        out_SBX, bias = sharded_linear(linear, x_BSX.transpose(0, 1).contiguous())
        out_BSX = out_SBX.transpose(0, 1)
    else:
        out_BSX, bias = sharded_linear(linear, x_BSX)
    return out_BSX if bias is None or not biased else out_BSX + bias


def enter_tensor_parallel(config: TransformerConfig, group: object, x_BSH: Tensor) -> Tensor:
    """All tokens `[b, whole s, h]` on every rank of the group, as what follows multiplies with shards:
    gradients of the ranks are added up."""
    if config.tensor_model_parallel_size == 1:
        return x_BSH
    if config.sequence_parallel:
        gathered_SBH = gather_sequence(x_BSH.transpose(0, 1).contiguous(), group=group)
        return gathered_SBH.transpose(0, 1)  # type: ignore[no-any-return]
    return copy_to_ranks(x_BSH, group=group)  # type: ignore[no-any-return]


def leave_tensor_parallel(config: TransformerConfig, group: object, partial_BSH: Tensor) -> Tensor:
    """The sum `[b, s, h]` of every rank's product with its shard (a part of s under sequence parallelism)."""
    if config.tensor_model_parallel_size == 1:
        return partial_BSH
    if config.sequence_parallel:
        out_SBH = reduce_scatter_sequence(partial_BSH.transpose(0, 1).contiguous(), group=group)
        return out_SBH.transpose(0, 1)  # type: ignore[no-any-return]
    return reduce_from_ranks(partial_BSH, group=group)  # type: ignore[no-any-return]
