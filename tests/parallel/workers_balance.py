"""What each process of the balance tests runs: a few steps in each of some layouts, everything kept."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import Tensor

from chiar_megatron.config.schema import ParallelConfig, RunConfig
from chiar_megatron.metrics.routing import BalanceSummary, RoutingSummary
from chiar_megatron.metrics.traces import StepTraces
from chiar_megatron.training.decisions import DecisionRecorder
from chiar_megatron.training.engine import MegatronEngine
from chiar_megatron.training.step import routed_layers
from tests.parallel.workers_parity import read_step, start_layout


@dataclass
class Told:
    """One rank's view of one layout."""

    data_parallel_rank: int = 0
    routing: list[RoutingSummary] = field(default_factory=list)
    balance: list[BalanceSummary] = field(default_factory=list)
    traces: list[StepTraces | None] = field(default_factory=list)
    thresholds: list[dict[int, float]] = field(default_factory=list)
    """Of this rank's layers, before each step."""
    light: list[dict[tuple[int, int], Tensor]] = field(default_factory=list)
    """What it recorded in each step: bool `[s]` by (sample, layer); so are scores."""
    scores: list[dict[tuple[int, int], Tensor]] = field(default_factory=list)


def tell(config: RunConfig, layouts: dict[str, ParallelConfig], steps: int) -> dict[str, Told]:
    """Train `steps` steps in every layout; the last one is told without detail."""
    told = {}
    for name, parallel in layouts.items():
        own = replace(config, parallel=parallel)
        world = start_layout(parallel, own)
        recorder = DecisionRecorder(Path("unused"))
        engine = MegatronEngine(own, world, recorder)
        answer = Told(data_parallel_rank=world.data_parallel_rank)
        for step in range(steps):
            batches = read_step(own, world, step)
            routers = [layer.router for layer in routed_layers(engine.chunks) if layer.router is not None]
            answer.thresholds.append({r.layer_number: float(r.threshold) for r in routers})
            sums = engine.launch_step(batches, step, detailed=step < steps - 1).result().sums
            answer.routing.append(sums.routing)
            if sums.balance is not None:
                answer.balance.append(sums.balance)
                answer.traces.append(sums.traces)
            answer.light.append(dict(recorder.light))
            answer.scores.append(dict(recorder.scores))
            recorder.light.clear()
            recorder.scores.clear()
        told[name] = answer
    return told
