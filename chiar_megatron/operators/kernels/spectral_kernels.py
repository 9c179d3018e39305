"""The Triton kernels of `spectral`: DCT, entropy, filter and gradients of blocks of rows.

`spectral_tables` has the mathematics. A token is a matrix [n1, n2] in a tile [rows, tile1, tile2], and a
warp holds whole tokens: each product contracts the index that the one before left in the right place, so
that nothing is exchanged between warps, and little within one. Programs stay and walk over blocks of rows,
since the constant matrices are larger than a token.

B: rows of a block. d: the `Dims`. p, q [B, k1, j]: the unscaled coefficients A ∓ B and A ± B. PRECISION:
"tf32" for tensor cores in either dtype, "ieee", or "interpreted". tables: the `Tables`.
"""

# Kernels are Triton's language, not typed Python.
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,misc"

from __future__ import annotations

import triton
import triton.language as tl

SMALLEST = tl.constexpr(1e-37)


@triton.jit
def _tile_offsets(d: tl.constexpr):
    """Places in a row of the tile [1, n1, n2], and which of them exist."""
    n1 = tl.arange(0, d[2])[None, :, None]
    n2 = tl.arange(0, d[3])[None, None, :]
    return n1 * d[1] + n2, (n1 < d[0]) & (n2 < d[1])


@triton.jit
def _load_rows(base, stride, block, n, rows, d: tl.constexpr, B: tl.constexpr, SUBSET: tl.constexpr):
    """Block of rows of x as [B, n1, n2], 0 where there is none; and the pointers' offsets and mask."""
    offsets, inside = _tile_offsets(d)
    row = block * B + tl.arange(0, B)
    here = row < n
    if SUBSET:
        row = tl.load(rows + row, mask=here, other=0)
    mask = here[:, None, None] & inside
    x = tl.load(base + row.to(tl.int64)[:, None, None] * stride + offsets, mask=mask, other=0.0)
    return x, row.to(tl.int64)[:, None, None], offsets, mask


@triton.jit
def _constants(tables, d: tl.constexpr, B: tl.constexpr):
    """Cos1, Sin1 [B, k1, n1], Cos2, Sin2, Odd2 [B, n2, j], cos φ and sin φ [1, k1, n2]."""
    matrices, twiddles, _ = tables
    T1: tl.constexpr = d[2]
    T2: tl.constexpr = d[3]
    TJ: tl.constexpr = d[4]
    square = tl.arange(0, T1)[:, None] * T1 + tl.arange(0, T1)[None, :]
    tall = 2 * T1 * T1 + tl.arange(0, T2)[:, None] * TJ + tl.arange(0, TJ)[None, :]
    wide = tl.arange(0, T1)[:, None] * T2 + tl.arange(0, T2)[None, :]
    return (
        tl.broadcast_to(tl.load(matrices + square)[None], (B, T1, T1)),
        tl.broadcast_to(tl.load(matrices + square + T1 * T1)[None], (B, T1, T1)),
        tl.broadcast_to(tl.load(matrices + tall)[None], (B, T2, TJ)),
        tl.broadcast_to(tl.load(matrices + tall + T2 * TJ)[None], (B, T2, TJ)),
        tl.broadcast_to(tl.load(matrices + tall + 2 * T2 * TJ)[None], (B, T2, TJ)),
        tl.load(twiddles + wide)[None],
        tl.load(twiddles + wide + T1 * T2)[None],
    )


@triton.jit
def _places(d: tl.constexpr):
    """k1 = 0 [1, k1, 1], and where A and B are summed [1, k1, j]."""
    first = tl.arange(0, d[2])[None, :, None] == 0
    summed = (tl.arange(0, d[2])[None, :, None] > 0) & (tl.arange(0, d[4])[None, None, :] > 0)
    return first, summed


@triton.jit
def _product(a, b, PRECISION: tl.constexpr):
    """a @ b, float32."""
    if PRECISION == "interpreted":  # Triton's interpreter multiplies the bit patterns of bfloat16
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    else:
        return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def _dct(x, constants, d: tl.constexpr, PRECISION: tl.constexpr):
    """x [B, n1, n2] -> p, q float32."""
    cos1, sin1, cos2, sin2, odd2, cos_phi, sin_phi = constants
    first, summed = _places(d)
    x = x.to(cos1.dtype)
    sc = _product(cos1, x, PRECISION)
    ss = _product(sin1, x, PRECISION)
    re = (sc * cos_phi - ss * sin_phi).to(cos1.dtype)
    im = (ss * cos_phi + sc * sin_phi).to(cos1.dtype)
    a = _product(re, cos2, PRECISION)
    # Another product for the one row k1 = 0 is cheaper than taking the row out of the registers.
    b_odd = _product(im, odd2, PRECISION)
    b = tl.where(first, b_odd, _product(im, sin2, PRECISION))
    return a - tl.where(summed, b, 0.0), b + tl.where(summed, a, 0.0)


@triton.jit
def _transposed_dct(p, q, constants, d: tl.constexpr, PRECISION: tl.constexpr):
    """p, q -> [B, n1, n2] float32, by the transpose of `_dct`."""
    cos1, sin1, cos2, sin2, odd2, cos_phi, sin_phi = constants
    first, summed = _places(d)
    # Everything is turned round, [n2, k1] and [n2, n1]: so the results are the next operands in place.
    a = tl.trans((p + tl.where(summed, q, 0.0)).to(cos1.dtype), 0, 2, 1)
    b = tl.trans((q - tl.where(summed, p, 0.0)).to(cos1.dtype), 0, 2, 1)
    first = tl.trans(first, 0, 2, 1)
    cos_phi = tl.trans(cos_phi, 0, 2, 1)
    sin_phi = tl.trans(sin_phi, 0, 2, 1)
    re = _product(cos2, a, PRECISION)
    im_odd = _product(odd2, b, PRECISION)
    im = tl.where(first, im_odd, _product(sin2, b, PRECISION))
    sc = (re * cos_phi + im * sin_phi).to(cos1.dtype)
    ss = (im * cos_phi - re * sin_phi).to(cos1.dtype)
    return tl.trans(_product(sc, cos1, PRECISION) + _product(ss, sin1, PRECISION), 0, 2, 1)


@triton.jit
def _log2(x, PRECISION: tl.constexpr):
    """For tensor cores the instruction itself, whose error is 2^-22; otherwise the accurate function."""
    if PRECISION == "tf32":
        y = tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        y = tl.log2(x)
    return y


@triton.jit
def _entropy(p, q, dc_power_weight, d: tl.constexpr, PRECISION: tl.constexpr):
    """H [B] of the coefficients, as `routing.entropy` defines it."""
    B: tl.constexpr = p.shape[0]
    FLAT: tl.constexpr = d[2] * d[4]
    top = tl.max(tl.reshape(tl.maximum(tl.abs(p), tl.abs(q)), (B, FLAT)), axis=1)
    # The largest power is 1: no square under- or overflows.
    scale = (1.0 / tl.maximum(top, SMALLEST))[:, None, None]
    p, q = p * scale, q * scale
    p, q = p * p, q * q
    # X_0 is scaled by √(1/N), all others by √(2/N).
    dc = (tl.arange(0, d[2])[None, :, None] + tl.arange(0, d[4])[None, None, :]) == 0
    p = tl.where(dc, p * (0.5 * dc_power_weight), p)
    logs = p * _log2(tl.maximum(p, SMALLEST), PRECISION) + q * _log2(tl.maximum(q, SMALLEST), PRECISION)
    total = tl.sum(tl.reshape(p + q, (B, FLAT)), axis=1)
    total = tl.where(total == 0, 1.0, total)
    logs = tl.sum(tl.reshape(logs, (B, FLAT)), axis=1)
    WIDTH: tl.constexpr = d[0] * d[1]
    entropy = (tl.log2(total) - logs / total) / tl.log2(WIDTH * 1.0)
    # These comparisons, unlike minimum and maximum, leave not-a-number alone.
    entropy = tl.where(entropy < 0, 0.0, entropy)
    return tl.where(entropy > 1, 1.0, entropy)


@triton.jit
def _scales(tables, half, d: tl.constexpr):
    """k [1, k1, j] of p (half 0) or q (half 1), and the squared scale of the transform, 0 in padding."""
    place = tl.arange(0, d[2])[:, None] * d[4] + tl.arange(0, d[4])[None, :]
    k = tl.load(tables[2] + half * d[2] * d[4] + place)[None]
    WIDTH: tl.constexpr = d[0] * d[1]
    return k, tl.where(k > 0, 2.0 / WIDTH, tl.where(k == 0, 1.0 / WIDTH, 0.0))


@triton.jit
def _filter(w, tables, half, d: tl.constexpr):
    """The filter times the squared scale [1, k1, j], float32."""
    k, scale = _scales(tables, half, d)
    return tl.load(w + k, mask=k >= 0, other=0.0).to(tl.float32) * scale


@triton.jit
def forward_kernel(tensors, tables, numbers, d: tl.constexpr, B: tl.constexpr, STAGES: tl.constexpr,
                   PRECISION: tl.constexpr, flags: tl.constexpr):  # fmt: skip
    """flags: which of entropy and mixing to compute, and whether only of rows[:count]."""
    x_ptr, w_ptr, rows, count, entropy_ptr, y_ptr = tensors
    n, x_stride, dc_power_weight = numbers
    ENTROPY: tl.constexpr = flags[0]
    MIXING: tl.constexpr = flags[1]
    SUBSET: tl.constexpr = flags[2]
    if SUBSET:
        n = tl.load(count)
    constants = _constants(tables, d, B)
    if MIXING:
        filter_p = _filter(w_ptr, tables, 0, d)
        filter_q = _filter(w_ptr, tables, 1, d)
    for block in tl.range(tl.program_id(0), tl.cdiv(n, B), tl.num_programs(0), num_stages=STAGES):
        x, row, offsets, mask = _load_rows(x_ptr, x_stride, block, n, rows, d, B, SUBSET)
        p, q = _dct(x, constants, d, PRECISION)
        if ENTROPY:
            at = block * B + tl.arange(0, B)
            tl.store(entropy_ptr + at, _entropy(p, q, dc_power_weight, d, PRECISION), mask=at < n)
        if MIXING:
            y = _transposed_dct(p * filter_p, q * filter_q, constants, d, PRECISION)
            width: tl.constexpr = d[0] * d[1]
            tl.store(y_ptr + row * width + offsets, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def backward_kernel(tensors, tables, numbers, d: tl.constexpr, B: tl.constexpr, STAGES: tl.constexpr,
                    PRECISION: tl.constexpr, flags: tl.constexpr):  # fmt: skip
    """dx of a block of rows, and the sum of dw over all blocks of this program: dw [programs, N].

    flags: whether only of rows[:count], and whether dx is g and added to.
    """
    g_ptr, x_ptr, w_ptr, rows, count, dx_ptr, dw_ptr = tensors
    n, g_stride, x_stride = numbers
    SUBSET: tl.constexpr = flags[0]
    ADDS: tl.constexpr = flags[1]
    if SUBSET:
        n = tl.load(count)
    constants = _constants(tables, d, B)
    filter_p = _filter(w_ptr, tables, 0, d)
    filter_q = _filter(w_ptr, tables, 1, d)
    T1: tl.constexpr = d[2]  # Triton 3.6 takes no element of a constant tuple as a size
    TJ: tl.constexpr = d[4]
    dw_p = tl.zeros((B, T1, TJ), tl.float32)
    dw_q = tl.zeros((B, T1, TJ), tl.float32)
    width: tl.constexpr = d[0] * d[1]
    for block in tl.range(tl.program_id(0), tl.cdiv(n, B), tl.num_programs(0), num_stages=STAGES):
        g, row, offsets, mask = _load_rows(g_ptr, g_stride, block, n, rows, d, B, SUBSET)
        x, row, offsets, mask = _load_rows(x_ptr, x_stride, block, n, rows, d, B, SUBSET)
        p, q = _dct(x, constants, d, PRECISION)
        grad_p, grad_q = _dct(g, constants, d, PRECISION)
        dw_p += p * grad_p
        dw_q += q * grad_q
        dx = _transposed_dct(grad_p * filter_p, grad_q * filter_q, constants, d, PRECISION)
        if ADDS:
            dx += g.to(tl.float32)
        tl.store(dx_ptr + row * width + offsets, dx.to(dx_ptr.dtype.element_ty), mask=mask)
    # Programs without rows write their zeros too: the partial sums start uninitialised.
    dw_ptr += tl.program_id(0) * width
    k, scale = _scales(tables, 0, d)
    tl.store(dw_ptr + k, tl.sum(dw_p, axis=0)[None] * scale, mask=k >= 0)
    k, scale = _scales(tables, 1, d)
    tl.store(dw_ptr + k, tl.sum(dw_q, axis=0)[None] * scale, mask=k >= 0)
