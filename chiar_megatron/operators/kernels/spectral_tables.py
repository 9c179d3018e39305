"""The factored orthonormal DCT-II of length N = N1·N2 and its constant matrices.

With n = N2·n1 + n2 and k = 2·N1·j ± k1 the angle π(2n+1)k/(2N) splits, modulo 2π, into
±π·n1·k1/N1 ± φ(n2, k1) + π(2n2+1)j/N2, where φ = π(2n2+1)k1/(2N). So for one token, x as [n1, n2]:

    Sc = Cos1 x,  Ss = Sin1 x                          [k1, n2], k1 = 0..N1-1
    R = Sc cos φ - Ss sin φ,  I = Ss cos φ + Sc sin φ  [k1, n2]
    A = R Cos2,  B = I Sin2                            [k1, j],  j = 0..N2/2-1
    X at k = 2·N1·j + k1 is A - B, at 2·N1·j - k1 it is A + B

k1 = N1 rides in the sine row of k1 = 0, whose sines vanish: Sin1[0] = (-1)^n1, and its B is I Odd2. Column
j = 0 of Sin2, which would vanish too, holds j = N2/2, where the cosines vanish. Row k1 = 0 and column j = 0
therefore hold two coefficients, A and B, without a sum. All factors are unscaled; the transform's scales
√(1/N) and √(2/N) go where each kernel squares the spectrum or filters it.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

MAX_FACTOR = 64
MIN_TILE = 16  # the least side of a matrix instruction's operands


class Dims(NamedTuple):
    """Factors of the length, and the sides of the tiles that hold them: powers of two, zero-padded."""

    n1: int
    n2: int
    tile1: int
    tile2: int
    tile_j: int


class Tables(NamedTuple):
    """Constants of one length on one device, each flat and zero-padded.

    matrices: Cos1 and Sin1 [tile1, tile1], then Cos2, Sin2 and Odd2 [tile2, tile_j], in the dtype of the
    operands. twiddles: cos φ and sin φ [tile1, tile2], float32. k: the coefficient in each place of A ∓ B,
    then of A ± B [tile1, tile_j], int32, -1 in padding.
    """

    matrices: Tensor
    twiddles: Tensor
    k: Tensor


def factorisation(h: int) -> tuple[int, int] | None:
    """(N1, N2) with N1·N2 = h, N2 even and both at most 64, as nearly equal as can be; None if none is."""
    pairs = [
        (h // n2, n2) for n2 in range(2, MAX_FACTOR + 1, 2) if h % n2 == 0 and 1 <= h // n2 <= MAX_FACTOR
    ]
    return min(pairs, key=lambda pair: (max(pair), pair[0]), default=None)


def dims_of(h: int) -> Dims:
    """Tile sizes for rows of length h; ValueError where `factorisation` has no answer."""
    factors = factorisation(h)
    if factors is None:
        raise ValueError(
            f"no spectral kernel for hidden size {h}: it needs factors N1, N2 of at most {MAX_FACTOR}, N2 "
            "even; use the matrix form of operators/dct.py"
        )
    n1, n2 = factors
    return Dims(n1, n2, _tile(n1), _tile(n2), _tile(n2 // 2))


def _tile(n: int) -> int:
    return max(MIN_TILE, 1 << (n - 1).bit_length())


@lru_cache(maxsize=32)
def tables_of(h: int, dtype: torch.dtype, device: torch.device) -> Tables:
    """The tables for rows of length h with operands in `dtype`, computed in float64 and cached."""
    d = dims_of(h)
    n1, k1 = torch.arange(d.n1), torch.arange(d.n1)[:, None]
    n2, j = torch.arange(d.n2), torch.arange(d.n2 // 2)
    # Every angle is reduced in integers before it becomes a float.
    cos1, sin1 = _cos_sin(n1 * k1, d.n1)
    sin1[0] = 1.0 - 2.0 * (n1 % 2)
    cos_phi, sin_phi = _cos_sin((2 * n2 + 1) * k1, 2 * h)
    odd = (2 * n2 + 1)[:, None]
    cos2 = _cos_sin(odd * j, d.n2)[0]
    sin2 = _cos_sin(odd * torch.where(j == 0, d.n2 // 2, j), d.n2)[1]
    odd2 = _cos_sin(odd * (2 * j + 1), 2 * d.n2)[0]
    minus = 2 * d.n1 * j + k1
    plus = torch.where(j == 0, h - k1, 2 * d.n1 * j - k1)
    plus = torch.where(k1 == 0, d.n1 + 2 * d.n1 * j, plus)
    matrices = [_padded(m, d.tile1, d.tile1) for m in (cos1, sin1)]
    matrices += [_padded(m, d.tile2, d.tile_j) for m in (cos2, sin2, odd2)]
    twiddles = [_padded(m, d.tile1, d.tile2) for m in (cos_phi, sin_phi)]
    # Padding is 0, so that k + 1 goes in and -1 comes out.
    k = torch.cat([_padded(m + 1, d.tile1, d.tile_j) for m in (minus, plus)]) - 1
    return Tables(
        torch.cat(matrices).to(dtype).to(device),
        torch.cat(twiddles).float().to(device),
        k.to(torch.int32).to(device),
    )


def _cos_sin(numerator: Tensor, denominator: int) -> tuple[Tensor, Tensor]:
    """Cosine and sine of π·numerator/denominator, float64."""
    angle = (numerator % (2 * denominator)).double() * (math.pi / denominator)
    return angle.cos(), angle.sin()


def _padded(matrix: Tensor, rows: int, columns: int) -> Tensor:
    """The matrix in the corner of a zero one [rows, columns], flattened."""
    padded = matrix.new_zeros(rows, columns)
    padded[: matrix.shape[0], : matrix.shape[1]] = matrix
    return padded.flatten()
