"""Forward and backward of a whole step as one CUDA graph: a routed layer is many small launches, which cost
the host more time than the device.

Needs what capacity gives: equal shapes in every step, and no wait for the host within one. What ranks send
each other is part of the graph.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import fields, replace

import torch
from megatron.core.parallel_state import get_global_memory_buffer
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker, initialize_rng_tracker
from torch import Tensor

from chiar_megatron.data.dataset import TokenBatch
from chiar_megatron.runtime.distributed import RECORDED_GRAPHS

_log = logging.getLogger(__name__)

# Steps before the capture: they compile, tune and load what is then only recorded.
WARM_UP_STEPS = 3

Pass = Callable[[Sequence[TokenBatch]], list[Tensor]]


class GraphedPass:
    """Calls `run` on a step's micro-batches, from the fourth call on by replaying what it recorded.

    Everything of this process must run on the stream that is current at construction, a side stream: a
    graph cannot be captured on the default one, nor take in work of another.
    """

    def __init__(self, run: Pass, forget: Callable[[], None] = lambda: None) -> None:
        """forget: sets what `run` keeps on the host from one call to the next to how a call has to find it;
        a replay does not touch it."""
        self.run = run
        self.forget = forget
        self.calls = 0
        self.graph: torch.cuda.CUDAGraph | None = None
        self.inputs: list[TokenBatch] = []
        self.reports: list[Tensor] = []
        self.buffers: list[Tensor] = []

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
        self.forget()
        return self.reports

    def _capture(self, batches: Sequence[TokenBatch]) -> None:
        device = torch.device("cuda", torch.cuda.current_device())
        self.inputs = [_on_device(batch, device) for batch in batches]
        graph = torch.cuda.CUDAGraph()
        for state in get_cuda_rng_tracker().get_states().values():
            graph.register_generator_state(state)
        # Tensors that a larger validation batch would replace, and free.
        self.buffers = list(get_global_memory_buffer().buffer.values())
        self.forget()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # the graph has a pool of its own, as large as all activations
        stream = torch.cuda.current_stream()
        try:
            # Other threads, which read data ahead and write checkpoints, may go on.
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                self.reports = self.run(self.inputs)
        except Exception:
            _log.error("this step cannot be a CUDA graph; runtime.cuda_graph=false trains without, slower")
            raise
        self.graph = graph
        RECORDED_GRAPHS.add(graph)
        _log.info("steps are replayed as one CUDA graph from here on")


def prepare(graphed: bool) -> None:
    """Before a model is built on CUDA. graphed: its steps will be replayed; everything then runs on a stream
    other than the default one for the rest of the process, and the random stream of tensor parallelism is one
    that a graph can hold."""
    initialize_rng_tracker(use_cudagraphable_rng=graphed, force_reset=True)
    if graphed:
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
