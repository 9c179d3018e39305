"""megatron-core's parallel linear layers, for tokens `[b, s, ...]` and for some rows of them.

Where one process holds the whole matrix, the product is a plain one that torch.compile sees through.
Under sequence parallelism tokens arrive and leave as this rank's part `[b, s / size, ...]` of the sequence.
Transfers join parts rank by rank, `[size, b, s / size, ...]`; what does not ask for the sequence's order
(`ordered=False`: an MLP between its two products) is spared the two copies that put it back.
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
    linear: ColumnParallelLinear | RowParallelLinear,
    x_BSX: Tensor,
    biased: bool = True,
    ordered: bool = True,
) -> Tensor:
    """`[b, s, in]` to `[b, s, out]`, with bias if not said otherwise. What is this rank's share is `out` of
    a column-parallel layer and `in` of a row-parallel one; under sequence parallelism the other side has a
    part of s. ordered: False where the side with the whole s may have its tokens in any order."""
    size = linear.config.tensor_model_parallel_size
    if size == 1:
        return F.linear(x_BSX, linear.weight, linear.bias if biased else None)
    if not linear.sequence_parallel:
        out_BSX, bias = sharded_linear(linear, x_BSX)
    elif isinstance(linear, ColumnParallelLinear):
        out_NX, bias = sharded_linear(linear, x_BSX.flatten(0, 1).contiguous())
        b = x_BSX.shape[0]
        out_BSX = _in_sequences(out_NX, b, size) if ordered else out_NX.unflatten(0, (b, -1))
    else:
        x_NX = _by_parts(x_BSX, size) if ordered else x_BSX.flatten(0, 1)
        out_NX, bias = sharded_linear(linear, x_NX)
        out_BSX = out_NX.unflatten(0, (x_BSX.shape[0], -1))
    return out_BSX if bias is None or not biased else out_BSX + bias


def enter_tensor_parallel(config: TransformerConfig, group: object, x_BSH: Tensor) -> Tensor:
    """All tokens `[b, whole s, h]` on every rank of the group, as what follows multiplies with shards:
    gradients of the ranks are added up."""
    size = config.tensor_model_parallel_size
    if size == 1:
        return x_BSH
    if config.sequence_parallel:
        gathered_NH = gather_sequence(x_BSH.flatten(0, 1).contiguous(), group=group)
        return _in_sequences(gathered_NH, x_BSH.shape[0], size)
    return copy_to_ranks(x_BSH, group=group)  # type: ignore[no-any-return]


def leave_tensor_parallel(config: TransformerConfig, group: object, partial_BSH: Tensor) -> Tensor:
    """The sum `[b, s, h]` of every rank's product with its shard (a part of s under sequence parallelism)."""
    size = config.tensor_model_parallel_size
    if size == 1:
        return partial_BSH
    if config.sequence_parallel:
        out_NH = reduce_scatter_sequence(_by_parts(partial_BSH, size), group=group)
        return out_NH.unflatten(0, (partial_BSH.shape[0], -1))  # type: ignore[no-any-return]
    return reduce_from_ranks(partial_BSH, group=group)  # type: ignore[no-any-return]


def _in_sequences(joined_NX: Tensor, b: int, size: int) -> Tensor:
    """`[b, s, ...]` from the parts of `size` ranks, one rank after the other."""
    x_BSX: Tensor = joined_NX.unflatten(0, (size, b, -1)).transpose(0, 1).flatten(1, 2)
    return x_BSX


def _by_parts(x_BSX: Tensor, size: int) -> Tensor:
    """The inverse, contiguous."""
    joined_NX: Tensor = x_BSX.unflatten(1, (size, -1)).transpose(0, 1).flatten(0, 2)
    return joined_NX.contiguous()
