"""The rotary kernels, under Triton's interpreter, against the plain PyTorch they replace."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from chiar_megatron.operators import rotary as plain  # noqa: E402
from chiar_megatron.operators.kernels import rotary as kernel  # noqa: E402


@pytest.mark.parametrize(
    ("b", "s", "g", "r", "d"), [(2, 70, 3, 1, 16), (1, 5, 2, 2, 6), (3, 64, 1, 0, 8), (2, 1, 2, 3, 40)]
)
def test_agrees_with_plain_pytorch(b, s, g, r, d):
    torch.manual_seed(0)
    wide = torch.randn(s, b, g, r + 2, d + 4)  # strides of another order
    grouped = wide[..., :d].transpose(0, 1)
    angle = torch.randn(s, d // 2)
    cos, sin = angle.cos(), angle.sin()
    query, key, value = plain.split_and_rotate(grouped.clone().requires_grad_(), cos[:, None], sin[:, None])
    found = kernel.split_and_rotate(grouped, cos, sin)
    torch.testing.assert_close(found, (query.detach(), key.detach()))
    grads = [torch.randn_like(x.transpose(1, 2)).transpose(1, 2) for x in (query, key, value)]
    expected = plain.join_rotated_back(*grads, cos[:, None], sin[:, None])
    joined, none = kernel.join_rotated_back(grads, cos, sin, None)
    assert none is None
    torch.testing.assert_close(joined, expected)
    bias = torch.empty(g * (r + 2) * d, dtype=torch.float64)
    joined, of_bias = kernel.join_rotated_back(grads, cos, sin, bias)
    torch.testing.assert_close(joined, expected)
    torch.testing.assert_close(of_bias, expected.sum((0, 1)).flatten().double(), atol=1e-4, rtol=1e-5)
