"""The kernels of post-norm on CUDA at real sizes, in bf16, against float64 by torch."""

from __future__ import annotations

import os

import pytest
import torch
import torch.nn.functional as F

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET=1: kernels would not run on the device", allow_module_level=True)

from chiar_megatron.operators.kernels.residual_norm import NormParameters, residual_norm
from chiar_megatron.operators.kernels.routed_update import UpdateParameters, routed_update
from chiar_megatron.operators.kernels.select_rows import select_rows
from chiar_megatron.operators.rows import TokenRows, put_rows
from chiar_megatron.operators.spectral_mixing import spectral_mixing

EPS, TOLERANCE = 1e-5, 2e-2  # of the largest element: bf16's rounding, of inputs as of intermediates


def leaf(*shape: int, shift: float = 0.0) -> torch.Tensor:
    return (torch.randn(*shape, device="cuda") + shift).bfloat16().requires_grad_()


def assert_close(leaves, compute, reference):
    exact = [x.detach().double().requires_grad_() for x in leaves]
    out, expected = compute(*leaves), reference(*exact)
    grad = torch.randn(expected.shape, device="cuda").bfloat16()
    found = [out, *torch.autograd.grad(out, leaves, grad)]
    wanted = [expected, *torch.autograd.grad(expected, exact, grad.double())]
    for a, b in zip(found, wanted, strict=True):
        assert a.dtype == torch.bfloat16 and a.shape == b.shape
        assert (a.double() - b).abs().max() < TOLERANCE * max(1.0, b.abs().max().item())


@pytest.mark.parametrize(("n", "h"), [(4099, 96), (4099, 1000), (32768, 1024), (515, 8192)])
def test_dense(n, h):
    torch.manual_seed(h)
    leaves = [leaf(n, h), leaf(n, h), leaf(h), leaf(h, shift=1.0), leaf(h)]

    def compute(x, y, bias, *norm):
        first, second = residual_norm(x, y, bias, NormParameters(*norm, EPS), users=2)
        return first + second

    def reference(x, y, bias, weight, shift):
        return 2 * F.layer_norm(x + y + bias, (h,), weight, shift, EPS)

    assert_close(leaves, compute, reference)


@pytest.mark.parametrize("h", [96, 1000, 1024])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_routed(h, share):
    torch.manual_seed(h)
    n = 4099
    light = torch.rand(n, device="cuda") < share
    capacity = min(n, (int(light.sum()) // 64 + 2) * 64)
    kept, slot, index, rest, counts, _ = select_rows(light, torch.rand(n, device="cuda"), capacity)
    valid = torch.arange(capacity, device="cuda") < counts[0]
    rows = TokenRows(index, valid, slot, kept, rest, counts[1:])
    leaves = [leaf(n, h), leaf(capacity, h), leaf(h, shift=1.0), leaf(h)]
    leaves += [leaf(h, shift=1.0), leaf(h), leaf(h, shift=1.0), leaf(h)]

    def compute(x, attended, filters, bias, *norms):
        both = [NormParameters(*norms[:2], EPS), NormParameters(*norms[2:], EPS)]
        parameters = UpdateParameters(filters, bias, *both)
        return torch.compile(routed_update, dynamic=False)(x, attended, rows, parameters)[0]

    def reference(x, attended, filters, bias, *norms):
        u = x + torch.where(kept[:, None], put_rows(attended + bias, rows), spectral_mixing(x, filters))
        dark, own = (F.layer_norm(u, (h,), *norms[at : at + 2], EPS) for at in (0, 2))
        return torch.where(kept[:, None], own, dark)

    assert_close(leaves, compute, reference)
