"""Spectral mixing, the cheap token operator: `y = Cᵀ diag(w) C x` with the orthonormal DCT C.

It filters each token along the hidden dimension, so it is causal and needs no other token and no other
rank. The authors' published code computes twice this value; the import folds the 2 into w.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from chiar_megatron.operators.casts import cast
from chiar_megatron.operators.dct import DctForm, dct, idct, spectral_dtype
from chiar_megatron.operators.rows import TokenRows, as_rows, from_rows, put_rows, rows_of, take_rows
from chiar_megatron.runtime.paths import kernels_available


def spectral_mixing(x: Tensor, w: Tensor, form: DctForm = "auto", spectrum: Tensor | None = None) -> Tensor:
    """Filter each token's spectrum: `y = idct(w · dct(x))`.

    x: [..., h], any floating dtype. w: [h]. spectrum: `dct(x)` [..., h] where the caller has it already
    (an entropy router does); it counts as a value only: the gradient goes to x and w, never into it.
    Returns [..., h] in x's dtype, computed in float32 (float64 for float64 x).
    Kept for the backward pass: w and the spectrum in x's dtype, as large as x.
    """
    y: Tensor = _SpectralMixing.apply(x, w, spectrum, form)  # type: ignore[no-untyped-call]
    return y


class _SpectralMixing(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, spectrum: Tensor | None, form: DctForm) -> Tensor:
        if spectrum is None:
            spectrum = dct(x, form)
        ctx.form = form
        # In half precision this rounds the spectrum, which only the gradient of w sees: like any linear
        # layer's weight gradient, it is then a float32 sum over rounded activations.
        ctx.save_for_backward(spectrum.to(x.dtype), w)
        return cast(idct(spectrum * w.to(spectral_dtype(x)), form), x.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        spectrum, w = ctx.saved_tensors
        grad_spectrum = dct(grad, ctx.form)
        grad_x = grad_w = None
        if ctx.needs_input_grad[0]:
            grad_x = idct(grad_spectrum * w.to(grad_spectrum.dtype), ctx.form).to(grad.dtype)
        if ctx.needs_input_grad[1]:
            grad_w = (grad_spectrum * spectrum).flatten(0, -2).sum(0).to(w.dtype)
        return grad_x, grad_w, None, None


class SpectralMixing(torch.nn.Module):
    """Spectral mixing with its learned filter `weight` [hidden_size], 1 at the start (the identity)."""

    def __init__(
        self,
        hidden_size: int,
        params_dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=params_dtype, device=device))

    def forward(self, x: Tensor, chosen: Tensor | None = None, rows: TokenRows | None = None) -> Tensor:
        """x: [b, s, h] -> [b, s, h] in x's dtype.

        chosen: bool [b, s]; given, only these tokens are mixed, and the others give 0. rows: given where the
        chosen are its tokens without a row, which it may have listed already. By the Triton kernel
        on CUDA in half precision; else a CPU takes the chosen tokens out, and CUDA, whose shapes stay
        fixed, mixes all.
        """
        if kernels_available(x.device) and x.dtype in (torch.bfloat16, torch.float16):
            from chiar_megatron.operators.kernels import spectral

            if spectral.factorisation(x.shape[-1]) is not None:
                return self._by_kernel(x, chosen, rows)
        if chosen is None:
            return spectral_mixing(x, self.weight)
        if x.device.type != "cpu":
            return spectral_mixing(x, self.weight) * chosen[..., None]
        mixed = rows_of(chosen.flatten())
        mixed_RH = spectral_mixing(take_rows(x.flatten(0, 1), mixed), self.weight)
        return put_rows(mixed_RH, mixed).view(x.shape)

    def _by_kernel(self, x: Tensor, chosen: Tensor | None, rows: TokenRows | None) -> Tensor:
        from chiar_megatron.operators.kernels import spectral

        x_NH, swapped = as_rows(x)
        subset = None
        if chosen is not None:
            chosen_N = (chosen.transpose(0, 1) if swapped else chosen).flatten()
            if rows is not None and rows.rest_N is not None and rows.rest_count is not None and not swapped:
                subset = spectral.Subset(rows.rest_N, rows.rest_count, chosen_N)
            else:
                index_R = rows_of(chosen_N, len(chosen_N)).index_R.int()
                subset = spectral.Subset(index_R, chosen_N.sum(dtype=torch.int32)[None], chosen_N)
        return from_rows(spectral.spectral_mixing(x_NH, self.weight, subset), x, swapped)
