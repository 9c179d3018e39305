"""Transfers between ranks with their gradients, which a compiled layer leaves to run as they are.

torch.compile would follow megatron-core's functions. One that gives back its input and adds up gradients
loses their sum where its output leaves the graph (seen with torch 2.13); with 2.11 gradients are wrong under
tensor and under context parallelism, and under sequence parallelism ranks wait for each other for ever.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, mappings
from torch import Tensor

Function = TypeVar("Function", bound=Callable[..., Any])


def uncompiled(function: Function) -> Function:
    """The function as it is, also where compiled code calls it."""
    return torch.compiler.disable(function)  # type: ignore[no-any-return]


copy_to_ranks = uncompiled(mappings.copy_to_tensor_model_parallel_region)
reduce_from_ranks = uncompiled(mappings.reduce_from_tensor_model_parallel_region)
gather_sequence = uncompiled(mappings.gather_from_sequence_parallel_region)
reduce_scatter_sequence = uncompiled(mappings.reduce_scatter_to_sequence_parallel_region)
all_to_all = uncompiled(mappings.all_to_all)


@uncompiled
def sharded_linear(linear: ColumnParallelLinear | RowParallelLinear, x: Tensor) -> tuple[Tensor, Any]:
    """Output and the bias that is left to the caller, or None."""
    return linear(x)  # type: ignore[no-any-return]


@uncompiled
def sum_over_ranks(x: Tensor, group: dist.ProcessGroup, values: bool, gradients: bool) -> Tensor:
    """The sum over ranks of the values, of the gradients, or of both; what is not summed passes through."""
    return _Sum.apply(x, group, values, gradients)  # type: ignore[no-any-return,no-untyped-call]


class _Sum(torch.autograd.Function):
    """megatron-core's sums in place, and loses the sum of a tensor that is not contiguous."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup, values: bool, gradients: bool) -> Tensor:
        ctx.group, ctx.gradients = group, gradients
        return _all_reduced(x, group) if values else x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _all_reduced(grad, ctx.group) if ctx.gradients else grad, None, None, None


def _all_reduced(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total
