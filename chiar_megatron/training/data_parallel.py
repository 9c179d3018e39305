"""Each replica's chunks in megatron-core's data parallelism, and what overlaps with their computation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from torch import Tensor

from chiar_megatron.config.mcore import ddp_config
from chiar_megatron.config.schema import RunConfig
from chiar_megatron.data.dataset import TokenBatch
from chiar_megatron.model.gpt import ChiarModel
from chiar_megatron.training.cuda_graph import Pass


def wrap(config: RunConfig, chunks: Sequence[ChiarModel]) -> list[DistributedDataParallel]:
    """Every chunk with its buffers of gradients; the schedules learn from the first one's config how to hold
    back communication until the last micro-batch."""
    settings = ddp_config(config)
    wrapped = [
        # Buckets let the first chunk's communication begin early; the others' is hidden as it is.
        DistributedDataParallel(chunk.config, settings, chunk, disable_bucketing=number > 0)
        for number, chunk in enumerate(chunks)
    ]
    functions = [chunk.no_sync for chunk in wrapped]
    chunks[0].config.no_sync_func = functions if len(functions) > 1 else functions[0]
    if config.parallel.overlap_param_gather:
        for chunk, of in zip(chunks, wrapped, strict=True):
            _wait_by_layer(chunk, of)
    return wrapped


def _wait_by_layer(chunk: ChiarModel, wrapped: DistributedDataParallel) -> None:
    """Wait for a whole layer's weights where it begins, in place of megatron-core's hook on every module:
    our layers read weights of the modules inside them without calling those, and compiled code would take
    the hooks in."""
    wrapped.disable_forward_pre_hook(param_sync=False)
    parts: list[torch.nn.Module] = list(chunk.chiar_layers)
    for name in ("embedding", "output_layer"):
        if hasattr(chunk, name):
            parts.append(getattr(chunk, name))
    if chunk.decoder.final_layernorm is not None:
        parts.append(chunk.decoder.final_layernorm)
    for part in parts:
        part.register_forward_pre_hook(_finish_gather(part, wrapped))


def _finish_gather(part: torch.nn.Module, wrapped: DistributedDataParallel) -> Callable[..., None]:
    # In the order of registration, which is that of the gathers.
    groups = list(dict.fromkeys(wrapped.param_to_bucket_group[parameter] for parameter in part.parameters()))

    def hook(*unused: Any) -> None:
        for group in groups:
            group.finish_param_sync()

    return hook


class ReducedGradients:
    """Calls `run`, then waits for the sums over replicas that its backward pass began: both ends of what
    overlaps must lie in one CUDA graph."""

    def __init__(self, run: Pass, reduce: Callable[[], None]) -> None:
        self.run = run
        self.reduce = reduce

    def __call__(self, batches: Sequence[TokenBatch]) -> list[Tensor]:
        """What `run` returns."""
        reports = self.run(batches)
        self.reduce()
        return reports


def gather_again(wrapped: Sequence[DistributedDataParallel]) -> None:
    """Have the next forward pass gather all weights, whether or not one has since they were updated."""
    for chunk in wrapped:
        for group in chunk.bucket_groups:
            assert group.param_gather_handle is None, "weights are being gathered"
            group.param_gather_dispatched = False
