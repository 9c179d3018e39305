"""The cross-entropy kernel, under Triton's interpreter, against torch's in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton", reason="Triton is not installed")

from chiar_megatron.operators.kernels import cross_entropy as kernel  # noqa: E402


@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
@pytest.mark.parametrize(("rows", "width", "vocab"), [(5, 64, 61), (3, 300, 300), (1, 128, 2), (0, 64, 61)])
def test_losses_and_gradients(rows, width, vocab, z_loss, monkeypatch):
    monkeypatch.setattr(kernel, "BLOCK", 64)  # several blocks, the last one in part
    torch.manual_seed(rows)
    values = 5.0 * torch.randn(rows, width)
    values[:, vocab:] = 1e4  # padding, which must not count
    labels = torch.randint(vocab, (rows,))
    weight_ce, weight_z = torch.rand(rows), torch.rand(rows)
    leaf = values.clone().requires_grad_()
    loss, z = kernel.cross_entropy(leaf * 1.0, labels, vocab, z_loss)
    ((loss * weight_ce).sum() + (z * weight_z).sum()).backward()
    exact = values[:, :vocab].double().requires_grad_()
    expected = F.cross_entropy(exact, labels, reduction="none")
    expected_z = z_loss * exact.logsumexp(-1).square()
    ((expected * weight_ce).sum() + (expected_z * weight_z).sum()).backward()
    torch.testing.assert_close(loss.double(), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(z.double(), expected_z, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(leaf.grad[:, :vocab].double(), exact.grad, atol=1e-5, rtol=1e-5)
    assert not leaf.grad[:, vocab:].any()
