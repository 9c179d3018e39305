"""Attention with its rotation in one, under Triton's interpreter, against the plain PyTorch it replaces."""

from __future__ import annotations

import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from chiar_megatron.operators import routed_attention as plain  # noqa: E402
from chiar_megatron.operators.kernels import rotated_attention as kernel  # noqa: E402


@pytest.mark.parametrize("routed", [False, True])
@pytest.mark.parametrize(("b", "s", "n", "g", "d"), [(2, 70, 4, 2, 16), (1, 33, 3, 3, 6), (2, 5, 2, 1, 40)])
def test_values_and_gradients(b, s, n, g, d, routed):
    generator = torch.Generator().manual_seed(s)
    token = (torch.rand(b * s, generator=generator) < 0.4).nonzero().squeeze(1)
    R = len(token) + 3  # unused rows at the end
    angle = torch.randn(s, d // 2, generator=generator)
    index = torch.cat((token, token.new_zeros(3)))
    first, last = index // s * s, index.clone()
    if routed:
        first, last = torch.searchsorted(token, first), torch.arange(R)
    first[len(token) :], last[len(token) :] = 0, -1
    angles = both(angle[index % s] if routed else angle)
    K = R if routed else b * s
    q = torch.randn(R, n, d, generator=generator, requires_grad=True)
    kv = torch.randn(K, g, 2, d, generator=generator, requires_grad=True)
    ranges = first.int(), last.int()
    grad = torch.randn(R, n, d, generator=generator)
    found = kernel.rotated_attention(q, kv, angles, ranges)
    expected = plain.rotated_attention(q, kv, angles, ranges)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    found, expected = (torch.autograd.grad(out, (q, kv), grad) for out in (found, expected))
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)
    bias = torch.zeros((n + 2 * g) * d, requires_grad=True)
    for dropout in ((), (0.3, torch.tensor([5]))):
        out = kernel.rotated_attention(q, kv, angles, ranges, *dropout)
        expected = torch.autograd.grad(out, (q, kv), grad)
        out = kernel.rotated_attention(q, kv, angles, ranges, *dropout, bias=bias)
        dq, dkv, of_bias = torch.autograd.grad(out, (q, kv, bias), grad)
        assert torch.equal(dq, expected[0]) and torch.equal(dkv, expected[1])
        by_group = torch.cat((dq.sum(0).view(g, -1), dkv.sum(0).view(g, -1)), dim=1)
        torch.testing.assert_close(of_bias, by_group.flatten(), atol=5e-5, rtol=1e-5)


def both(angle):
    return angle.cos(), angle.sin()


def test_ops_keep_their_contract():
    q, kv = torch.randn(3, 2, 8), torch.randn(4, 1, 2, 8)
    table = torch.rand(4, 4)
    ranges = [torch.tensor([0, 0, 0], dtype=torch.int32), torch.tensor([1, 3, -1], dtype=torch.int32)]
    angles = [table, table]
    ops, checks = torch.ops.chiar_megatron, ("test_schema", "test_faketensor")
    saved = ops.rotated_attention(q, kv, ranges, angles, None, 0.0)
    for op, arguments in [
        (ops.rotated_attention, (q, kv, ranges, angles, None, 0.0)),
        (ops.rotated_attention_backward, (q, kv, list(saved), ranges, angles, None, 0.0, None)),
        (ops.rotated_attention_backward, (q, kv, list(saved), ranges, angles, None, 0.0, torch.ones(32))),
    ]:
        results = torch.library.opcheck(op, arguments, test_utils=checks)
        assert set(results.values()) == {"SUCCESS"}, results
