"""The Triton kernels of `spectral`: DCT, entropy, filter and gradients, a token at a time.

`spectral_tables` has the mathematics. A token is a matrix [n1, n2] in a tile [tile1, tile2], whose rows a
program's warps share out: each product contracts the index that the one before left in the right place, so
that little is exchanged between threads. Programs stay and walk over tokens, since the constant matrices are
larger than a token.

d: the `Dims`. p, q [k1, j]: the unscaled coefficients A ∓ B and A ± B. PRECISION: "tf32" for tensor cores in
either dtype, "ieee", or "interpreted". tables: the `Tables`.
"""

# Kernels are Triton's language, not typed Python.
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,misc"

from __future__ import annotations

import triton
import triton.language as tl

from chiar_megatron.operators.kernels.column_sums import add_pairs

SMALLEST = tl.constexpr(1e-37)


@triton.jit
def _load_token(base, stride, at, rows, d: tl.constexpr, SUBSET: tl.constexpr):
    """Token `at` of x, or of some rows of it, as [n1, n2]; the pointers' offset [1, 1], and the places in a
    token and which of them exist."""
    n1 = tl.arange(0, d[2])[:, None]
    n2 = tl.arange(0, d[3])[None, :]
    places, inside = n1 * d[1] + n2, (n1 < d[0]) & (n2 < d[1])
    row = at + tl.arange(0, 1)  # no scalar, so that it is loaded ahead too
    if SUBSET:
        row = tl.load(rows + row)
    row = row.to(tl.int64)[:, None]
    return tl.load(base + row * stride + places, mask=inside, other=0.0), row, places, inside


@triton.jit
def _constants(tables, d: tl.constexpr):
    """Cos1, Sin1 [k1, n1], Cos2, Sin2, Odd2 [n2, j], cos φ and sin φ [k1, n2]."""
    matrices, twiddles, _ = tables
    T1: tl.constexpr = d[2]
    T2: tl.constexpr = d[3]
    TJ: tl.constexpr = d[4]
    square = tl.arange(0, T1)[:, None] * T1 + tl.arange(0, T1)[None, :]
    tall = 2 * T1 * T1 + tl.arange(0, T2)[:, None] * TJ + tl.arange(0, TJ)[None, :]
    wide = tl.arange(0, T1)[:, None] * T2 + tl.arange(0, T2)[None, :]
    return (
        tl.load(matrices + square),
        tl.load(matrices + square + T1 * T1),
        tl.load(matrices + tall),
        tl.load(matrices + tall + T2 * TJ),
        tl.load(matrices + tall + 2 * T2 * TJ),
        tl.load(twiddles + wide),
        tl.load(twiddles + wide + T1 * T2),
    )


@triton.jit
def _places(d: tl.constexpr):
    """k1 = 0 [k1, 1], and where A and B are summed [k1, j]."""
    first = tl.arange(0, d[2])[:, None] == 0
    summed = (tl.arange(0, d[2])[:, None] > 0) & (tl.arange(0, d[4])[None, :] > 0)
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
    """x [n1, n2] -> p, q float32."""
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
    """p, q -> [n1, n2] float32, by the transpose of `_dct`."""
    cos1, sin1, cos2, sin2, odd2, cos_phi, sin_phi = constants
    first, summed = _places(d)
    # Everything is turned round, [n2, k1] and [n2, n1]: so the results are the next operands in place.
    a = tl.trans((p + tl.where(summed, q, 0.0)).to(cos1.dtype))
    b = tl.trans((q - tl.where(summed, p, 0.0)).to(cos1.dtype))
    first = tl.trans(first)
    cos_phi = tl.trans(cos_phi)
    sin_phi = tl.trans(sin_phi)
    re = _product(cos2, a, PRECISION)
    im_odd = _product(odd2, b, PRECISION)
    im = tl.where(first, im_odd, _product(sin2, b, PRECISION))
    sc = (re * cos_phi + im * sin_phi).to(cos1.dtype)
    ss = (im * cos_phi - re * sin_phi).to(cos1.dtype)
    return tl.trans(_product(sc, cos1, PRECISION) + _product(ss, sin1, PRECISION))


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
    """H, a scalar, of the coefficients, as `routing.entropy` defines it."""
    FLAT: tl.constexpr = d[2] * d[4]
    top = tl.max(tl.reshape(tl.maximum(tl.abs(p), tl.abs(q)), (FLAT,)), axis=0)
    # The largest power is 1: no square under- or overflows.
    scale = 1.0 / tl.maximum(top, SMALLEST)
    p, q = p * scale, q * scale
    p, q = p * p, q * q
    # X_0 is scaled by √(1/N), all others by √(2/N).
    dc = (tl.arange(0, d[2])[:, None] + tl.arange(0, d[4])[None, :]) == 0
    p = tl.where(dc, p * (0.5 * dc_power_weight), p)
    logs = p * _log2(tl.maximum(p, SMALLEST), PRECISION) + q * _log2(tl.maximum(q, SMALLEST), PRECISION)
    total, logs = tl.reduce((tl.reshape(p + q, (FLAT,)), tl.reshape(logs, (FLAT,))), 0, add_pairs)
    total = tl.where(total == 0, 1.0, total)
    WIDTH: tl.constexpr = d[0] * d[1]
    entropy = (tl.log2(total) - logs / total) / tl.log2(WIDTH * 1.0)
    # These comparisons, unlike minimum and maximum, leave not-a-number alone.
    entropy = tl.where(entropy < 0, 0.0, entropy)
    return tl.where(entropy > 1, 1.0, entropy)


@triton.jit
def _scales(tables, half, d: tl.constexpr):
    """k [k1, j] of p (half 0) or q (half 1), and the squared scale of the transform, 0 in padding."""
    place = tl.arange(0, d[2])[:, None] * d[4] + tl.arange(0, d[4])[None, :]
    k = tl.load(tables[2] + half * d[2] * d[4] + place)
    WIDTH: tl.constexpr = d[0] * d[1]
    return k, tl.where(k > 0, 2.0 / WIDTH, tl.where(k == 0, 1.0 / WIDTH, 0.0))


@triton.jit
def _filter(w, tables, half, d: tl.constexpr):
    """The filter times the squared scale [k1, j], float32."""
    k, scale = _scales(tables, half, d)
    return tl.load(w + k, mask=k >= 0, other=0.0).to(tl.float32) * scale


@triton.jit
def forward_kernel(tensors, tables, numbers, d: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
                   flags: tl.constexpr):  # fmt: skip
    """flags: which of entropy and mixing to compute, and whether only of rows[:count]."""
    x_ptr, w_ptr, rows, count, entropy_ptr, y_ptr = tensors
    n, x_stride, dc_power_weight = numbers
    ENTROPY: tl.constexpr = flags[0]
    MIXING: tl.constexpr = flags[1]
    SUBSET: tl.constexpr = flags[2]
    if SUBSET:
        n = tl.load(count)
    constants = _constants(tables, d)
    if MIXING:
        filter_p = _filter(w_ptr, tables, 0, d)
        filter_q = _filter(w_ptr, tables, 1, d)
    for at in tl.range(tl.program_id(0), n, tl.num_programs(0), num_stages=STAGES):
        x, row, places, inside = _load_token(x_ptr, x_stride, at, rows, d, SUBSET)
        p, q = _dct(x, constants, d, PRECISION)
        if ENTROPY:
            tl.store(entropy_ptr + at, _entropy(p, q, dc_power_weight, d, PRECISION))
        if MIXING:
            y = _transposed_dct(p * filter_p, q * filter_q, constants, d, PRECISION)
            width: tl.constexpr = d[0] * d[1]
            tl.store(y_ptr + row * width + places, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def backward_kernel(tensors, tables, numbers, d: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
                    flags: tl.constexpr):  # fmt: skip
    """dx of each token, and the sum of dw over all of this program: dw [programs, N].

    flags: whether only of rows[:count], and whether dx is g and added to.
    """
    g_ptr, x_ptr, w_ptr, rows, count, dx_ptr, dw_ptr = tensors
    n, g_stride, x_stride = numbers
    SUBSET: tl.constexpr = flags[0]
    ADDS: tl.constexpr = flags[1]
    if SUBSET:
        n = tl.load(count)
    constants = _constants(tables, d)
    filter_p = _filter(w_ptr, tables, 0, d)
    filter_q = _filter(w_ptr, tables, 1, d)
    T1: tl.constexpr = d[2]  # Triton 3.6 takes no element of a constant tuple as a size
    TJ: tl.constexpr = d[4]
    dw_p = tl.zeros((T1, TJ), tl.float32)
    dw_q = tl.zeros((T1, TJ), tl.float32)
    width: tl.constexpr = d[0] * d[1]
    for at in tl.range(tl.program_id(0), n, tl.num_programs(0), num_stages=STAGES):
        g, row, places, inside = _load_token(g_ptr, g_stride, at, rows, d, SUBSET)
        x, row, places, inside = _load_token(x_ptr, x_stride, at, rows, d, SUBSET)
        p, q = _dct(x, constants, d, PRECISION)
        grad_p, grad_q = _dct(g, constants, d, PRECISION)
        dw_p += p * grad_p
        dw_q += q * grad_q
        dx = _transposed_dct(grad_p * filter_p, grad_q * filter_q, constants, d, PRECISION)
        if ADDS:
            dx += g.to(tl.float32)
        tl.store(dx_ptr + row * width + places, dx.to(dx_ptr.dtype.element_ty), mask=inside)
    # Programs without tokens write their zeros too: the partial sums start uninitialised.
    dw_ptr += tl.program_id(0) * width
    k, scale = _scales(tables, 0, d)
    tl.store(dw_ptr + k, dw_p * scale, mask=k >= 0)
    k, scale = _scales(tables, 1, d)
    tl.store(dw_ptr + k, dw_q * scale, mask=k >= 0)
