"""What NCCL asks of tensors and gloo does not, asked of gloo's ranks too."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.utils._pytree import tree_leaves

_TRANSFERS = (
    "allreduce allgather allgather_into_tensor_coalesced _allgather_base all_gather_single broadcast reduce "
    "reduce_scatter _reduce_scatter_base reduce_scatter_single reduce_scatter_tensor_coalesced alltoall "
    "alltoall_base all_to_all_single send recv"
).split()


def require_contiguous_tensors() -> None:
    """From now on, in this process, a transfer of a tensor that is not contiguous fails."""
    for name in _TRANSFERS:
        transfer = getattr(dist.ProcessGroup, name, None)  # torch 2.11 has not all of them
        if transfer is not None:
            setattr(dist.ProcessGroup, name, _checked(name, transfer))


def _checked(name: str, transfer: Any) -> Any:
    def call(*args: Any, **kwargs: Any) -> Any:
        for x in tree_leaves((args[1:], kwargs)):
            assert not isinstance(x, torch.Tensor) or x.is_contiguous(), (
                f"{name} of a tensor {tuple(x.shape)} with strides {x.stride()}: NCCL wants it contiguous"
            )
        return transfer(*args, **kwargs)

    return call
