"""The orthonormal discrete cosine transform along the last dimension, for any length h >= 1.

    X_k = a_k Σ_n x_n cos(π(n+½)k/h),   a_0 = √(1/h), a_k = √(2/h) otherwise        (DCT-II)

The matrix C of this transform is orthogonal, so the inverse (DCT-III) is its transpose, and the
backward pass of either is the other: nothing is saved.

Two forms with one result. "fft" is Makhoul's (IEEE Trans. ASSP 28(1), 1980): one real FFT of length h
on the sequence reordered into even entries, then odd ones backwards. "gemm" multiplies with the cached
h×h matrix: more operations, at the speed of a matrix product.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor

DctForm = Literal["fft", "gemm", "auto"]

# Measured with 2 CPU threads, 4096 rows, float32, gemm against fft in ms: h=128 0.8/1.1, 256 4.1/2.3,
# 384 8.6/4.3, 512 14/8, 1024 50/9; with 256 rows gemm wins up to h=256.
CPU_GEMM_MAX_HIDDEN = 256

# Elements transformed at once on a CPU: larger temporaries leave the cache and are unmapped after every
# use, which made 4096 rows of 1024 three times slower.
CPU_FFT_BLOCK = 1 << 17


def dct(x: Tensor, form: DctForm = "auto") -> Tensor:
    """Orthonormal DCT-II along the last dimension.

    x: [..., h], any floating dtype and any strides. Returns [..., h] in float64 for float64 input, else
    in float32: spectra of half-precision inputs are computed and kept in float32, also under autocast.
    Raises ValueError for an unknown form.
    """
    return _transform(x, False, form)


def idct(x: Tensor, form: DctForm = "auto") -> Tensor:
    """Inverse of `dct` (orthonormal DCT-III along the last dimension); same shapes and dtypes."""
    return _transform(x, True, form)


def resolve_form(h: int, device: torch.device, form: DctForm = "auto") -> Literal["fft", "gemm"]:
    """The form that `form` stands for at transform length h on this device; ValueError if unknown."""
    if form == "auto":
        return "gemm" if device.type != "cpu" or h <= CPU_GEMM_MAX_HIDDEN else "fft"
    if form not in ("fft", "gemm"):
        raise ValueError(f"unknown DCT form {form!r}: use 'fft', 'gemm' or 'auto'")
    return form


def spectral_dtype(x: Tensor) -> torch.dtype:
    """Precision of spectral computations on x: float64 for float64, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _transform(x: Tensor, inverse: bool, form: DctForm) -> Tensor:
    resolved = resolve_form(x.shape[-1], x.device, form)
    y: Tensor = _Transform.apply(x.to(spectral_dtype(x)), inverse, resolved)  # type: ignore[no-untyped-call]
    return y


class _Transform(torch.autograd.Function):
    """C x, or Cᵀ x if inverse; the backward pass is the other of the two."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, inverse: bool, form: Literal["fft", "gemm"]) -> Tensor:
        ctx.inverse, ctx.form = inverse, form
        if form == "fft":
            return _fft(x, inverse)
        # autocast would turn the product into bf16, and entropies near τ would change sides
        with torch.autocast(x.device.type, enabled=False):
            matrix = dct_matrix(x.shape[-1], x.dtype, x.device)
            return x @ (matrix if inverse else matrix.T)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        grad_x: Tensor = _Transform.apply(grad, not ctx.inverse, ctx.form)  # type: ignore[no-untyped-call]
        return grad_x, None, None


@lru_cache(maxsize=32)
def dct_matrix(h: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The orthogonal matrix C [h, h] with `dct(x) = x @ C.T`, built in float64 and cached."""
    k, n = torch.arange(h).unsqueeze(1), torch.arange(h)
    # the angle is reduced in integers (period 4h), so large k·n cost no digits
    angle = ((2 * n + 1) * k % (4 * h)).to(torch.float64) * (math.pi / (2 * h))
    matrix = torch.cos(angle) * math.sqrt(2 / h)
    matrix[0] = math.sqrt(1 / h)
    return matrix.to(device=device, dtype=dtype)


@lru_cache(maxsize=32)
def _twiddles(h: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """a_k·exp(-iπk/(2h)) for k = 0..h//2, complex."""
    angle = torch.arange(h // 2 + 1, dtype=torch.float64) * (-math.pi / (2 * h))
    scale = torch.full_like(angle, math.sqrt(2 / h))
    scale[0] = math.sqrt(1 / h)
    return torch.polar(scale, angle).to(device=device, dtype=dtype.to_complex())


def _fft(x: Tensor, inverse: bool) -> Tensor:
    if x.numel() == 0:  # MKL refuses an empty batch, and no token may be routed here
        return torch.empty_like(x)
    transform = _fft_inverse if inverse else _fft_forward
    if x.device.type != "cpu" or x.numel() <= CPU_FFT_BLOCK:
        return transform(x)
    h = x.shape[-1]
    rows = x.reshape(-1, h)
    y = torch.empty_like(rows)
    block = max(1, CPU_FFT_BLOCK // h)
    for start in range(0, len(rows), block):
        y[start : start + block] = transform(rows[start : start + block])
    return y.view(x.shape)


def _fft_forward(x: Tensor) -> Tensor:
    h = x.shape[-1]
    reordered = torch.cat([x[..., ::2], x[..., 1::2].flip(-1)], dim=-1)
    half = torch.fft.rfft(reordered) * _twiddles(h, x.dtype, x.device)
    # the input is real, so bin h-k is the conjugate of bin k: X_k = Re, X_{h-k} = -Im
    return torch.cat([half.real, -half.imag[..., 1 : (h + 1) // 2].flip(-1)], dim=-1)


def _fft_inverse(x: Tensor) -> Tensor:
    h = x.shape[-1]
    real = x[..., : h // 2 + 1]
    mirrored = x[..., (h + 1) // 2 :].flip(-1)  # X_{h-k} for k = 1..h//2
    imaginary = torch.cat([torch.zeros_like(x[..., :1]), -mirrored], dim=-1)
    half = torch.complex(real, imaginary) / _twiddles(h, x.dtype, x.device)
    reordered = torch.fft.irfft(half, n=h)
    y = torch.empty_like(reordered)
    y[..., ::2] = reordered[..., : (h + 1) // 2]
    y[..., 1::2] = reordered[..., (h + 1) // 2 :].flip(-1)
    return y
