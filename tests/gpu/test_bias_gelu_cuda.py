"""The kernels of GELU on CUDA at real sizes, in bf16, against float64 by torch."""

from __future__ import annotations

import os

import pytest
import torch
import torch.nn.functional as F

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET=1: kernels would not run on the device", allow_module_level=True)

from chiar_megatron.operators.kernels.bias_gelu import bias_gelu


@pytest.mark.parametrize(("n", "f"), [(32768, 4096), (4099, 1000), (515, 96)])
def test_agrees_with_float64(n, f):
    torch.manual_seed(f)
    x = (3 * torch.randn(n, f, device="cuda")).bfloat16().requires_grad_()
    bias = torch.randn(f, device="cuda").bfloat16().requires_grad_()
    grad = torch.randn(n, f, device="cuda").bfloat16()
    exact = [leaf.detach().double().requires_grad_() for leaf in (x, bias)]
    expected = F.gelu(exact[0] + exact[1])
    wanted = [expected, *torch.autograd.grad(expected, exact, grad.double())]
    for compute in (bias_gelu, torch.compile(bias_gelu, fullgraph=True, dynamic=False)):
        y = compute(x, bias)
        found = [y, *torch.autograd.grad(y, (x, bias), grad)]
        for a, b in zip(found, wanted, strict=True):
            # Half an ulp of bfloat16, and what is below float32's reach.
            assert ((a.double() - b).abs() <= b.abs() / 256 + 1e-6 * n**0.5).all()
