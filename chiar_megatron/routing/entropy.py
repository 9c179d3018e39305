"""Spectral entropy, the paper's measure of how much a token's hidden vector needs attention.

    P_0 = c·X_0², P_k = X_k², p = P/ΣP, H = -Σ p ln p / ln h        with X the orthonormal DCT of x

H lies in [0, 1]: 0 for one pure frequency, about 0.895 for Gaussian noise at h=1024. It does not depend
on the scale of x. H(0) = 0, 0·ln 0 = 0, and h=1 gives 0. Against float64 the float32 error is below
1e-6 (both methods, h up to 2048, |x| from 1e-18 to 1e18).
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

from chiar_megatron.operators.dct import DctForm, dct
from chiar_megatron.operators.rows import as_rows, from_rows
from chiar_megatron.runtime.paths import kernels_available

EntropyMethod = Literal["one_pass", "two_pass"]


def spectral_entropy(
    x: Tensor, dc_power_weight: float = 1.0, form: DctForm = "auto", method: EntropyMethod = "one_pass"
) -> Tensor:
    """Normalised spectral entropy of each token.

    x: [..., h], any floating dtype. dc_power_weight: c, 1 is exact, 2 is what the authors' code computes.
    method: "one_pass" needs a single sweep over the powers, `(ln S - Σ P ln P / S)/ln h`; "two_pass"
    normalises first. Returns H [...] in [0, 1], float32 (float64 for float64 x), differentiable. The
    gradient grows as 1/|x| and is 0 at x = 0; in float32 it is finite where a token's largest |x| lies
    between 1e-36 and 1e34 (h up to 2048), and not a number where 1/|x| overflows (subnormal x, such as
    1e-39). Infinite x, and x whose spectrum overflows, give not-a-number, as not-a-number does.
    """
    return entropy_of_spectrum(dct(x, form), dc_power_weight, method)


def token_entropy(x: Tensor, dc_power_weight: float) -> Tensor:
    """`spectral_entropy` of each token without a gradient, by the Triton kernel where it runs.

    x: [s, b, h]. Returns [s, b] float32. The kernel's products are of bfloat16: on Gaussian input the error
    is at most 1e-4, and 99.85% of the decisions at the median are those of float64 (measured on one H100).
    """
    if kernels_available(x.device) and x.dtype in (torch.bfloat16, torch.float16):
        from chiar_megatron.operators.kernels import spectral

        if spectral.factorisation(x.shape[-1]) is not None:
            rows_NH, swapped = as_rows(x)
            entropy_N = spectral.spectral_entropy(rows_NH, dc_power_weight)
            return from_rows(entropy_N, x, swapped)
    with torch.no_grad():
        return spectral_entropy(x, dc_power_weight)


def entropy_of_spectrum(
    spectrum: Tensor, dc_power_weight: float = 1.0, method: EntropyMethod = "one_pass"
) -> Tensor:
    """`spectral_entropy` of tokens whose orthonormal DCT `spectrum` [..., h] is already known."""
    entropy: Tensor = _Entropy.apply(spectrum, dc_power_weight, method)  # type: ignore[no-untyped-call]
    return entropy


class _Entropy(torch.autograd.Function):
    """The gradient is written out: it saves the spectrum only, and X ln X has its limit 0 at X = 0."""

    @staticmethod
    def forward(ctx: Any, spectrum: Tensor, dc_power_weight: float, method: EntropyMethod) -> Tensor:
        ctx.dc_power_weight = dc_power_weight
        h = spectrum.shape[-1]
        power, _ = _scaled_power(spectrum, dc_power_weight)
        total = _total(power)
        if h == 1:
            entropy = 0 * total.squeeze(-1)
        elif method == "two_pass":
            p = power / total
            entropy = -torch.xlogy(p, p).sum(-1) / math.log(h)
        elif method == "one_pass":
            mean_log = torch.xlogy(power, power).sum(-1, keepdim=True) / total
            entropy = ((total.log() - mean_log) / math.log(h)).squeeze(-1)
        else:
            raise ValueError(f"unknown entropy method {method!r}: use 'one_pass' or 'two_pass'")
        entropy = entropy.clamp(0, 1)
        ctx.save_for_backward(spectrum, entropy)
        return entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        spectrum, entropy = ctx.saved_tensors
        h = spectrum.shape[-1]
        if h == 1:
            return torch.zeros_like(spectrum), None, None
        power, scale = _scaled_power(spectrum, ctx.dc_power_weight)
        total = _total(power)
        # dH/dX = -2cX (ln p + H ln h) / (S ln h)
        tiny = torch.finfo(power.dtype).tiny
        log_p = (power / total).clamp_min(tiny).log()
        slope = -2 * (log_p + entropy.unsqueeze(-1) * math.log(h)) / (total * math.log(h))
        slope = slope * (spectrum / scale)
        slope[..., 0] *= ctx.dc_power_weight
        return slope * (grad.unsqueeze(-1) / scale), None, None


def _scaled_power(spectrum: Tensor, dc_power_weight: float) -> tuple[Tensor, Tensor]:
    """Powers of the spectrum divided by its largest entry, so that no square under- or overflows."""
    scale = spectrum.abs().amax(-1, keepdim=True)
    scale = torch.where(scale == 0, 1, scale)
    power = (spectrum / scale).square()
    power[..., 0] *= dc_power_weight
    return power, scale


def _total(power: Tensor) -> Tensor:
    total = power.sum(-1, keepdim=True)
    return torch.where(total == 0, 1, total)
