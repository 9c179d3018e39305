"""The row-selecting kernel, under Triton's interpreter, against the plain PyTorch it replaces."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from chiar_megatron.operators.kernels import select_rows as kernel  # noqa: E402
from chiar_megatron.operators.rows import rows_of  # noqa: E402
from chiar_megatron.routing.balance import cut_to_capacity  # noqa: E402


@pytest.mark.parametrize("levels", [2, 5, 10_000])  # few: many equal scores
@pytest.mark.parametrize("capacity", [0, 1, 63, 64, 300, 1000])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_agrees_with_sorting(share, capacity, levels, monkeypatch):
    monkeypatch.setattr(kernel, "BLOCK", 256)  # several blocks
    torch.manual_seed(capacity + levels)
    n = 1000
    light_N = torch.rand(n) < share
    score_N = (torch.randint(levels, (n,)) - levels // 2) / 7.0
    kept_N, slot_N, index_R, rest_N, counts = kernel.select_rows(light_N, score_N, capacity)
    expected_N = cut_to_capacity(light_N, score_N, capacity)
    rows = rows_of(expected_N, capacity)
    assert torch.equal(kept_N, expected_N)
    assert torch.equal(slot_N, rows.slot_N)
    assert torch.equal(index_R, rows.index_R)
    assert counts.tolist() == [int(expected_N.sum()), int((~expected_N).sum())]
    assert torch.equal(rest_N[: counts[1]].long(), (~expected_N).nonzero().squeeze(1))


@pytest.mark.parametrize("n", [1, 63, 64, 65])
def test_odd_sizes_and_a_score_that_is_no_number(n):
    score_N = torch.linspace(-1.0, 1.0, n)
    score_N[0] = float("nan")
    light_N = score_N > -0.5
    kept_N, *_, counts = kernel.select_rows(light_N, score_N, max(1, n // 4))
    assert torch.equal(kept_N, cut_to_capacity(light_N, score_N, max(1, n // 4)))
    assert int(counts.sum()) == n
