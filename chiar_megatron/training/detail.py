"""What ranks tell of a step at log intervals, besides the sums: who had how much to do, and how long it took.

It travels in the step's one reduction: every rank writes into a place of its own, and what others leave at
0 adds up. The scores are those of the last micro-batch, histograms in units of the step before's spread,
which all ranks know alike.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from chiar_megatron.model.layer import ChiarLayer
from chiar_megatron.routing.statistics import BINS, FIELDS, Counts, score_histogram
from chiar_megatron.runtime.distributed import World

TRACED_SEQUENCES = 64  # of one step, so that a large run's reduction stays small


@dataclass(frozen=True)
class Detail:
    """What is told of one step.

    layers: of the whole model. score_place: mean and standard deviation of every layer's scores in the step
    before, float64 `[layers]` each on the device; None: not known, and there is no histogram.
    seconds: this rank's own work, of the last step that it can tell; 0 if of none.
    traced: sequences of a micro-batch if traces are wanted, else 0.
    """

    layers: int
    micro_batches: int
    score_place: tuple[Tensor, Tensor] | None
    seconds: float
    traced: int

    def shapes(self, world: World) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the parts."""
        layers, replicas = self.layers, world.data_parallel_size
        shapes: dict[str, tuple[int, ...]] = {
            "light": (layers, replicas),
            "rows": (layers, replicas),
            "most_light": (layers, replicas),
            "threshold": (layers,),
            "seconds": (world.size,),
        }
        if self.score_place is not None:
            shapes["score_place"] = (2, layers)
            shapes["histogram"] = (layers, BINS)
            if self.traced:
                told = traced_replicas(self.traced, replicas)
                shapes["traced_light"] = (layers, told, self.traced)
                shapes["traced_histogram"] = (layers, told, self.traced, BINS)
        return shapes

    def parts(
        self, routed: Sequence[ChiarLayer], counts: Counts | None, world: World, owns_part: bool
    ) -> dict[str, Tensor]:
        """This rank's parts; owns_part: what it counted of tokens is not another rank's too."""
        parts = {
            name: torch.zeros(shape, dtype=torch.float64, device=world.device)
            for name, shape in self.shapes(world).items()
        }
        parts["seconds"][world.rank].fill_(self.seconds)
        if self.score_place is not None and world.is_main:
            parts["score_place"] = torch.stack(self.score_place)
        if counts is None:
            return parts
        replica = world.data_parallel_rank
        # For what all ranks of a micro-batch hold alike.
        speaks = world.tensor_parallel_rank == 0 and world.context_parallel_rank == 0
        rows = [layer.layer_number - 1 for layer in routed]

        def whole(values_RX: Tensor) -> Tensor:
            return of_all_layers(values_RX, rows, self.layers)

        if owns_part:
            parts["light"][:, replica] = whole(counts.sums_LF[:, FIELDS.index("light")])
            parts["rows"][:, replica] = whole(counts.sums_LF[:, FIELDS.index("rows")])
        if speaks:
            parts["most_light"][:, replica] = whole(counts.most_light_L)
            thresholds = [layer.router.threshold for layer in routed if layer.router is not None]
            if replica == 0:
                parts["threshold"] = whole(torch.stack(thresholds).double())
        scores, lights = _last(routed)
        if self.score_place is None or scores is None or lights is None or not owns_part:
            return parts
        mean_R, deviation_R = (torch.stack([x_L[row] for row in rows]) for x_L in self.score_place)
        histogram_RBX = score_histogram(scores, mean_R, deviation_R)
        parts["histogram"] = whole(histogram_RBX.sum(1))
        if self.traced and replica < parts["traced_light"].shape[1]:
            parts["traced_light"][:, replica] = whole(lights.sum(dim=1).double())
            parts["traced_histogram"][:, replica] = whole(histogram_RBX)
        return parts


def of_all_layers(values_RX: Tensor, rows: Sequence[int], layers: int) -> Tensor:
    """`[layers, ...]` with R layers' values in their rows and 0 elsewhere, in one launch: an index would be
    copied to the device while the host waits."""
    nothing_X = torch.zeros_like(values_RX[0])
    held = dict(zip(rows, values_RX.unbind(), strict=True))
    return torch.stack([held.get(row, nothing_X) for row in range(layers)])


def traced_replicas(sequences: int, replicas: int) -> int:
    """How many replicas, from the first on, trace their micro-batch of so many sequences."""
    return min(replicas, max(1, TRACED_SEQUENCES // sequences))


def _last(routed: Sequence[ChiarLayer]) -> tuple[Tensor | None, Tensor | None]:
    """Scores and decisions of the last micro-batch, `[layers, s, b]` each; None where nothing has run."""
    kept = [layer.statistics for layer in routed if layer.statistics is not None]
    scores = [statistics.last_score_SB for statistics in kept if statistics.last_score_SB is not None]
    lights = [statistics.last_light_SB for statistics in kept if statistics.last_light_SB is not None]
    if not scores or len(scores) < len(kept):
        return None, None
    return torch.stack(scores), torch.stack(lights)


class Stopwatch:
    """How long this rank's own forward and backward work takes: on CUDA the device's time between two
    events, read once they have passed; on a CPU the processor time of this process, so that waiting for
    others does not count. On CUDA waiting within the work does: for other stages, for tensor- and
    context-parallel peers, and for replicas whose overlapped sums are part of a CUDA graph.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._pending: deque[tuple[Any, Any]] = deque()
        self._seconds = 0.0

    def time(self, work: Callable[[], list[Tensor]]) -> list[Tensor]:
        """Do the work."""
        if not self._on_gpu:
            started = time.process_time()
            result = work()
            self._seconds = time.process_time() - started
            return result
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        result = work()
        end.record()
        self._pending.append((start, end))
        return result

    def seconds(self) -> float:
        """Of the last step that has passed, 0 before there is one. Never waits."""
        while self._pending and self._pending[0][1].query():
            start, end = self._pending.popleft()
            self._seconds = start.elapsed_time(end) / 1e3
        return self._seconds
