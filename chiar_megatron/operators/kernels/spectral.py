"""Spectral entropy and spectral mixing fused, by a factored DCT: the spectrum never goes to memory.

Opaque to torch.compile as `torch.ops.chiar.*`. `spectral_tables` has the mathematics, `spectral_kernels`
the kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor

from chiar_megatron.operators.kernels.column_sums import column_sums
from chiar_megatron.operators.kernels.spectral_kernels import backward_kernel, forward_kernel
from chiar_megatron.operators.kernels.spectral_tables import Dims, dims_of, factorisation, tables_of

__all__ = ["Subset", "Tuning", "entropy_and_mixing", "factorisation", "spectral_entropy", "spectral_mixing"]

OPERAND_DTYPES = {"bf16": torch.bfloat16, "tf32": torch.float32, "ieee": torch.float32}


class Tuning(NamedTuple):
    """Launch of one kernel: warps, load stages, programs per multiprocessor, registers.

    Warps are a power of two. registers limits those of a thread; 0: as many as there are.
    """

    warps: int
    stages: int
    programs: int
    registers: int


class Subset(NamedTuple):
    """Some rows, on the device: the first `used` (int32 [1]) of `rows` (int32, distinct), which are those
    where `chosen` (bool [N]) holds."""

    rows: Tensor
    used: Tensor
    chosen: Tensor


# Best of a sweep on one H200 (bf16, 32768 x 1024), beside large matrix products, which lower its clock.
DEFAULTS = {
    "entropy": Tuning(1, 4, 8, 0),
    "mixing": Tuning(2, 3, 6, 168),
    "mixing_subset": Tuning(2, 3, 6, 168),
    "entropy_and_mixing": Tuning(1, 3, 8, 0),
    "backward": Tuning(2, 3, 4, 0),
    "backward_subset": Tuning(2, 3, 6, 168),
}
SWEPT_TILE = 1024
# Programs where there are no multiprocessors: the interpreter's few blocks then share programs too.
INTERPRETED_PROGRAMS = 3


def spectral_entropy(
    x_NH: Tensor, dc_power_weight: float = 1.0, precision: str = "bf16", tuning: Optional[Tuning] = None
) -> Tensor:
    """Normalised spectral entropy of each row, H_N in float32; no gradient.

    x_NH: bfloat16 or float32, any row stride. precision: of the products, "bf16", "tf32" or "ieee"
    (float32). NaN in a row gives NaN. Raises ValueError for a width without `factorisation`.
    """
    entropy: Tensor = _entropy_op(x_NH.detach(), dc_power_weight, precision, tuning)
    return entropy


def spectral_mixing(
    x_NH: Tensor,
    w_H: Tensor,
    subset: Optional[Subset] = None,
    precision: str = "bf16",
    tuning: Optional[Tuning] = None,
) -> Tensor:
    """Filter each row's spectrum, `y = Cᵀ diag(w) C x`; y_NH in x's dtype. Gradients to x and w.

    subset: only these rows are transformed; the others of y, and of the gradient to x, are 0. Otherwise
    as in `spectral_entropy`.
    """
    rows, used, chosen = (None, None, None) if subset is None else subset
    y: Tensor = _mixing_op(x_NH, w_H, rows, used, chosen, precision, tuning)
    return _only(chosen, y)


def _only(chosen_N: Optional[Tensor], y_NH: Tensor) -> Tensor:
    """0 for rows that the kernel has not written: a compiler makes it part of what comes next, where a fill
    before the kernel would be one more pass over memory."""
    return y_NH if chosen_N is None else torch.where(chosen_N[:, None], y_NH, 0)


def entropy_and_mixing(
    x_NH: Tensor,
    w_H: Tensor,
    dc_power_weight: float = 1.0,
    precision: str = "bf16",
    tuning: Optional[Tuning] = None,
) -> tuple[Tensor, Tensor]:
    """(`spectral_entropy`, `spectral_mixing`) of all rows in one pass; H_N carries no gradient."""
    entropy, y = _both_op(x_NH, w_H, dc_power_weight, precision, tuning)
    return entropy.detach(), y


@torch.library.custom_op("chiar::spectral_entropy", mutates_args=())
def _entropy_op(x: Tensor, dc_power_weight: float, precision: str, tuning: Optional[Sequence[int]]) -> Tensor:
    x = _row_major(x)
    entropy = torch.empty(len(x), dtype=torch.float32, device=x.device)
    launch = _Launch("entropy", x, precision, tuning)
    # Triton takes no None inside a tuple of tensors: what a kernel does not use is x.
    launch.forward((x, x, x, x, entropy, x), dc_power_weight, (True, False, False))
    return entropy


@torch.library.custom_op("chiar::spectral_mixing", mutates_args=())
def _mixing_op(
    x: Tensor,
    w: Tensor,
    rows: Optional[Tensor],
    count: Optional[Tensor],
    chosen: Optional[Tensor],
    precision: str,
    tuning: Optional[Sequence[int]],
) -> Tensor:
    return mix(x, w, rows, count, precision, tuning)


@torch.library.custom_op("chiar::entropy_and_mixing", mutates_args=())
def _both_op(
    x: Tensor, w: Tensor, dc_power_weight: float, precision: str, tuning: Optional[Sequence[int]]
) -> tuple[Tensor, Tensor]:
    x = _row_major(x)
    entropy = torch.empty(len(x), dtype=torch.float32, device=x.device)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    launch = _Launch("entropy_and_mixing", x, precision, tuning)
    launch.forward((x, w.contiguous(), x, x, entropy, y), dc_power_weight, (True, True, False))
    return entropy, y


@torch.library.custom_op("chiar::spectral_mixing_backward", mutates_args=())
def mixing_backward_op(
    grad: Tensor,
    x: Tensor,
    w: Tensor,
    rows: Optional[Tensor],
    count: Optional[Tensor],
    precision: str,
    tuning: Optional[Sequence[int]],
) -> tuple[Tensor, Tensor]:
    """Gradients of `spectral_mixing` to x [N, H] and w [H], each in its dtype, from grad [N, H]; rows of
    the first that are not in the subset mean nothing."""
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return dx, mix_backward(_row_major(grad), x, w, (rows, count), dx, precision, tuning)


def mix(
    x: Tensor,
    w: Tensor,
    rows: Optional[Tensor],
    count: Optional[Tensor],
    precision: str = "bf16",
    tuning: Optional[Sequence[int]] = None,
) -> Tensor:
    """`spectral_mixing` without a gradient; rows that are not in the subset are left uninitialised."""
    x = _row_major(x)
    subset = rows is not None
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    launch = _Launch("mixing_subset" if subset else "mixing", x, precision, tuning, rows)
    used = (rows, count) if subset else (x, x)
    launch.forward((x, w.contiguous(), *used, x, y), 1.0, (False, True, subset))
    return y


def mix_backward(
    grad: Tensor,
    x: Tensor,
    w: Tensor,
    subset: tuple[Optional[Tensor], Optional[Tensor]],
    dx: Tensor,
    precision: str = "bf16",
    tuning: Optional[Sequence[int]] = None,
) -> Tensor:
    """Writes the gradient to x into dx [N, H], contiguous; returns that to w, in its dtype.

    subset: rows and their count, or None twice; other rows of dx stay as they are. dx may be grad itself:
    then the gradient is added to it.
    """
    x, rows = _row_major(x), subset[0]
    launch = _Launch("backward" if rows is None else "backward_subset", x, precision, tuning, rows)
    partial = torch.empty(launch.programs, x.shape[1], dtype=torch.float32, device=x.device)
    if launch.programs:
        backward_kernel[(launch.programs,)](
            (grad, x, w.contiguous(), *((x, x) if rows is None else subset), dx, partial),
            *(launch.tables, (len(x), grad.stride(0), x.stride(0)), launch.dims),
            flags=(rows is not None, dx is grad),
            **launch.options,
        )
    return column_sums(partial, w.dtype)


class _Launch:
    """What the launches of all kernels share: tables, grid and options."""

    def __init__(
        self,
        kernel: str,
        x: Tensor,
        precision: str,
        tuning: Optional[Sequence[int]],
        rows: Optional[Tensor] = None,
    ) -> None:
        if precision not in OPERAND_DTYPES:
            raise ValueError(f"unknown precision {precision!r}: use one of {', '.join(OPERAND_DTYPES)}")
        dims = dims_of(x.shape[1])
        warps, stages, programs, registers = tuning or _tuning(kernel, dims)
        self.x, self.dims = x, tuple(dims)
        self.tables = tuple(tables_of(x.shape[1], OPERAND_DTYPES[precision], x.device))
        most = programs * _multiprocessors(x.device) if x.is_cuda else INTERPRETED_PROGRAMS
        self.programs = min(most, len(x) if rows is None else len(rows))
        self.options: dict[str, Any] = {
            "STAGES": stages,
            "PRECISION": _products(precision, x.is_cuda),
            "num_warps": warps,
            # Left without a limit, ptxas has spilled all but 32 registers of the largest tiles.
            "maxnreg": registers or min(255, 2048 // warps),
        }

    def forward(self, tensors: tuple[Any, ...], dc_power_weight: float, flags: tuple[bool, ...]) -> None:
        """Run the forward kernel, if there is any row; flags: entropy, mixing, subset."""
        if self.programs:
            numbers = (len(self.x), self.x.stride(0), dc_power_weight)
            forward_kernel[(self.programs,)](
                tensors, self.tables, numbers, self.dims, flags=flags, **self.options
            )


def _tuning(kernel: str, dims: Dims) -> Tuning:
    """The default one. Larger tiles than those of the sweep take as many warps and registers as let ptxas
    keep most of their numbers in registers; how fast they are was not measured."""
    tuning = DEFAULTS[kernel]
    if dims.tile1 * dims.tile2 <= SWEPT_TILE:
        return tuning
    return tuning._replace(warps=max(2, dims.tile1 // 16), registers=0)


@lru_cache(maxsize=16)
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _products(precision: str, on_cuda: bool) -> str:
    if precision == "ieee":
        return "ieee"
    return "tf32" if on_cuda else "interpreted"


def _row_major(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


@_entropy_op.register_fake
def _(x: Tensor, dc_power_weight: float, precision: str, tuning: Any) -> Tensor:
    return x.new_empty(x.shape[0], dtype=torch.float32)


@_mixing_op.register_fake
def _(x: Tensor, w: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)


@_both_op.register_fake
def _(x: Tensor, w: Tensor, dc_power_weight: float, precision: str, tuning: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], dtype=torch.float32), x.new_empty(x.shape)


@mixing_backward_op.register_fake
def _(
    grad: Tensor, x: Tensor, w: Tensor, rows: Any, count: Any, precision: str, tuning: Any
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), w.new_empty(w.shape)


def _save_mixing(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, w, rows, count, chosen, ctx.precision, _ = inputs
    ctx.save_for_backward(x, w, rows, count, chosen)


def _save_both(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, w, _, ctx.precision, _ = inputs
    ctx.save_for_backward(x, w, None, None, None)


def _grads(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    *saved, chosen = ctx.saved_tensors
    dx, dw = mixing_backward_op(grad, *saved, ctx.precision, None)
    return _only(chosen, dx), dw


_mixing_op.register_autograd(
    lambda ctx, grad: (*_grads(ctx, grad), None, None, None, None, None), setup_context=_save_mixing
)
_both_op.register_autograd(
    lambda ctx, _, grad: (*_grads(ctx, grad), None, None, None), setup_context=_save_both
)
