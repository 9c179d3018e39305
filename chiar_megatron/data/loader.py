"""Micro-batches of one replica, as a pure function of the step: there is no loader state to save.

Sample j of micro-batch m of replica r in step s stands at position
`s·global + m·(micro·replicas) + r·micro + j` of the stream, so every layout trains on the same samples
in the same step.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from chiar_megatron.data.dataset import PADDING, TokenBatch, TokenStream
from chiar_megatron.errors import ConfigError


@dataclass(frozen=True)
class BatchLayout:
    """How a global batch is spread over replicas and micro-batches."""

    global_batch_size: int
    """Samples in one step, over all replicas."""

    micro_batch_size: int
    """Samples in one forward pass of one replica."""

    data_parallel_rank: int = 0
    """This replica."""

    data_parallel_size: int = 1
    """Replicas."""

    def __post_init__(self) -> None:
        if self.global_batch_size % (self.micro_batch_size * self.data_parallel_size):
            raise ConfigError(
                f"training.global_batch_size {self.global_batch_size} is not a multiple of "
                f"training.micro_batch_size {self.micro_batch_size} × {self.data_parallel_size} replicas"
            )

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches of this replica in one step."""
        return self.global_batch_size // (self.micro_batch_size * self.data_parallel_size)

    def positions(self, step: int, micro_batch: int) -> range:
        """Stream positions of one micro-batch of this replica."""
        first = (
            step * self.global_batch_size
            + micro_batch * self.micro_batch_size * self.data_parallel_size
            + self.data_parallel_rank * self.micro_batch_size
        )
        return range(first, first + self.micro_batch_size)


def micro_batches(stream: TokenStream, step: int, layout: BatchLayout) -> Iterator[TokenBatch]:
    """This replica's micro-batches of one step (counted from 0)."""
    return (stream.read(layout.positions(step, m)) for m in range(layout.num_micro_batches))


def read_ahead(
    stream: TokenStream, layout: BatchLayout, first_step: int, last_step: int, num_workers: int
) -> Iterator[list[TokenBatch]]:
    """The `micro_batches` of steps `first_step` up to `last_step` (exclusive), a list for each step.

    `num_workers` threads read as many steps ahead; 0 reads when asked; the batches are the same. Threads,
    not processes: reading copies mapped memory, and a fork beside gloo's threads may hang.
    """

    def read(step: int) -> list[TokenBatch]:
        return list(micro_batches(stream, step, layout))

    if num_workers == 0:
        yield from map(read, range(first_step, last_step))
        return
    waiting: deque[Future[list[TokenBatch]]] = deque()
    pool = ThreadPoolExecutor(num_workers, thread_name_prefix="read-ahead")
    try:
        for step in range(first_step, last_step):
            waiting.append(pool.submit(read, step))
            if len(waiting) > num_workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def num_evaluation_batches(stream: TokenStream, num_batches: int, layout: BatchLayout) -> int:
    """Global batches that `evaluation_batches` gives: `num_batches`, or as many as the stream fills."""
    return min(num_batches, -(-len(stream) // layout.global_batch_size))


def evaluation_batches(stream: TokenStream, num_batches: int, layout: BatchLayout) -> Iterator[TokenBatch]:
    """This replica's micro-batches of the first `num_batches` global batches, one after the other
    (`layout.num_micro_batches` for each), always from position 0.

    No sample is given twice: the last batch of a short stream is filled up with padding samples, whose
    loss mask is 0. Weigh by the loss mask, and the mean is the same for every layout.
    """
    for step in range(num_evaluation_batches(stream, num_batches, layout)):
        for m in range(layout.num_micro_batches):
            positions = layout.positions(step, m)
            yield stream.read([p if p < len(stream) else PADDING for p in positions])
