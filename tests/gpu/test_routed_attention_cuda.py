"""Routed attention on CUDA at real sizes, against float32 attention with an explicit mask."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="needs triton")
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

T, B = 2048, 2


@pytest.fixture(autouse=True, params=[False, True], ids=["pointers", "tma"])
def compiled_kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):
    # The suite's conftest asks for Triton's interpreter; here the kernels must be compiled ones.
    from chiar_megatron.operators.kernels import routed_attention_tiles as tiles

    if type(tiles.load_tile).__name__ == "InterpretedFunction":
        pytest.skip("triton was imported with TRITON_INTERPRET=1: run tests/gpu with TRITON_INTERPRET=0")
    defaults = {key: replace(tuning, tma=request.param) for key, tuning in tiles.DEFAULTS.items()}
    monkeypatch.setattr(tiles, "DEFAULTS", defaults)


def inputs(n: int, g: int, d: int, rho: float = 0.5, dtype: torch.dtype = torch.bfloat16):
    """q, k, v as views of fused projections, and first, last of random light tokens with padding."""
    generator = torch.Generator("cuda").manual_seed(0)
    light = (torch.rand(B * T, device="cuda", generator=generator) < rho).nonzero().squeeze(1).int()
    padding = 64 + (-light.numel()) % 64
    first = torch.cat((light // T * T, light.new_full((padding,), 1)))
    last = torch.cat((light, light.new_full((padding,), 0)))
    fused_q = torch.randn(first.numel(), n, 2 * d, device="cuda", dtype=dtype, generator=generator)
    fused = torch.randn(B * T, g, 2 * d, device="cuda", dtype=dtype, generator=generator)
    return fused_q[..., :d], fused[..., :d], fused[..., d:], first, last


def attention(
    q: Tensor, k: Tensor, v: Tensor, first: Tensor, last: Tensor, keep: Tensor | None = None
) -> Tensor:
    """The definition in float32."""
    q, k, v = (x.float() for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    key = torch.arange(k.shape[0], device=q.device)
    seen = (key >= first[:, None]) & (key <= last[:, None])
    s = torch.einsum("rnd,knd->nrk", q, k) / q.shape[-1] ** 0.5
    p = torch.softmax(s.masked_fill(~seen, -1e30), -1).masked_fill((last < first)[:, None], 0)
    return torch.einsum("nrk,knd->rnd", p if keep is None else p * keep, v)


def error(found: Tensor, wanted: Tensor) -> float:
    """Relative, in the Euclidean norm."""
    return ((found.float() - wanted.float()).norm() / wanted.float().norm()).item()


def check(
    tensors: list[Tensor], first: Tensor, last: Tensor, function, keep=None, limit: float = 1e-2
) -> None:
    """Output and gradients of `function` against the definition."""
    tensors = [x.detach().requires_grad_() for x in tensors]
    wanted = attention(*tensors, first, last, keep)
    found = function(*tensors, first, last)
    grad = torch.randn_like(found)
    want_grads = torch.autograd.grad(wanted, tensors, grad.float())
    grads = torch.autograd.grad(found, tensors, grad)
    errors = [error(a, b) for a, b in zip((found, *grads), (wanted, *want_grads), strict=True)]
    assert max(errors) < limit, errors
    padding = last < first
    assert (found[padding] == 0).all() and (grads[0][padding] == 0).all()


@pytest.mark.parametrize(
    ("n", "g", "d"), [(4, 4, 64), (4, 2, 128), (2, 1, 40), (2, 2, 16), (2, 1, 96), (2, 1, 256)]
)
def test_light_rows_at_real_sizes(n, g, d):
    from chiar_megatron.operators.kernels.routed_attention import routed_attention

    *tensors, first, last = inputs(n, g, d)
    torch.backends.cuda.matmul.allow_tf32 = False
    check(tensors, first, last, routed_attention)


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float16, 2e-3), (torch.float32, 1e-5)])
def test_other_types(dtype, limit):
    from chiar_megatron.operators.kernels.routed_attention import routed_attention

    *tensors, first, last = inputs(2, 1, 64, dtype=dtype)
    torch.backends.cuda.matmul.allow_tf32 = False
    check(tensors, first, last, routed_attention, limit=limit)


@pytest.mark.parametrize("rho", [0.0, 0.001, 1.0])
def test_few_rows_and_all(rho):
    from chiar_megatron.operators.kernels.routed_attention import routed_attention

    q, k, v, first, last = inputs(2, 2, 64, rho)
    if rho:
        check([q, k, v], first, last, routed_attention)
        return
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    out = routed_attention(q, k, v, first, last)
    out.sum().backward()
    assert all((x == 0).all() for x in (out, q.grad, k.grad, v.grad))


def test_dropout():
    from chiar_megatron.operators.kernels import routed_attention_tiles as tiles
    from chiar_megatron.operators.kernels.routed_attention import routed_attention

    q, k, v, first, last = inputs(2, 1, 64)
    seed = torch.tensor([11], device="cuda")
    keep = tiles.dropout_mask(seed, q.shape[0], 2, B * T, 0.1)
    assert abs(keep.float().mean().item() - 0.9) < 1e-3
    check([q, k, v], first, last, lambda *x: routed_attention(*x, 0.1, seed), keep / 0.9)


def test_gradients_repeat():
    from chiar_megatron.operators.kernels.routed_attention import routed_attention

    *tensors, first, last = inputs(4, 2, 64)
    tensors = [x.detach().requires_grad_() for x in tensors]

    def grads() -> tuple[Tensor, ...]:
        out = routed_attention(*tensors, first, last)
        return torch.autograd.grad(out.square().sum(), tensors)

    assert all(torch.equal(a, b) for _ in range(3) for a, b in zip(grads(), grads(), strict=True))


def test_a_compiled_layer_takes_the_op():
    from chiar_megatron.operators.kernels.routed_attention import routed_attention

    *tensors, first, last = inputs(4, 4, 64)

    def layer(q: Tensor, k: Tensor, v: Tensor, first: Tensor, last: Tensor) -> Tensor:
        return routed_attention(q * 1, k, v, first, last) * 1

    check(tensors, first, last, torch.compile(layer, fullgraph=True))
