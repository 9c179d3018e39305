"""The kernel that ends sums over tokens, under Triton's interpreter, against torch's sum."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from chiar_megatron.operators.kernels.column_sums import column_sums  # noqa: E402


@pytest.mark.parametrize("shape", [(1, 1), (3, 5, 96), (256, 16), (257, 3, 33), (1056, 64), (0, 7), (4, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_agrees_with_torch(shape, dtype):
    partial = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))
    sums = column_sums(partial, dtype)
    assert sums.dtype == dtype and sums.shape == shape[1:]
    bounds = {"rtol": 8e-3, "atol": 1e-3} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-4}
    torch.testing.assert_close(sums.double(), partial.double().sum(0), **bounds)
