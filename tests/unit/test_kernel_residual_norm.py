"""The kernels of post-norm, under Triton's interpreter, against torch's norms and the plain operators."""

from __future__ import annotations

import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton", reason="Triton is not installed")

from chiar_megatron.operators.kernels import residual_norm as kernel  # noqa: E402
from chiar_megatron.operators.kernels.routed_update import UpdateParameters, routed_update  # noqa: E402
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
    grads = [torch.randn(e.shape, generator=torch.Generator().manual_seed(i)) for i, e in enumerate(expected)]
    used = [x for x in leaves if x is not None]
    found = [*actual, *torch.autograd.grad(actual, used, grads)]
    for a, b in zip(found, [*expected, *torch.autograd.grad(expected, used, grads)], strict=True):
        largest = max([1.0, *b.abs().flatten().tolist()])
        torch.testing.assert_close(a, b, atol=tolerance * largest, rtol=0)


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize(("n", "h"), [(0, 64), (1, 64), (7, 96), (130, 1000), (5, 2048)])
def test_dense(n, h, centred):
    x, y = leaf(n, h, seed=1), leaf(n, h, seed=2)
    weight, shift = parameters(h, centred, 3)
    bias = leaf(h, seed=5) if n != 7 else None
    out = kernel.residual_norm(x, y, bias, kernel.NormParameters(weight, shift, EPS))
    expected = norm_of(x + y + (0 if bias is None else bias), weight, shift)
    assert_same(out, [expected], [x, y, weight, shift, bias])


def test_two_users():
    x, y, weight = leaf(9, 96, seed=1), leaf(9, 96, seed=2), leaf(96, seed=3, shift=1.0)
    out = kernel.residual_norm(x, y, None, kernel.NormParameters(weight, None, EPS), users=2)
    assert_same(out, [norm_of(x + y, weight, None)] * 2, [x, y, weight])


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
    bias = leaf(h, seed=8) if n != 9 else None
    both = [kernel.NormParameters(*norm, EPS) for norm in norms]
    users = 1 + (n == 70)
    out = routed_update(x, attended, rows, UpdateParameters(filters, bias, *both), users)
    biased = attended if bias is None else attended + bias
    u = x + torch.where(chosen[:, None], put_rows(biased, rows), spectral_mixing(x, filters))
    expected = torch.where(chosen[:, None], norm_of(u, *norms[1]), norm_of(u, *norms[0]))
    leaves = [x, attended, filters, bias, *norms[0], *norms[1]]
    # The kernel of spectral mixing multiplies bfloat16, whatever the tokens' type.
    assert_same(out, [expected] * users, leaves, tolerance=2e-2)


def test_unused_rows_have_no_gradient_and_ops_keep_their_contract():
    n, h = 6, 64
    chosen = torch.tensor([True, False, True, False, False, True])
    rows = listed(chosen, 5)
    x, attended, filters, bias = (leaf(*shape, seed=len(shape)) for shape in ((n, h), (5, h), (h,), (h,)))
    norms = [kernel.NormParameters(*parameters(h, True, seed), EPS) for seed in (4, 6)]
    (out,) = routed_update(x, attended, rows, UpdateParameters(filters, bias, *norms))
    out.square().sum().backward()
    assert not attended.grad[3:].any() and attended.grad[:3].abs().sum(1).all()
    ops, checks = torch.ops.chiar_megatron, ("test_schema", "test_faketensor")
    x, attended, filters, bias = (t.detach() for t in (x, attended, filters, bias))
    places = [rows.slot_N, rows.has_row_N, rows.index_R, rows.valid_R, rows.rest_N, rows.rest_count]
    four = [p.detach() for norm in norms for p in norm[:2]]
    for op, arguments in [
        (ops.residual_norm, (x, x, bias, *four[:2], EPS)),
        (ops.residual_norm_backward, ([x, x], x, *four[:2], EPS)),
        (ops.routed_update, ([x, attended, filters], places, bias, four, EPS)),
        (ops.routed_update_backward, ([x, x], [x, x, filters], places, four, EPS)),
    ]:
        results = torch.library.opcheck(op, arguments, test_utils=checks)
        assert set(results.values()) == {"SUCCESS"}, results
