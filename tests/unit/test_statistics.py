"""What a routed layer counts, also from compiled code, where writes to state must not get lost."""

from __future__ import annotations

import torch

from chiar_megatron.operators.rows import rows_of
from chiar_megatron.routing.balance import cut_to_capacity
from chiar_megatron.routing.decision import RouteDecision
from chiar_megatron.routing.statistics import FIELDS, RoutingStatistics, take_all

CAPACITY = 40


def count(statistics: RoutingStatistics, score_SB: torch.Tensor) -> torch.Tensor:
    """One micro-batch as a layer counts it."""
    light_SB = score_SB > 0.0
    light_N, score_N = light_SB.transpose(0, 1).flatten(), score_SB.transpose(0, 1).flatten()
    rows = rows_of(cut_to_capacity(light_N, score_N, CAPACITY), CAPACITY, light_N.sum())
    kept_SB = rows.has_row_N.view(score_SB.shape[1], -1).transpose(0, 1)
    statistics.add(RouteDecision(light_SB, score_SB), kept_SB, rows)
    return score_SB * 2.0


def test_compiled_code_counts_what_eager_code_counts() -> None:
    generator = torch.Generator().manual_seed(1)
    scores = [torch.randn(32, 3, generator=generator) for _ in range(3)]
    compiled = torch.compile(count, dynamic=False)
    for run in (count, compiled):
        statistics = RoutingStatistics()
        for score_SB in scores:
            run(statistics, score_SB)
        lights = [int((score_SB > 0.0).sum()) for score_SB in scores]
        assert max(lights) > CAPACITY
        sums = dict(zip(FIELDS, statistics.sums_F.tolist(), strict=True))
        assert sums["tokens"] == 3 * 96 and sums["light"] == sum(lights) and sums["rows"] == 3 * CAPACITY
        assert sums["overflow"] == sum(max(0, light - CAPACITY) for light in lights)
        assert statistics.last_score_SB is not None and torch.equal(statistics.last_score_SB, scores[-1])
        assert statistics.last_light_SB is not None and int(statistics.last_light_SB.sum()) == lights[-1]
        counts = take_all([statistics])
        assert counts.most_light_L.tolist() == [max(lights)]
        assert not statistics.sums_F.any() and not statistics.most_light.any()
