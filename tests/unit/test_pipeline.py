"""Where pipelines are cut: against every possible cut, and at the published sizes (issue 4, item 3)."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
from megatron.core.transformer.enums import LayerType
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

from chiar_megatron.config.load import config_from_dict, resolve_config
from chiar_megatron.config.pipeline import layout_text, parse_layout
from chiar_megatron.config.schema import RunConfig
from chiar_megatron.model.accounting import flops_per_sequence
from chiar_megatron.model.pipeline import Costs, balanced_layout, pipeline_cut


def published(seq_length: int, rho: float, **fields: Any) -> RunConfig:
    """The 400M model over 4 stages."""
    given = {
        "model.preset": "400m",
        "model.seq_length": seq_length,
        "model.vocab_size": 50304,
        "model.router.target": rho,
        "parallel.pipeline_model_parallel_size": 4,
        "training.global_batch_size": 128,
        **{name.replace("__", "."): value for name, value in fields.items()},
    }
    return resolve_config(config_from_dict(given), vocab_size=None, eod_token=None)


def heaviest(costs: Costs, counts: tuple[int, ...], stages: int) -> float:
    """Written apart from the code: the heaviest stage over the mean."""
    loads = [0.0] * stages
    first = 0
    for chunk, count in enumerate(counts):
        loads[chunk % stages] += sum(costs.layers[first : first + count])
        first += count
    loads[stages - 1] += costs.loss
    return max(loads) / (sum(loads) / stages)


def every_cut(layers: int, chunks: int) -> list[tuple[int, ...]]:
    """All layouts whose chunks have a layer each, the last one perhaps none."""
    edges = itertools.combinations(range(1, layers + 1), chunks - 1)
    return [tuple(b - a for a, b in zip((0, *e), (*e, layers), strict=True)) for e in edges]


@pytest.mark.parametrize("stages", [2, 3, 4])
@pytest.mark.parametrize("virtual", [1, 2])
def test_no_cut_is_better(stages: int, virtual: int) -> None:
    random.seed(stages + 10 * virtual)
    for _ in range(12):
        layers = random.randint(stages * virtual - 1, 11)
        kinds = [random.uniform(0.1, 3.0) for _ in range(3)]
        costs = Costs(tuple(random.choice(kinds) for _ in range(layers)), random.uniform(0.0, 8.0))
        found = balanced_layout(costs, stages, stages * virtual)
        cuts = every_cut(layers, stages * virtual)
        assert found in cuts
        best = min(heaviest(costs, cut, stages) for cut in cuts)
        assert heaviest(costs, found, stages) == pytest.approx(best)


def test_among_equals_the_rest_is_even() -> None:
    # The loss alone outweighs all: the seven layers before it need not be piled up.
    *before, last = balanced_layout(Costs((1.0,) * 7, 100.0), 4, 4)
    assert sorted(before) == [2, 2, 3] and last == 0


@pytest.mark.parametrize("seq_length", [256, 2048])
@pytest.mark.parametrize("rho", [0.5, 0.25])
def test_the_published_model_over_four_stages(seq_length: int, rho: float) -> None:
    auto = pipeline_cut(published(seq_length, rho))
    even = pipeline_cut(published(seq_length, rho, parallel__layout="even"))
    assert sum(auto.shares) == pytest.approx(1.0) and auto.heaviest <= 1.05
    assert even.layout == (7, 7, 7, 7) and 1.33 <= even.heaviest <= 1.41
    interleaved = pipeline_cut(published(seq_length, rho, parallel__virtual_pipeline_model_parallel_size=2))
    assert interleaved.heaviest <= auto.heaviest and len(interleaved.layout) == 8
    assert max(interleaved.layout) <= 5  # no chunk holds up the others


@pytest.mark.parametrize("seq_length", [256, 2048])
@pytest.mark.parametrize("rho", [0.5, 0.25])
def test_where_only_routed_keys_count_whole_layers_allow_no_better(seq_length: int, rho: float) -> None:
    """With `keys_values: routed` layers are cheaper beside the loss, and 1.05 is out of reach at ρ = ¼: so
    says every one of the 3,276 cuts."""
    config = published(seq_length, rho, model__router__keys_values="routed")
    rows = -(-int(rho * 1.05 * 8 * seq_length) // 64) * 64 / (8 * seq_length)
    ledger = flops_per_sequence(config.model, seq_length, rho, capacity_fraction=rows)
    layers = tuple(flops.executed for flops in ledger.per_layer())
    costs = Costs(layers, ledger.total(names=("head",)).executed)
    best = min(heaviest(costs, cut, 4) for cut in every_cut(28, 4))
    assert pipeline_cut(config).heaviest == pytest.approx(best, rel=2e-3)
    assert (best <= 1.051) == (rho == 0.5)


def test_recomputed_layers_weigh_more_beside_the_loss() -> None:
    plain, again = (pipeline_cut(published(256, 0.5, training__recompute=r)) for r in ("none", "full"))
    assert again.layout[-1] > plain.layout[-1]


@pytest.mark.parametrize("text", ["Et*3|t*2|t|L", "E|t*4,|tL", "Ett|(t|)*2L", "E(t|t*2|)*2 tL"])
def test_megatron_core_reads_the_same_layout(text: str) -> None:
    counts = parse_layout(text)
    chunks = len(counts)
    theirs = PipelineParallelLayerLayout(text.replace(" ", ""), chunks)
    assert tuple(stage[0].count(LayerType.decoder) for stage in theirs.layout) == counts
    again = PipelineParallelLayerLayout(layout_text(counts), chunks)
    assert again.layout == theirs.layout and parse_layout(layout_text(counts)) == counts
