"""The row-selecting kernel, under Triton's interpreter, against the plain PyTorch it replaces."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from chiar_megatron.operators.kernels import select_rows as kernel  # noqa: E402
from chiar_megatron.operators.rows import TokenRows, rows_of  # noqa: E402
from chiar_megatron.routing.balance import cut_to_capacity  # noqa: E402
from chiar_megatron.routing.decision import RouteDecision  # noqa: E402
from chiar_megatron.routing.statistics import RoutingStatistics  # noqa: E402


@pytest.mark.parametrize("levels", [2, 10_000])  # few: many equal scores
@pytest.mark.parametrize("capacity", [0, 1, 63, 64, 300, 1000])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("block, chunk", [(128, 256), (1024, 2048)])  # several, or one
def test_agrees_with_sorting(block, chunk, share, capacity, levels, monkeypatch):
    monkeypatch.setattr(kernel, "BLOCK", block)
    monkeypatch.setattr(kernel, "CHUNK", chunk)
    torch.manual_seed(capacity + levels)
    n = 1000
    light_N = torch.rand(n) < share
    score_N = (torch.randint(levels, (n,)) - levels // 2) / 7.0
    kept_N, slot_N, index_R, rest_N, counts, tally = kernel.select_rows(light_N, score_N, capacity)
    expected_N = cut_to_capacity(light_N, score_N, capacity)
    rows = rows_of(expected_N, capacity)
    assert torch.equal(kept_N, expected_N)
    assert torch.equal(slot_N, rows.slot_N)
    assert torch.equal(index_R, rows.index_R)
    assert counts.tolist() == [int(expected_N.sum()), int((~expected_N).sum())]
    assert torch.equal(rest_N[: counts[1]].long(), (~expected_N).nonzero().squeeze(1))
    lights, scores = light_N.double(), score_N.double()
    sums = [lights.sum(), (light_N & ~expected_N).double().sum(), scores.sum(), scores.square().sum()]
    torch.testing.assert_close(tally, torch.stack(sums), rtol=1e-14, atol=1e-12)


@pytest.mark.parametrize("n", [1, 63, 64, 65])
def test_odd_sizes_and_a_score_that_is_no_number(n):
    score_N = torch.linspace(-1.0, 1.0, n)
    score_N[0] = float("nan")
    light_N = score_N > -0.5
    kept_N, *_, counts, tally = kernel.select_rows(light_N, score_N, max(1, n // 4))
    assert torch.equal(kept_N, cut_to_capacity(light_N, score_N, max(1, n // 4)))
    assert int(counts.sum()) == n and int(tally[0]) == int(light_N.sum()) and bool(tally[2:].isnan().all())


@pytest.mark.parametrize("capacity", [30, 100])
def test_statistics_are_the_same_from_the_tally(capacity):
    torch.manual_seed(capacity)
    score_SB = torch.randn(40, 3)
    decision = RouteDecision(score_SB > 0.0, score_SB, entropy_SB=score_SB)
    light_N, score_N = (x.transpose(0, 1).flatten() for x in (decision.light_SB, score_SB))
    kept_N, slot_N, index_R, rest_N, counts, tally = kernel.select_rows(light_N, score_N, capacity)
    valid_R = torch.arange(capacity) < counts[0]
    counted = []
    for given in (tally, None):
        rows = TokenRows(index_R, valid_R, slot_N, kept_N, rest_N, counts[1:], tally[0], given)
        statistics = RoutingStatistics()
        statistics.add(decision, kept_N.view(3, 40).transpose(0, 1), rows)
        counted.append(torch.cat((statistics.sums_F, statistics.most_light)))
    torch.testing.assert_close(counted[0], counted[1], rtol=1e-14, atol=1e-12)
    assert (counted[0][5] > 0) == (capacity == 30)  # overflow
