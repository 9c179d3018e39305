"""The row-selecting kernel on CUDA against the plain PyTorch it replaces."""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET=1: kernels would not run on the device", allow_module_level=True)

from chiar_megatron.operators.kernels.select_rows import select_rows
from chiar_megatron.operators.rows import rows_of
from chiar_megatron.routing.balance import cut_to_capacity


@pytest.mark.parametrize("n", [65, 32768, 100_000])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("levels", [3, 0])  # few: many equal scores; 0: as an entropy router has them
def test_agrees_with_sorting(levels, share, n):
    torch.manual_seed(n)
    light_N = torch.rand(n, device="cuda") < share
    score_N = 0.89 + 0.004 * torch.randn(n, device="cuda")
    if levels:
        score_N = torch.randint(-levels, levels, (n,), device="cuda") / 7.0
    for capacity in (0, 1, n // 4, n):
        kept_N, slot_N, index_R, rest_N, counts, tally = select_rows(light_N, score_N, capacity)
        expected_N = cut_to_capacity(light_N, score_N, capacity)
        rows = rows_of(expected_N, capacity)
        assert torch.equal(kept_N, expected_N)
        assert torch.equal(slot_N, rows.slot_N) and torch.equal(index_R, rows.index_R)
        assert counts.tolist() == [int(expected_N.sum()), int((~expected_N).sum())]
        assert torch.equal(rest_N[: counts[1]].long(), (~expected_N).nonzero().squeeze(1))
        lights, scores = light_N.double(), score_N.double()
        sums = [lights.sum(), (light_N & ~expected_N).double().sum(), scores.sum(), scores.square().sum()]
        torch.testing.assert_close(tally, torch.stack(sums), rtol=1e-12, atol=1e-9)
