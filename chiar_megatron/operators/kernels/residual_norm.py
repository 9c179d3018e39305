"""Post-norm's `N(x + y)`, forward and backward in one pass over memory each.

Where layers are routed, y comes from two places: rows of attention for the light tokens, spectral mixing
for the others, each with a norm of its own. The backward pass hands every row its gradient and sums those
of the norms' parameters on its way, for which a compiler's code reads everything a second time.
"""

# Kernels are Triton's language, not typed Python.
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,misc"

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple, Optional

import torch
import triton
import triton.language as tl
from torch import Tensor

WIDEST = 16384  # elements of a token, padded to a power of two: one program holds them all
# Programs where there are no multiprocessors: the interpreter's few blocks then share programs too.
INTERPRETED_PROGRAMS = 3


class NormParameters(NamedTuple):
    """Of a LayerNorm, or of an RMSNorm (bias None): weight and bias [H], eps."""

    weight: Tensor
    bias: Optional[Tensor]
    eps: float


class Source(NamedTuple):
    """Where tokens find their rows: `TokenRows` without what only others need."""

    slot_N: Tensor
    has_row_N: Tensor
    valid_R: Tensor


class Tuning(NamedTuple):
    """Launch of a kernel: elements a program holds at once, warps per 1024 of them, programs per
    multiprocessor."""

    elements: int
    warps: int
    programs: int


FORWARD, BACKWARD = Tuning(4096, 1, 4), Tuning(2048, 2, 4)


def residual_norm(x_NH: Tensor, y_NH: Tensor, norm: NormParameters) -> Tensor:
    """`N(x + y)`, the sum rounded to x's dtype; gradients to x, y and the norm's parameters."""
    out, _ = _dense_op(x_NH, y_NH, *norm)
    return out  # type: ignore[no-any-return]


def widths_fit(hidden_size: int) -> bool:
    """Whether a token is narrow enough for one program."""
    return bool(triton.next_power_of_2(hidden_size) <= WIDEST)


@triton.jit
def _normalised(u, inside, H: tl.constexpr, eps, CENTRED: tl.constexpr):
    """u [rows, WIDTH] float32, 0 outside: normalised, and the reciprocal deviation [rows, 1]."""
    if CENTRED:
        u = tl.where(inside, u - (tl.sum(u, 1) / H)[:, None], 0.0)
    scale = tl.rsqrt(tl.sum(u * u, 1) / H + eps)[:, None]
    return u * scale, scale


@triton.jit
def _row(pointer, col, H: tl.constexpr):
    return tl.load(pointer + col, mask=col < H, other=0.0).to(tl.float32)


@triton.jit
def norm_forward_kernel(
    tensors, norms, out_tensors, numbers, flags: tl.constexpr, H: tl.constexpr, WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """out = N(u), u = x + y; flags: routed, centred, shifted (norms with a bias)."""
    x_ptr, dark_ptr, light_ptr, slot_ptr, kept_ptr = tensors
    dark_weight, dark_bias, light_weight, light_bias = norms
    out_ptr, u_ptr = out_tensors
    N, eps = numbers
    ROUTED: tl.constexpr = flags[0]
    SHIFTED: tl.constexpr = flags[2]
    col = tl.arange(0, WIDTH)[None, :]
    weight, bias = _row(dark_weight, col, H), 0.0
    if SHIFTED:
        bias = _row(dark_bias, col, H)
    if ROUTED:
        other_weight, other_bias = _row(light_weight, col, H), 0.0
        if SHIFTED:
            other_bias = _row(light_bias, col, H)
    for block in range(tl.program_id(0), tl.cdiv(N, ROWS), tl.num_programs(0)):
        token = (block * ROWS + tl.arange(0, ROWS))[:, None]
        inside = (token < N) & (col < H)
        place = token.to(tl.int64) * H + col
        x = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32)
        if ROUTED:
            light = tl.load(kept_ptr + token, mask=token < N, other=0) != 0
            slot = tl.load(slot_ptr + token, mask=token < N, other=0).to(tl.int64)
            y = tl.load(dark_ptr + place, mask=inside & ~light, other=0.0).to(tl.float32)
            y += tl.load(light_ptr + slot * H + col, mask=inside & light, other=0.0).to(tl.float32)
        else:
            y = tl.load(dark_ptr + place, mask=inside, other=0.0).to(tl.float32)
        u = (x + y).to(u_ptr.dtype.element_ty)
        tl.store(u_ptr + place, u, mask=inside)
        plain, _ = _normalised(u.to(tl.float32), inside, H, eps, flags[1])
        if ROUTED:
            out = plain * tl.where(light, other_weight, weight) + tl.where(light, other_bias, bias)
        else:
            out = plain * weight + bias
        tl.store(out_ptr + place, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def norm_backward_kernel(
    tensors, norms, out_tensors, numbers, flags: tl.constexpr, H: tl.constexpr, WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """du of all tokens, of the light ones as rows too, and this program's sums of the norms' gradients:
    [programs, 4 or 2, H], weight and bias of the dark tokens' norm, then of the light ones'."""
    grad_ptr, u_ptr, slot_ptr, kept_ptr, valid_ptr = tensors
    dark_weight, light_weight = norms
    du_ptr, rows_ptr, sums_ptr = out_tensors
    N, R, eps = numbers
    ROUTED: tl.constexpr = flags[0]
    CENTRED: tl.constexpr = flags[1]
    col = tl.arange(0, WIDTH)[None, :]
    weight = _row(dark_weight, col, H)
    by_weight, by_bias = tl.zeros((1, WIDTH), tl.float32), tl.zeros((1, WIDTH), tl.float32)
    if ROUTED:
        other_weight = _row(light_weight, col, H)
        light_by_weight, light_by_bias = by_weight, by_bias
    for block in range(tl.program_id(0), tl.cdiv(N, ROWS), tl.num_programs(0)):
        token = (block * ROWS + tl.arange(0, ROWS))[:, None]
        inside = (token < N) & (col < H)
        place = token.to(tl.int64) * H + col
        grad = tl.load(grad_ptr + place, mask=inside, other=0.0).to(tl.float32)
        u = tl.load(u_ptr + place, mask=inside, other=0.0).to(tl.float32)
        plain, scale = _normalised(u, inside, H, eps, CENTRED)
        if ROUTED:
            light = tl.load(kept_ptr + token, mask=token < N, other=0) != 0
            slot = tl.load(slot_ptr + token, mask=token < N, other=0).to(tl.int64)
            weighted = grad * tl.where(light, other_weight, weight)
            light_grad = tl.where(light, grad, 0.0)
            light_by_weight += tl.sum(light_grad * plain, 0)[None, :]
            light_by_bias += tl.sum(light_grad, 0)[None, :]
        else:
            weighted = grad * weight
        # Of all tokens; the light ones' part is taken off at the end.
        by_weight += tl.sum(grad * plain, 0)[None, :]
        by_bias += tl.sum(grad, 0)[None, :]
        du = weighted - plain * (tl.sum(weighted * plain, 1) / H)[:, None]
        if CENTRED:
            du -= (tl.sum(weighted, 1) / H)[:, None]
        du = (du * scale).to(du_ptr.dtype.element_ty)
        tl.store(du_ptr + place, du, mask=inside)
        if ROUTED:
            tl.store(rows_ptr + slot * H + col, du, mask=inside & light)
    sums = sums_ptr + tl.program_id(0) * (4 if ROUTED else 2) * H + col
    if ROUTED:
        by_weight -= light_by_weight
        by_bias -= light_by_bias
        tl.store(sums + 2 * H, light_by_weight, mask=col < H)
        tl.store(sums + 3 * H, light_by_bias, mask=col < H)
        for block in range(tl.program_id(0), tl.cdiv(R, ROWS), tl.num_programs(0)):
            row = (block * ROWS + tl.arange(0, ROWS))[:, None]
            unused = tl.load(valid_ptr + row, mask=row < R, other=1) == 0
            empty = tl.zeros((ROWS, WIDTH), du_ptr.dtype.element_ty)
            tl.store(rows_ptr + row.to(tl.int64) * H + col, empty, mask=unused & (col < H))
    tl.store(sums, by_weight, mask=col < H)
    tl.store(sums + H, by_bias, mask=col < H)


def norm_forward(
    x: Tensor, dark: Tensor, light: Optional[Tensor], source: Optional[Source], norms: list[NormParameters]
) -> tuple[Tensor, Tensor]:
    """(out, u) [N, H] in x's dtype, all tensors contiguous; norms: of the dark, then of the light tokens.

    light [R, H] and source are given together: tokens with a row take it, the others `dark` [N, H].
    """
    out, u = torch.empty_like(x), torch.empty_like(x)
    first, last = norms[0], norms[-1]
    # Triton takes no None inside a tuple of tensors: what a kernel does not use is x.
    rows = (x, x, x) if source is None else (light, source.slot_N, source.has_row_N.view(torch.int8))
    shifts = [x if n.bias is None else n.bias for n in (first, last)]
    grid, options = _launch(x, FORWARD)
    if grid:
        norm_forward_kernel[(grid,)](
            (x, dark, *rows),
            (first.weight, shifts[0], last.weight, shifts[1]),
            (out, u),
            (len(x), first.eps),
            _flags(source, first),
            **options,
        )
    return out, u


def norm_backward(
    grad: Tensor, u: Tensor, source: Optional[Source], norms: list[NormParameters]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients du [N, H], those of the rows [R, H], and float32 [2 a norm, H] of weights and biases."""
    du, first, last = torch.empty_like(u), norms[0], norms[-1]
    R = 0 if source is None else len(source.valid_R)
    rows = u.new_empty(R, u.shape[1])
    grid, options = _launch(u, BACKWARD)
    sums = torch.empty(grid, 2 * len(norms), u.shape[1], dtype=torch.float32, device=u.device)
    places = (u, u, u)
    if source is not None:
        places = (source.slot_N, source.has_row_N.view(torch.int8), source.valid_R.view(torch.int8))
    if grid:
        norm_backward_kernel[(grid,)](
            (grad, u, *places),
            (first.weight, last.weight),
            (du, rows, sums),
            (len(u), R, first.eps),
            _flags(source, first),
            **options,
        )
    return du, rows, sums.sum(0)


def _flags(source: Optional[Source], norm: NormParameters) -> tuple[bool, bool, bool]:
    centred = norm.bias is not None  # LayerNorm has a bias here, RMSNorm none
    return source is not None, centred, centred


def _launch(x: Tensor, tuning: Tuning) -> tuple[int, dict[str, Any]]:
    """Number of programs, and the kernels' constants."""
    width = triton.next_power_of_2(x.shape[1])
    rows = max(1, tuning.elements // width)
    warps = min(16, max(1, triton.next_power_of_2(rows * width // 1024) * tuning.warps))
    most = tuning.programs * _multiprocessors(x.device) if x.is_cuda else INTERPRETED_PROGRAMS
    options = {"H": x.shape[1], "WIDTH": width, "ROWS": rows, "num_warps": warps}
    return min(most, triton.cdiv(len(x), rows)), options


@lru_cache(maxsize=16)
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@torch.library.custom_op("chiar_megatron::residual_norm", mutates_args=())
def _dense_op(
    x: Tensor, y: Tensor, weight: Tensor, bias: Optional[Tensor], eps: float
) -> tuple[Tensor, Tensor]:
    norm = NormParameters(weight, bias, eps)
    return norm_forward(x.contiguous(), y.contiguous(), None, None, [norm])


@torch.library.custom_op("chiar_megatron::residual_norm_backward", mutates_args=())
def _dense_backward_op(
    grad: Tensor, u: Tensor, weight: Tensor, bias: Optional[Tensor], eps: float
) -> tuple[Tensor, Tensor]:
    du, _, sums = norm_backward(grad.contiguous(), u, None, [NormParameters(weight, bias, eps)])
    return du, sums


@_dense_op.register_fake
def _(x: Tensor, y: Tensor, weight: Tensor, bias: Any, eps: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape)


@_dense_backward_op.register_fake
def _(grad: Tensor, u: Tensor, weight: Tensor, bias: Any, eps: float) -> tuple[Tensor, Tensor]:
    return u.new_empty(u.shape), u.new_empty(2, u.shape[1], dtype=torch.float32)


def _save_dense(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, _, weight, bias, ctx.eps = inputs
    ctx.save_for_backward(output[1], weight, bias)


def _dense_grads(ctx: Any, grad: Tensor, _: Any) -> tuple[Optional[Tensor], ...]:
    u, weight, bias = ctx.saved_tensors
    du, sums = _dense_backward_op(grad, u, weight, bias, ctx.eps)
    return du, du, *parameter_grads(sums, weight, bias), None


def parameter_grads(sums: Tensor, weight: Tensor, bias: Optional[Tensor]) -> tuple[Tensor, Optional[Tensor]]:
    """Of weight and bias, in their dtype, from the two lines [2, H] that `norm_backward` gives a norm."""
    return sums[0].to(weight.dtype), None if bias is None else sums[1].to(bias.dtype)


_dense_op.register_autograd(_dense_grads, setup_context=_save_dense)
