"""Where the pipeline is cut: by FLOPs of the one ledger (issue 4, item 3).

Layers are whole, and cost differently by their kind; the loss (the output head) costs several of them, the
embedding's look-up nothing. What counts is what is executed, unused rows of capacity included, with DCTs as
matrix products: the kernel does fewer FLOPs, but a routed layer takes the time of about those counted.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from itertools import accumulate

from chiar_megatron.config.pipeline import Layout, chunks_of, even_layout, layout_text, parse_layout
from chiar_megatron.config.routing import computes_all
from chiar_megatron.config.schedule import parse_schedule
from chiar_megatron.config.schema import RouterConfig, RunConfig
from chiar_megatron.model.accounting import flops_per_sequence
from chiar_megatron.routing.balance import capacity_rows

# An entropy threshold where none was balanced or calibrated lies at the middle of noise.
UNKNOWN_FRACTION = 0.5
# Partial cuts kept at each chunk of an interleaved pipeline.
_BEAM = 2000


@dataclass(frozen=True)
class Costs:
    """FLOPs of one sequence's training step, executed: what a cut can and cannot part."""

    layers: tuple[float, ...]
    """First to last."""
    loss: float
    """The output head."""

    @property
    def total(self) -> float:
        """Of the whole model."""
        return sum(self.layers) + self.loss

    def of_chunks(self, layout: Layout) -> list[float]:
        """Of each chunk, first to last; the loss is in the last."""
        ends = list(accumulate(layout))
        costs = [sum(self.layers[end - count : end]) for end, count in zip(ends, layout, strict=True)]
        costs[-1] += self.loss
        return costs

    def of_stages(self, layout: Layout, stages: int) -> list[float]:
        """Of each pipeline stage: the sum of its chunks."""
        chunks = self.of_chunks(layout)
        return [sum(chunks[stage::stages]) for stage in range(stages)]


@dataclass(frozen=True)
class PipelineCut:
    """A layout with what it does to the stages."""

    layout: Layout
    shares: tuple[float, ...]
    """Of the step's FLOPs, by stage."""

    @property
    def heaviest(self) -> float:
        """FLOPs of the heaviest stage over their mean: a step takes at least so much longer."""
        return max(self.shares) * len(self.shares)

    def __str__(self) -> str:
        shares = " ".join(f"{share:.1%}" for share in self.shares)
        return (
            f"{layout_text(self.layout)}: {shares} of the FLOPs, heaviest stage {self.heaviest:.3f}× the mean"
        )


def expected_fraction(router: RouterConfig) -> float:
    """Share of tokens that routed layers are expected to send to attention."""
    if router.target is not None:
        return router.target
    return router.random_fraction if router.kind == "random" else UNKNOWN_FRACTION


def expected_capacity(config: RunConfig) -> float | None:
    """Rows of a routed layer's attention as a share of the tokens; None: as many as light tokens."""
    tokens = config.training.micro_batch_size * config.model.seq_length
    rows = capacity_rows(config.model.router, tokens)
    return None if rows is None or computes_all(config.model.router) else rows / tokens


def projected_rows(config: RunConfig) -> float | None:
    """Rows that projections of routed layers run over in all, as a share of the tokens: those of
    `expected_capacity`, but c context-parallel ranks have min(R, tokens / c) each, the most it may need."""
    context, rows = config.parallel.context_parallel_size, expected_capacity(config)
    if context == 1 or computes_all(config.model.router):
        return rows
    return min(1.0, context * (expected_fraction(config.model.router) if rows is None else rows))


def pipeline_costs(config: RunConfig) -> Costs:
    """What the recipe's layers and loss cost over all ranks that share a layer; config: resolved. Recomputed
    layers run forward twice."""
    model = config.model
    ledger = flops_per_sequence(
        model,
        model.seq_length,
        expected_fraction(model.router),
        capacity_fraction=projected_rows(config),
    )
    layers = [flops.executed for flops in ledger.per_layer()]
    if config.training.recompute == "full":
        again = [flops.executed for flops in ledger.per_layer("forward")]
        layers = [once + more for once, more in zip(layers, again, strict=True)]
    return Costs(tuple(layers), ledger.total(names=("head",)).executed)


def pipeline_layout(config: RunConfig) -> Layout:
    """Layers of each chunk, as `parallel.layout` says; config: resolved and checked."""
    parallel = config.parallel
    chunks = chunks_of(parallel)
    if parallel.layout == "even":
        return even_layout(len(parse_schedule(config.model.schedule)), chunks)
    if parallel.layout == "auto":
        return balanced_layout(pipeline_costs(config), parallel.pipeline_model_parallel_size, chunks)
    return parse_layout(parallel.layout)


def pipeline_cut(config: RunConfig) -> PipelineCut:
    """The recipe's layout and its stages' shares."""
    costs, layout = pipeline_costs(config), pipeline_layout(config)
    stages = costs.of_stages(layout, config.parallel.pipeline_model_parallel_size)
    return PipelineCut(layout, tuple(cost / costs.total for cost in stages))


@functools.lru_cache(maxsize=64)
def balanced_layout(costs: Costs, stages: int, chunks: int) -> Layout:
    """The layout whose heaviest stage is lightest; among those, the one of the evenest chunks.

    Every chunk has a layer, except that the last may hold the loss alone. With one chunk a stage this is the
    optimum. With several, it is the best of those that a search with a bounded memory keeps, which is the
    optimum where there are few layers.
    """
    assert len(costs.layers) >= chunks - 1 and chunks % stages == 0, (costs, stages, chunks)
    if chunks == 1:
        return (len(costs.layers),)
    return _optimal(costs, chunks) if stages == chunks else _interleaved(costs, stages, chunks)


def _optimal(costs: Costs, stages: int) -> Layout:
    """By dynamic programming over (stages, layers): first the lightest heaviest stage there is, then, of the
    cuts that reach it, the one with the smallest sum of squares."""
    ends = [0.0, *accumulate(costs.layers)]
    layers = len(costs.layers)

    def stage(first: int, last: int, number: int) -> float:
        return ends[last] - ends[first] + (costs.loss if number == stages else 0.0)

    bound = [0.0] + [float("inf")] * layers
    for number in range(1, stages + 1):
        bound = [
            min(
                (max(bound[f], stage(f, e, number)) for f in _starts(e, number, stages)), default=float("inf")
            )
            for e in range(layers + 1)
        ]
    limit = bound[layers] * (1 + 1e-12)
    best: list[tuple[float, Layout]] = [(0.0, ()), *[(float("inf"), ())] * layers]
    for number in range(1, stages + 1):
        best = [
            min(
                (
                    (best[f][0] + stage(f, e, number) ** 2, (*best[f][1], e - f))
                    for f in _starts(e, number, stages)
                    if stage(f, e, number) <= limit
                ),
                default=(float("inf"), ()),
            )
            for e in range(layers + 1)
        ]
    return best[layers][1]


def _starts(end: int, number: int, stages: int) -> range:
    """Where stage `number` (from 1) may begin if it ends at layer `end`."""
    return range(0, end + 1 if number == stages else end)


def _interleaved(costs: Costs, stages: int, chunks: int) -> Layout:
    """Chunk by chunk over partial cuts (layers used, load of every stage), of which the most promising are
    kept: those whose heaviest stage, and then whose heaviest chunk, is lightest for what they have used."""
    ends = [0.0, *accumulate(costs.layers)]
    layers, mean = len(costs.layers), costs.total / chunks
    widest = max(2, 2 * -(-layers // chunks))
    partial: dict[tuple[int, tuple[float, ...]], tuple[float, Layout]] = {(0, (0.0,) * stages): (0.0, ())}
    for number in range(chunks):
        last, stage = number == chunks - 1, number % stages
        grown: dict[tuple[int, tuple[float, ...]], tuple[float, Layout]] = {}
        for (used, loads), (squares, layout) in partial.items():
            left = layers - used
            after = max(0, chunks - number - 2)  # chunks that still need a layer, the last aside
            counts = (left,) if last else range(1, min(left - after, widest) + 1)
            for count in counts:
                cost = ends[used + count] - ends[used] + (costs.loss if last else 0.0)
                new = (*loads[:stage], loads[stage] + cost, *loads[stage + 1 :])
                key = used + count, tuple(round(load, 3) for load in new)
                value = squares + (cost - mean) ** 2, (*layout, count)
                grown[key] = min(value, grown.get(key, value))
        # The heaviest stage that a partial cut could end with at best, the loss being the last one's anyway.
        to_come = 0.0 if last else costs.loss
        least = {key: max(*key[1][:-1], key[1][-1] + to_come, costs.total / stages) for key in grown}
        kept = sorted(grown, key=lambda key: (least[key], grown[key][0]))[:_BEAM]
        partial = {key: grown[key] for key in kept}
    return partial[min(partial, key=lambda key: (max(key[1]), partial[key][0]))][1]
