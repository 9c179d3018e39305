"""Exact GELU of a biased linear layer; its backward pass sums the bias's gradient on the way.

A compiler reads the layer's largest gradient once more for that sum.
"""

# Kernels are Triton's language, not typed Python.
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,misc"

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, COLS, ROWS_AT_ONCE, WARPS = 256, 256, 16, 8
FORWARD_BLOCK = 4096
ROOT_HALF = tl.constexpr(math.sqrt(0.5))
DENSITY = tl.constexpr(1.0 / math.sqrt(2.0 * math.pi))


def bias_gelu(x_NF: Tensor, bias_F: Tensor) -> Tensor:
    """GELU(x + bias), `[N, F]` in x's dtype, float32 inside; gradients to both. Source: paper, section 3."""
    y: Tensor = _forward_op(x_NF, bias_F)
    return y


@triton.jit
def _forward_kernel(pointers, total, width, BLOCK: tl.constexpr):
    x_ptr, bias_ptr, y_ptr = pointers
    place = tl.cast(tl.program_id(0), tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = place < total
    x = tl.load(x_ptr + place, mask=mask, other=0.0).to(tl.float32)
    x += tl.load(bias_ptr + place % width, mask=mask, other=0.0).to(tl.float32)
    y = 0.5 * x * (1.0 + tl.erf(x * ROOT_HALF))
    tl.store(y_ptr + place, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _backward_kernel(pointers, rows, width, CHUNK: tl.constexpr, AT_ONCE: tl.constexpr, BLOCK: tl.constexpr):
    """CHUNK rows of BLOCK columns: their gradient, and their part of the bias's."""
    grad_ptr, x_ptr, bias_ptr, dx_ptr, partial_ptr = pointers
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    bias = tl.load(bias_ptr + col, mask=col < width, other=0.0).to(tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, CHUNK, AT_ONCE):
        row = tl.program_id(0) * CHUNK + start + tl.arange(0, AT_ONCE)
        place = tl.cast(row, tl.int64)[:, None] * width + col[None, :]
        mask = (row < rows)[:, None] & (col < width)[None, :]
        x = tl.load(x_ptr + place, mask=mask, other=0.0).to(tl.float32) + bias[None, :]
        grad = tl.load(grad_ptr + place, mask=mask, other=0.0).to(tl.float32)
        slope = 0.5 * (1.0 + tl.erf(x * ROOT_HALF)) + x * DENSITY * tl.exp(-0.5 * x * x)
        dx = grad * slope
        tl.store(dx_ptr + place, dx.to(dx_ptr.dtype.element_ty), mask=mask)
        total += tl.sum(dx, 0)
    tl.store(partial_ptr + tl.program_id(0) * width + col, total, mask=col < width)


@torch.library.custom_op("chiar_megatron::bias_gelu", mutates_args=())
def _forward_op(x: Tensor, bias: Tensor) -> Tensor:
    x, bias = x.contiguous(), bias.contiguous()
    y = torch.empty_like(x)
    if x.numel():
        grid = (triton.cdiv(x.numel(), FORWARD_BLOCK),)
        _forward_kernel[grid]((x, bias, y), x.numel(), x.shape[1], FORWARD_BLOCK, num_warps=WARPS)
    return y


@_forward_op.register_fake
def _(x: Tensor, bias: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("chiar_megatron::bias_gelu_backward", mutates_args=())
def _backward_op(grad: Tensor, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    grad, x, bias = grad.contiguous(), x.contiguous(), bias.contiguous()
    rows, width = x.shape
    dx = torch.empty_like(x)
    partial = torch.empty(triton.cdiv(rows, ROWS), width, dtype=torch.float32, device=x.device)
    if x.numel():
        grid = (len(partial), triton.cdiv(width, COLS))
        pointers = (grad, x, bias, dx, partial)
        _backward_kernel[grid](pointers, rows, width, ROWS, ROWS_AT_ONCE, COLS, num_warps=WARPS)
    return dx, partial.sum(0).to(bias.dtype)


@_backward_op.register_fake
def _(grad: Tensor, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), bias.new_empty(bias.shape)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    dx, dbias = _backward_op(grad, *ctx.saved_tensors)
    return dx, dbias


_forward_op.register_autograd(_backward, setup_context=_save)
