"""Post-norm's `N(x + y + bias)`, forward and backward in one pass over memory each.

Where layers are routed, y comes from two places: rows of attention for the light tokens, spectral mixing
for the others, each with a norm of its own. The backward pass adds the gradients of two users of the
output, hands every row its own, and sums those of the norms' parameters and of the bias on its way, for
which a compiler's code reads everything again.
"""

# Kernels are Triton's language, not typed Python.
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,misc"

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple, Optional

import torch
import triton
import triton.language as tl
from torch import Tensor

from chiar_megatron.operators.kernels.column_sums import add_pairs, column_sums

WIDEST = 16384  # elements of a token, padded to a power of two: one program holds them all
# Programs where there are no multiprocessors: the interpreter's few blocks then share programs too.
INTERPRETED_PROGRAMS = 3


class NormParameters(NamedTuple):
    """Of a LayerNorm, or of an RMSNorm (bias None): weight and bias [H], eps."""

    weight: Tensor
    bias: Optional[Tensor]
    eps: float


class Source(NamedTuple):
    """Where tokens find their rows, and which tokens there are of either kind: from `TokenRows`."""

    slot_N: Tensor
    has_row_N: Tensor
    index_R: Tensor
    valid_R: Tensor
    rest_N: Tensor
    rest_count: Tensor


class Tuning(NamedTuple):
    """Launch of a kernel: elements a program holds at once, warps per 1024 of them, programs per
    multiprocessor."""

    elements: int
    warps: int
    programs: int


# Best of sweeps (bf16, 32768 x 1024) on one H100 and, backward, on one H200.
FORWARD, BACKWARD = Tuning(1024, 1, 16), Tuning(1024, 1, 8)


def residual_norm(
    x_NH: Tensor, y_NH: Tensor, bias_H: Optional[Tensor], norm: NormParameters, users: int = 1
) -> tuple[Tensor, ...]:
    """`N(x + y + bias)`, once for each of 1 or 2 users, whose gradients are added on the way.

    The sum is rounded to x's dtype. Gradients to x, y, the bias and the norm's parameters.
    """
    return _ResidualNorm.apply(users, x_NH, y_NH, bias_H, *norm)  # type: ignore[no-any-return]


def for_users(out: Tensor, users: int) -> tuple[Tensor, ...]:
    """The same values as tensors of their own, as an autograd function has to return them."""
    return (out, out.view_as(out))[:users]


def contiguous_grads(grads: Sequence[Tensor]) -> list[Tensor]:
    """Of one or two users, as the kernel reads them."""
    return [grad.contiguous() for grad in grads]


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
def _row(pointer, col, H: tl.constexpr, HERE: tl.constexpr):
    """A vector [1, WIDTH] as float32; 0 where there is none."""
    if HERE:
        return tl.load(pointer + col, mask=col < H, other=0.0).to(tl.float32)
    else:
        return tl.zeros(col.shape, tl.float32)


@triton.jit
def norm_forward_kernel(
    tensors, norms, out_tensors, numbers, flags: tl.constexpr, H: tl.constexpr, WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """out = N(u), u = x + y + bias, the bias of a routed layer only where attention is; flags by `_flags`."""
    x_ptr, dark_ptr, bias_ptr, light_ptr, slot_ptr, kept_ptr = tensors
    dark_weight, dark_shift, light_weight, light_shift = norms
    out_ptr, u_ptr = out_tensors
    N, eps = numbers
    ROUTED: tl.constexpr = flags[0]
    CENTRED: tl.constexpr = flags[1]
    BIASED: tl.constexpr = flags[2]
    col = tl.arange(0, WIDTH)[None, :]
    weight, shift = _row(dark_weight, col, H, True), _row(dark_shift, col, H, CENTRED)
    bias = _row(bias_ptr, col, H, BIASED)
    if ROUTED:
        other_weight, other_shift = _row(light_weight, col, H, True), _row(light_shift, col, H, CENTRED)
    for block in range(tl.program_id(0), tl.cdiv(N, ROWS), tl.num_programs(0)):
        token = (block * ROWS + tl.arange(0, ROWS))[:, None]
        inside = (token < N) & (col < H)
        place = token.to(tl.int64) * H + col
        u = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32)
        if ROUTED:
            light = tl.load(kept_ptr + token, mask=token < N, other=0) != 0
            slot = tl.load(slot_ptr + token, mask=token < N, other=0).to(tl.int64)
            u += tl.load(dark_ptr + place, mask=inside & ~light, other=0.0).to(tl.float32)
            u += tl.load(light_ptr + slot * H + col, mask=inside & light, other=0.0).to(tl.float32)
            u += tl.where(light, bias, 0.0)
        else:
            u += tl.load(dark_ptr + place, mask=inside, other=0.0).to(tl.float32) + bias
        rounded = u.to(u_ptr.dtype.element_ty)
        tl.store(u_ptr + place, rounded, mask=inside)
        plain, _ = _normalised(rounded.to(tl.float32), inside, H, eps, CENTRED)
        if ROUTED:
            out = plain * tl.where(light, other_weight, weight) + tl.where(light, other_shift, shift)
        else:
            out = plain * weight + shift
        tl.store(out_ptr + place, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _token_gradient(tensors, token, here, weight, eps, flags: tl.constexpr, H: tl.constexpr,
                    WIDTH: tl.constexpr):  # fmt: skip
    """Of some tokens [rows, 1], where `here`: du, the output's gradient, the normalised sum, all
    [rows, WIDTH] float32, and where in memory they are."""
    grad_ptr, more_ptr, u_ptr = tensors
    CENTRED: tl.constexpr = flags[1]
    TWICE: tl.constexpr = flags[3]
    col = tl.arange(0, WIDTH)[None, :]
    inside = here & (col < H)
    place = token.to(tl.int64) * H + col
    grad = tl.load(grad_ptr + place, mask=inside, other=0.0).to(tl.float32)
    if TWICE:
        grad += tl.load(more_ptr + place, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(u_ptr + place, mask=inside, other=0.0).to(tl.float32)
    plain, scale = _normalised(u, inside, H, eps, CENTRED)
    weighted = grad * weight
    if CENTRED:
        along, total = tl.reduce((weighted * plain, weighted), 1, add_pairs)
        du = weighted - plain * (along / H)[:, None] - (total / H)[:, None]
    else:
        du = weighted - plain * (tl.sum(weighted * plain, 1) / H)[:, None]
    return tl.where(inside, du * scale, 0.0), grad, plain, place


@triton.jit
def norm_backward_kernel(
    tensors, norms, out_tensors, numbers, flags: tl.constexpr, H: tl.constexpr, WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """du of all tokens, of the light ones as rows too, and this program's sums [programs, 3 or 5, H]: the
    gradients of weight and shift of the dark tokens' norm, those of the light ones', of the bias.

    Routed, it goes through the dark tokens and then through the rows: sums of one kind at a time, which
    registers can hold.
    """
    gradient = tensors[:3]
    index_ptr, valid_ptr, rest_ptr, count_ptr = tensors[3:]
    du_ptr, rows_ptr, sums_ptr = out_tensors
    N, R, eps = numbers
    ROUTED: tl.constexpr = flags[0]
    LINES: tl.constexpr = 5 if ROUTED else 3
    col = tl.arange(0, WIDTH)[None, :]
    weight = _row(norms[0], col, H, True)
    by_weight = tl.zeros((1, WIDTH), tl.float32)
    by_shift, by_bias = by_weight, by_weight
    if ROUTED:
        N = tl.load(count_ptr)
    for block in range(tl.program_id(0), tl.cdiv(N, ROWS), tl.num_programs(0)):
        token = (block * ROWS + tl.arange(0, ROWS))[:, None]
        here = token < N
        if ROUTED:
            token = tl.load(rest_ptr + token, mask=here, other=0)
        du, grad, plain, place = _token_gradient(gradient, token, here, weight, eps, flags, H, WIDTH)
        tl.store(du_ptr + place, du.to(du_ptr.dtype.element_ty), mask=here & (col < H))
        by_weight += tl.sum(grad * plain, 0)[None, :]
        by_shift += tl.sum(grad, 0)[None, :]
        if not ROUTED:
            by_bias += tl.sum(du, 0)[None, :]
    sums = sums_ptr + tl.program_id(0) * LINES * H + col
    tl.store(sums, by_weight, mask=col < H)
    tl.store(sums + H, by_shift, mask=col < H)
    if ROUTED:
        weight = _row(norms[1], col, H, True)
        by_weight = tl.zeros((1, WIDTH), tl.float32)
        by_shift, by_bias = by_weight, by_weight
        for block in range(tl.program_id(0), tl.cdiv(R, ROWS), tl.num_programs(0)):
            row = (block * ROWS + tl.arange(0, ROWS))[:, None]
            used = tl.load(valid_ptr + row, mask=row < R, other=0) != 0
            token = tl.load(index_ptr + row, mask=used, other=0)
            du, grad, plain, place = _token_gradient(gradient, token, used, weight, eps, flags, H, WIDTH)
            rounded = du.to(du_ptr.dtype.element_ty)
            tl.store(du_ptr + place, rounded, mask=used & (col < H))
            tl.store(rows_ptr + row.to(tl.int64) * H + col, rounded, mask=(row < R) & (col < H))
            by_weight += tl.sum(grad * plain, 0)[None, :]
            by_shift += tl.sum(grad, 0)[None, :]
            by_bias += tl.sum(du, 0)[None, :]
        tl.store(sums + 2 * H, by_weight, mask=col < H)
        tl.store(sums + 3 * H, by_shift, mask=col < H)
    tl.store(sums + (LINES - 1) * H, by_bias, mask=col < H)


def norm_forward(
    tensors: tuple[Tensor, Tensor, Optional[Tensor]],
    light: Optional[Tensor],
    source: Optional[Source],
    norms: list[NormParameters],
) -> tuple[Tensor, Tensor]:
    """(out, u) [N, H] in x's dtype; tensors: x and y [N, H], contiguous, bias [H] or None.

    light [R, H] and source are given together: tokens with a row take it and the bias, the others y alone.
    norms: of the tokens without a row, then of those with one.
    """
    x, y, bias = tensors
    out, u, first, last = torch.empty_like(x), torch.empty_like(x), norms[0], norms[-1]
    # Triton takes no None inside a tuple of tensors: what a kernel does not use is x.
    rows = (x, x, x) if source is None else (light, source.slot_N, source.has_row_N.view(torch.int8))
    shifts = [x if n.bias is None else n.bias for n in (first, last)]
    programs, options = _launch(x, FORWARD)
    if programs:
        norm_forward_kernel[(programs,)](
            (x, y, x if bias is None else bias, *rows),
            (first.weight, shifts[0], last.weight, shifts[1]),
            (out, u),
            (len(x), first.eps),
            _flags(source, first, bias, 1),
            **options,
        )
    return out, u


def norm_backward(
    grads: Sequence[Tensor], u: Tensor, source: Optional[Source], norms: list[NormParameters]
) -> tuple[Tensor, Tensor, Tensor]:
    """du [N, H], the same as rows [R, H], and the sums [2 a norm and 1, H] in the parameters' dtype; grads:
    of one user of the output or of two, contiguous."""
    du, first, last = torch.empty_like(u), norms[0], norms[-1]
    R = 0 if source is None else len(source.valid_R)
    rows = u.new_empty(R, u.shape[1])
    programs, options = _launch(u, BACKWARD)
    sums = torch.empty(programs, 2 * len(norms) + 1, u.shape[1], dtype=torch.float32, device=u.device)
    places = (u, u, u, u)
    if source is not None:
        places = (source.index_R, source.valid_R.view(torch.int8), source.rest_N, source.rest_count)
    if programs:
        norm_backward_kernel[(programs,)](
            (grads[0], grads[-1], u, *places),
            (first.weight, last.weight),
            (du, rows, sums),
            (len(u), R, first.eps),
            _flags(source, first, None, len(grads)),
            **options,
        )
    return du, rows, column_sums(sums, first.weight.dtype)


def _flags(
    source: Optional[Source], norm: NormParameters, bias: Optional[Tensor], users: int
) -> tuple[bool, ...]:
    """Routed; centred and shifted (a LayerNorm has a bias here, an RMSNorm none); biased; two gradients."""
    return source is not None, norm.bias is not None, bias is not None, users == 2


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
def _forward_op(
    x: Tensor, y: Tensor, bias: Optional[Tensor], weight: Tensor, shift: Optional[Tensor], eps: float
) -> tuple[Tensor, Tensor]:
    norm = NormParameters(weight, shift, eps)
    return norm_forward((x.contiguous(), y.contiguous(), bias), None, None, [norm])


@torch.library.custom_op("chiar_megatron::residual_norm_backward", mutates_args=())
def _backward_op(
    grads: Sequence[Tensor], u: Tensor, weight: Tensor, shift: Optional[Tensor], eps: float
) -> tuple[Tensor, Tensor]:
    norm = NormParameters(weight, shift, eps)
    du, _, sums = norm_backward(contiguous_grads(grads), u, None, [norm])
    return du, sums


@_forward_op.register_fake
def _(x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape)


@_backward_op.register_fake
def _(grads: Sequence[Tensor], u: Tensor, weight: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return u.new_empty(u.shape), weight.new_empty(3, u.shape[1])


class _ResidualNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, users: int, x: Tensor, y: Tensor, bias: Optional[Tensor], *norm: Any) -> Any:
        out, u = _forward_op(x, y, bias, *norm)
        weight, shift, ctx.eps = norm
        ctx.save_for_backward(u, weight, shift, bias)
        return for_users(out, users)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Optional[Tensor], ...]:
        u, weight, shift, bias = ctx.saved_tensors
        du, sums = _backward_op(grads, u, weight, shift, ctx.eps)
        return None, du, du, like(sums[2], bias), like(sums[0], weight), like(sums[1], shift), None


def like(sums_H: Tensor, parameter: Optional[Tensor]) -> Optional[Tensor]:
    """A gradient in its parameter's dtype; None where there is no parameter."""
    return None if parameter is None else sums_H.to(parameter.dtype)
