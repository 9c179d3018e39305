"""The kernels of post-norm, under Triton's interpreter, against torch's norms and the plain operators."""

from __future__ import annotations

import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton", reason="Triton is not installed")

from chiar_megatron.operators.kernels import residual_norm as kernel  # noqa: E402
from chiar_megatron.operators.kernels.routed_update import routed_update  # noqa: E402
from chiar_megatron.operators.rows import TokenRows, put_rows, rows_of  # noqa: E402
from chiar_megatron.operators.spectral_mixing import spectral_mixing  # noqa: E402

EPS = 1e-5


def leaf(*shape: int, seed: int, shift: float = 0.0) -> torch.Tensor:
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) + shift
    return values.requires_grad_()


def norm_of(u, weight, bias):
    if bias is None:
        return F.rms_norm(u, weight.shape, weight, EPS)
    return F.layer_norm(u, weight.shape, weight, bias, EPS)


def parameters(h: int, centred: bool, seed: int) -> list[torch.Tensor | None]:
    return [leaf(h, seed=seed, shift=1.0), leaf(h, seed=seed + 1) if centred else None]


def assert_same(actual, expected, leaves, tolerance=1e-5):
    grad = torch.randn(expected.shape, generator=torch.Generator().manual_seed(9))
    used = [x for x in leaves if x is not None]
    for a, b in zip(
        [actual, *torch.autograd.grad(actual, used, grad)],
        [expected, *torch.autograd.grad(expected, used, grad)],
        strict=True,
    ):
        largest = max([1.0, *b.abs().flatten().tolist()])
        torch.testing.assert_close(a, b, atol=tolerance * largest, rtol=0)


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize(("n", "h"), [(0, 64), (1, 64), (7, 96), (130, 1000), (5, 2048)])
def test_dense(n, h, centred):
    x, y = leaf(n, h, seed=1), leaf(n, h, seed=2)
    weight, bias = parameters(h, centred, 3)
    out = kernel.residual_norm(x, y, kernel.NormParameters(weight, bias, EPS))
    assert_same(out, norm_of(x + y, weight, bias), [x, y, weight, bias])


def listed(chosen: torch.Tensor, capacity: int) -> TokenRows:
    """As the selection kernel gives them, with what it leaves unwritten set to a token that has a row."""
    rows = rows_of(chosen, capacity)
    rest = (~chosen).nonzero().squeeze(1).int()
    unwritten = torch.full((len(chosen) - len(rest),), int(chosen.int().argmax()), dtype=torch.int32)
    count = torch.tensor([len(rest)], dtype=torch.int32)
    return TokenRows(
        rows.index_R, rows.valid_R, rows.slot_N, rows.has_row_N, torch.cat((rest, unwritten)), count
    )


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
@pytest.mark.parametrize(("n", "h"), [(9, 64), (70, 96), (33, 1000)])
def test_routed(n, h, share, centred):
    chosen = torch.rand(n, generator=torch.Generator().manual_seed(n)) < share
    capacity = min(n, int(chosen.sum()) + 3)
    rows = listed(chosen, capacity)
    x, attended, filters = leaf(n, h, seed=1), leaf(capacity, h, seed=2), leaf(h, seed=3)
    norms = [parameters(h, centred, 4), parameters(h, centred, 6)]
    out = routed_update(x, attended, filters, rows, [kernel.NormParameters(*norm, EPS) for norm in norms])
    mixed = spectral_mixing(x, filters)
    u = x + torch.where(chosen[:, None], put_rows(attended, rows), mixed)
    expected = torch.where(chosen[:, None], norm_of(u, *norms[1]), norm_of(u, *norms[0]))
    # The kernel of spectral mixing multiplies bfloat16, whatever the tokens' type.
    assert_same(out, expected, [x, attended, filters, *norms[0], *norms[1]], tolerance=2e-2)


def test_unused_rows_have_no_gradient_and_ops_keep_their_contract():
    n, h = 6, 64
    chosen = torch.tensor([True, False, True, False, False, True])
    rows = listed(chosen, 5)
    x, attended, filters = leaf(n, h, seed=1), leaf(5, h, seed=2), leaf(h, seed=3)
    norms = [kernel.NormParameters(*parameters(h, True, seed), EPS) for seed in (4, 6)]
    out = routed_update(x, attended, filters, rows, norms)
    out.square().sum().backward()
    assert not attended.grad[3:].any() and attended.grad[:3].abs().sum(1).all()
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    dense = (x.detach(), x.detach(), norms[0].weight.detach(), norms[0].bias.detach(), EPS)
    op = torch.ops.chiar_megatron.residual_norm
    assert set(torch.library.opcheck(op, dense, test_utils=checks).values()) == {"SUCCESS"}
    places = [rows.slot_N, rows.has_row_N, rows.valid_R, rows.rest_N, rows.rest_count]
    weights = [p.detach() for p in (filters, norms[0].weight, norms[1].weight)]
    biases = [norm.bias.detach() for norm in norms]
    routed = (x.detach(), attended.detach(), places, weights, *biases, EPS)
    op = torch.ops.chiar_megatron.routed_update
    assert set(torch.library.opcheck(op, routed, test_utils=checks).values()) == {"SUCCESS"}
