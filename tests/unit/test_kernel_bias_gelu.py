"""The kernels of GELU, under Triton's interpreter, against torch's in float64."""

from __future__ import annotations

import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton", reason="Triton is not installed")

from chiar_megatron.operators.kernels.bias_gelu import bias_gelu  # noqa: E402


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize(("n", "f"), [(0, 64), (1, 96), (65, 1000), (70, 258)])
def test_agrees_with_torch(n, f, biased):
    torch.manual_seed(n + f)
    x = (4 * torch.randn(n, f)).requires_grad_()
    leaves = [x, torch.randn(f, requires_grad=True)] if biased else [x]
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    y, expected = bias_gelu(x, *(leaves[1:] or [None])), F.gelu(sum(exact))
    grad = torch.randn(n, f)
    found = [y, *torch.autograd.grad(y, leaves, grad)]
    wanted = [expected, *torch.autograd.grad(expected, exact, grad.double())]
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a.double(), b, atol=2e-6 * max(1, n) ** 0.5, rtol=1e-6)


def test_tails_and_nan():
    x = torch.tensor([[-30.0, -6.0, -0.0, 0.0, 6.0, 30.0, torch.nan]], requires_grad=True)
    y = bias_gelu(x, None)
    y.sum().backward()
    torch.testing.assert_close(y, F.gelu(x), atol=1e-6, rtol=0, equal_nan=True)
    assert x.grad[0, :6].isfinite().all() and x.grad[0, -1].isnan()
    assert y[0, 1] < 0  # the tail keeps its sign: it is not 1 - 1
