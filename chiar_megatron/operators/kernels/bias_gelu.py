"""`gelu(x + bias)` forward and backward in one pass over memory each, the bias's gradient included.

Exact GELU, `x Φ(x)`. Torch's erf takes about 40 instructions an element, which on Hopper lasts longer than
reading and writing it; here the normal distribution's tail is 7.1.26 of Abramowitz and Stegun (absolute error
7.5e-8), whose one exponential is also the derivative's density: 16 instructions forward, 22 backward.
"""

# Kernels are Triton's language, not typed Python.
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,misc"

from __future__ import annotations

from typing import Any, Optional

import torch
import triton
import triton.language as tl
from torch import Tensor

from chiar_megatron.operators.kernels.column_sums import column_sums

# Best of a sweep on one H200 (bf16, 32768 x 4096).
COLS, FORWARD_ROWS, BACKWARD_ROWS = 1024, 8, 2  # of a tile
BLOCKS = 2  # tiles, one below the other, of a program of the forward pass
CHUNKS = 256  # of the rows in the backward pass, each with sums of its own


def bias_gelu(x_NF: Tensor, bias_F: Optional[Tensor]) -> Tensor:
    """`gelu(x + bias)`, the sum in float32; y_NF in x's dtype. Gradients to both."""
    return _BiasGelu.apply(x_NF, bias_F)  # type: ignore[no-any-return]


@triton.jit
def _share_and_bell(u, COMPILED: tl.constexpr):
    """Φ(-|u|) / exp(-u²/2), and exp(-u²/2)."""
    denominator = 1.0 + 0.23164189 * tl.abs(u)
    if COMPILED:  # one instruction; Triton's division takes care of the largest and smallest numbers too
        t = tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [denominator], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        t = 1.0 / denominator
    bell = tl.exp2(u * u * -0.7213475204)
    series = 0.7107068705 + t * (-0.7265760135 + t * 0.5307027145)
    return t * (0.127414796 + t * (-0.142248368 + t * series)), bell


@triton.jit
def _forward_kernel(tensors, N, F, BIASED: tl.constexpr, COMPILED: tl.constexpr, ROWS: tl.constexpr,
                    COLS: tl.constexpr, BLOCKS: tl.constexpr):  # fmt: skip
    x_ptr, bias_ptr, y_ptr = tensors
    col = tl.program_id(0) * COLS + tl.arange(0, COLS)[None, :]
    bias = tl.load(bias_ptr + col, mask=col < F, other=0.0).to(tl.float32) if BIASED else 0.0
    for block in range(BLOCKS):
        row = (tl.program_id(1) * BLOCKS + block) * ROWS + tl.arange(0, ROWS)[:, None]
        inside = (row < N) & (col < F)
        place = row.to(tl.int64) * F + col
        u = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32) + bias
        share, bell = _share_and_bell(u, COMPILED)
        y = tl.maximum(u, 0.0) - tl.abs(u) * (share * bell)  # u Φ(u), and Φ(u) = 1 - Φ(-u)
        tl.store(y_ptr + place, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _backward_kernel(tensors, N, F, BIASED: tl.constexpr, COMPILED: tl.constexpr, ROWS: tl.constexpr,
                     COLS: tl.constexpr):  # fmt: skip
    """dx, and the sums of its columns over this program's rows [chunks, F]."""
    grad_ptr, x_ptr, bias_ptr, dx_ptr, sums_ptr = tensors
    col = tl.program_id(0) * COLS + tl.arange(0, COLS)[None, :]
    bias = tl.load(bias_ptr + col, mask=col < F, other=0.0).to(tl.float32) if BIASED else 0.0
    sums = tl.zeros((ROWS, COLS), tl.float32)
    for block in range(tl.program_id(1), tl.cdiv(N, ROWS), tl.num_programs(1)):
        row = block * ROWS + tl.arange(0, ROWS)[:, None]
        inside = (row < N) & (col < F)
        place = row.to(tl.int64) * F + col
        u = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32) + bias
        grad = tl.load(grad_ptr + place, mask=inside, other=0.0).to(tl.float32)
        share, bell = _share_and_bell(u, COMPILED)
        below = bell * (share - 0.3989422804 * tl.abs(u))  # the derivative at -|u|
        dx = grad * tl.where(u < 0, below, 1.0 - below)
        tl.store(dx_ptr + place, dx.to(dx_ptr.dtype.element_ty), mask=inside)
        if BIASED:
            sums += dx
    if BIASED:
        tl.store(sums_ptr + tl.program_id(1) * F + col, tl.sum(sums, 0)[None, :], mask=col < F)


# The interpreter knows no machine instructions.
COMPILED = isinstance(_forward_kernel, triton.JITFunction)


@torch.library.custom_op("chiar_megatron::bias_gelu", mutates_args=())
def _forward_op(x: Tensor, bias: Optional[Tensor]) -> Tensor:
    x, y = x.contiguous(), torch.empty(x.shape, dtype=x.dtype, device=x.device)
    n, f = x.shape
    if x.numel():
        grid = (triton.cdiv(f, COLS), triton.cdiv(n, FORWARD_ROWS * BLOCKS))
        tensors = (x, x if bias is None else bias, y)
        _forward_kernel[grid](
            tensors, n, f, bias is not None, COMPILED, FORWARD_ROWS, COLS, BLOCKS, num_warps=4
        )
    return y


@torch.library.custom_op("chiar_megatron::bias_gelu_backward", mutates_args=())
def _backward_op(grad: Tensor, x: Tensor, bias: Optional[Tensor]) -> tuple[Tensor, Tensor]:
    """Gradients to x and to the bias (without one: empty)."""
    grad, x = grad.contiguous(), x.contiguous()
    n, f = x.shape
    chunks, biased = min(CHUNKS, triton.cdiv(n, BACKWARD_ROWS)), bias is not None
    dx = torch.empty_like(x)
    sums = torch.empty(chunks, f if biased else 0, dtype=torch.float32, device=x.device)
    if x.numel():
        tensors = (grad, x, bias if biased else x, dx, sums)
        _backward_kernel[triton.cdiv(f, COLS), chunks](
            tensors, n, f, biased, COMPILED, BACKWARD_ROWS, COLS, num_warps=4
        )
    return dx, column_sums(sums, x.dtype if bias is None else bias.dtype)


@_forward_op.register_fake
def _(x: Tensor, bias: Optional[Tensor]) -> Tensor:
    return x.new_empty(x.shape)


@_backward_op.register_fake
def _(grad: Tensor, x: Tensor, bias: Optional[Tensor]) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(0) if bias is None else bias.new_empty(bias.shape)


class _BiasGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Optional[Tensor]) -> Tensor:
        ctx.save_for_backward(x, bias)
        y: Tensor = _forward_op(x, bias)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Optional[Tensor]]:
        x, bias = ctx.saved_tensors
        dx, sums = _backward_op(grad, x, bias)
        return dx, None if bias is None else sums
