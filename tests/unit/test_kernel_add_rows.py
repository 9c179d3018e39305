"""The kernel that adds rows to their tokens, under Triton's interpreter, against torch's indexing."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from chiar_megatron.operators.kernels.add_rows import add_rows  # noqa: E402


@pytest.mark.parametrize(
    ("n", "R", "h"), [(5, 3, 96), (70, 65, 1000), (64, 64, 1024), (9, 2, 1030), (4, 0, 8)]
)
def test_agrees_with_indexing(n, R, h):
    generator = torch.Generator().manual_seed(n)
    used = max(0, R - 1)
    index = torch.cat(
        (torch.randperm(n, generator=generator)[:used].sort().values, torch.zeros(R - used).long())
    )
    valid = torch.arange(R) < used
    total, rows = torch.randn(n, h, generator=generator), torch.randn(R, h, generator=generator)
    rows[used:] = float("nan")
    expected = total.clone()
    expected[index[valid]] += rows[valid]
    add_rows(total, rows, index, valid)
    assert torch.equal(total, expected)
