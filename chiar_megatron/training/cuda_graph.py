"""Forward and backward of a whole step as one CUDA graph: a routed layer is many small launches, which cost
the host more time than the device.

Needs what capacity gives: equal shapes in every step, and no wait for the host within one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import fields, replace

import torch
from torch import Tensor

from chiar_megatron.data.dataset import TokenBatch

_log = logging.getLogger(__name__)

# Steps before the capture: they compile, tune and load what is then only recorded.
WARM_UP_STEPS = 3

Pass = Callable[[Sequence[TokenBatch]], list[Tensor]]


class GraphedPass:
    """Calls `run` on a step's micro-batches, from the fourth call on by replaying what it recorded.

    Everything of this process must run on the stream that is current at construction, a side stream: a
    graph cannot be captured on the default one, nor take in work of another.
    """

    def __init__(self, run: Pass) -> None:
        self.run = run
        self.calls = 0
        self.graph: torch.cuda.CUDAGraph | None = None
        self.inputs: list[TokenBatch] = []
        self.reports: list[Tensor] = []

    def __call__(self, batches: Sequence[TokenBatch]) -> list[Tensor]:
        """What `run` returns; valid until the next call."""
        self.calls += 1
        if self.calls <= WARM_UP_STEPS:
            return self.run(batches)
        if self.graph is None:
            self._capture(batches)
        assert self.graph is not None
        for static, batch in zip(self.inputs, batches, strict=True):
            for target, source in zip(_tensors(static), _tensors(batch), strict=True):
                target.copy_(source.pin_memory(), non_blocking=True)
        self.graph.replay()
        return self.reports

    def _capture(self, batches: Sequence[TokenBatch]) -> None:
        device = torch.device("cuda", torch.cuda.current_device())
        self.inputs = [_on_device(batch, device) for batch in batches]
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # the graph has a pool of its own, as large as all activations
        # Other threads, which read data ahead and write checkpoints, may go on.
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream(), capture_error_mode="thread_local"):
            self.reports = self.run(self.inputs)
        self.graph = graph
        _log.info("steps are replayed as one CUDA graph from here on")


def use_side_stream() -> None:
    """Make a stream other than the default one current, for the rest of the process."""
    torch.cuda.set_stream(torch.cuda.Stream())


def _tensors(batch: TokenBatch) -> list[Tensor]:
    """What a forward pass reads of a micro-batch."""
    tensors = (batch.tokens_BS, batch.labels_BS, batch.loss_mask_BS, batch.document_ids_BS)
    return [tensor for tensor in tensors if tensor is not None]


def _on_device(batch: TokenBatch, device: torch.device) -> TokenBatch:
    moved = {
        field.name: value.to(device)
        for field in fields(batch)
        if isinstance(value := getattr(batch, field.name), Tensor)
    }
    return replace(batch, **moved)
