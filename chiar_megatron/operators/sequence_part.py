"""The part of every sequence that this process holds between layers.

Context parallelism cuts sequences into contiguous parts of equal length, sequence parallelism cuts each of
them again over the tensor-parallel ranks: token `i` of s lies on part `i // (s / size)`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import get_pg_rank, get_pg_size
from torch import Tensor

from chiar_megatron.operators.context import sequence_shard
from chiar_megatron.operators.transfers import gather_sequence, reduce_from_ranks


@dataclass(frozen=True)
class SequencePart:
    """Part `rank` of `size`; group: the processes that hold the parts, in order (None: there is one)."""

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None

    @staticmethod
    def of(config: TransformerConfig, pg_collection: ProcessGroupCollection) -> SequencePart:
        """The part that this layout gives to this process."""
        if config.context_parallel_size > 1:
            group = pg_collection.tp_cp if config.sequence_parallel else pg_collection.cp
        elif config.sequence_parallel:
            group = pg_collection.tp
        else:
            return SequencePart()
        return SequencePart(get_pg_rank(group), get_pg_size(group), group)

    @property
    def shard(self) -> tuple[int, int]:
        """(rank, size), as `sequence_shard` takes them."""
        return self.rank, self.size

    def own(self, whole_SX: Tensor) -> Tensor:
        """This part of what stands for a whole sequence."""
        return sequence_shard(whole_SX, self.rank, self.size)

    def whole(self, part_SX: Tensor) -> Tensor:
        """What all parts hold, put together; the gradient is not followed."""
        if self.group is None:
            return part_SX
        return gather_sequence(  # type: ignore[no-any-return]
            part_SX.detach().contiguous(), tensor_parallel_output_grad=False, group=self.group
        )

    def sum(self, partial: Tensor) -> Tensor:
        """The sum over parts of a contiguous tensor, where each part's share of the gradient is its own."""
        if self.group is None:
            return partial
        return reduce_from_ranks(partial.contiguous(), group=self.group)  # type: ignore[no-any-return]
