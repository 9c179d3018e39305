"""The GELU kernel, under Triton's interpreter, against torch's in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton", reason="Triton is not installed")

from chiar_megatron.operators.kernels import gelu as kernel  # noqa: E402


@pytest.mark.parametrize(("rows", "width"), [(0, 8), (1, 7), (70, 96), (33, 300)])
def test_values_and_gradients(rows, width, monkeypatch):
    monkeypatch.setattr(kernel, "ROWS", 32)
    monkeypatch.setattr(kernel, "COLS", 64)
    torch.manual_seed(width)
    x, bias = (4.0 * torch.randn(rows, width)).requires_grad_(), torch.randn(width).requires_grad_()
    grad = torch.randn(rows, width)
    y = kernel.bias_gelu(x, bias)
    y.backward(grad)
    exact_x, exact_bias = (tensor.detach().double().requires_grad_() for tensor in (x, bias))
    expected = F.gelu(exact_x + exact_bias)
    expected.backward(grad.double())
    for ours, theirs in ((y, expected), (x.grad, exact_x.grad), (bias.grad, exact_bias.grad)):
        torch.testing.assert_close(ours.double(), theirs, atol=2e-5, rtol=1e-5)
