"""What the forward and backward kernels of `routed_attention` share: tiles, masks, block sizes.

Kernels take their tensors, strides and numbers as tuples, in the order that each one unpacks first.
"""

# Kernels are Triton's language, not typed Python.
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,misc"

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

LOG2_E = 1.4426950408889634
LN_2 = tl.constexpr(math.log(2))
# Seven rounds of Philox pass the usual batteries; ten are its margin for cryptography's sake.
PHILOX_ROUNDS = tl.constexpr(7)


class Saved(NamedTuple):
    """What the forward pass leaves: q, out [R, n, d]; k, v [K, g, d]; first, last [R]; lse [n, R]; blocks of
    rows by `cut_rows`."""

    q: Tensor
    k: Tensor
    v: Tensor
    first: Tensor
    last: Tensor
    out: Tensor
    lse: Tensor
    blocks: Tensor

    def strides(self, grad: Tensor) -> tuple[int, ...]:
        """Of rows and heads: q, k, v and the gradient of the output."""
        return tuple(stride for x in (self.q, self.k, self.v, grad) for stride in x.stride()[:2])


@dataclass(frozen=True)
class Tuning:
    """Block sizes of one kernel: query rows and keys at a time, warps, stages of the load pipeline.

    edge_stages: the same for the loops with masks, whose pipeline takes registers for their pointers.
    tma: tiles come by the tensor memory accelerator where strides allow, in one loop that masks under a
    branch; else by pointers, in one loop without masks between two with them.
    registers: most registers of a thread, which makes room for more blocks side by side (None: no limit).
    """

    block_q: int
    block_k: int
    warps: int
    stages: int
    edge_stages: int = 1
    tma: bool = False
    registers: int | None = None

    def options(self, d: int, *more: int) -> dict[str, Any]:
        """Named arguments of a kernel for head size d; BLOCKS: it, query rows, keys, edge stages, more."""
        return {
            "BLOCKS": (d, self.block_q, self.block_k, self.edge_stages, *more),
            "num_warps": self.warps,
            "num_stages": self.stages,
            "maxnreg": self.registers,
        }

    def descriptors(self, x: Tensor, y: Tensor, rows: int) -> tuple[TensorDescriptor | None, ...]:
        """Descriptors of x and y [*, heads, d] by tiles of `rows` rows of a head, or None twice."""
        width = int(padded_head(x.shape[-1]))
        if not self.tma or x.element_size() > 2 or not all(map(_aligned, (x, y))):
            return None, None
        # Heads come first, so that a tile [1, rows, width] needs no rearrangement.
        turned, block = (z.transpose(0, 1) for z in (x, y)), [1, rows, width]
        return tuple(TensorDescriptor(z, list(z.shape), list(z.stride()), block) for z in turned)


def _aligned(x: Tensor) -> bool:
    """Whether the tensor memory accelerator can read x, by its address and strides."""
    return all(size % 16 == 0 for size in (x.data_ptr(), *(s * x.element_size() for s in x.stride()[:-1])))


def line_descriptors(x: Tensor, y: Tensor, rows: int) -> tuple[TensorDescriptor, ...]:
    """Descriptors of x and y, both by `per_row`, by pieces of `rows` rows of a head."""
    return tuple(TensorDescriptor(z, list(z.shape), list(z.stride()), [1, rows]) for z in (x, y))


def per_row(x: Tensor) -> Tensor:
    """Space for one number [n, R] per head and row of x [R, n, d], lines at multiples of 4 float32."""
    R, n, _ = x.shape
    return torch.empty(n, -(-R // 4) * 4, dtype=torch.float32, device=x.device)[:, :R]


# By kernel and padded head size, for 16-bit inputs on Hopper.
DEFAULTS = {
    ("forward", 64): Tuning(64, 128, 4, 2, tma=True, registers=168),
    ("forward", 128): Tuning(64, 64, 4, 3, tma=True),
    ("query_grad", 64): Tuning(64, 64, 4, 3, tma=True),
    ("query_grad", 128): Tuning(64, 64, 4, 2, tma=True),
    ("key_grad", 64): Tuning(32, 64, 4, 3, tma=True, registers=168),
    ("key_grad", 128): Tuning(64, 64, 4, 2, tma=True),
}
# A sweep sets these, by kernel; they come before the defaults.
OVERRIDES: dict[str, Tuning] = {}


def tuning_of(kernel: str, x: Tensor) -> Tuning:
    """Block sizes for a kernel ("forward", "query_grad", "key_grad") on x [..., d]."""
    if kernel in OVERRIDES:
        return OVERRIDES[kernel]
    block_d = int(padded_head(x.shape[-1]))
    if x.element_size() > 2:  # float32 runs without tensor cores: operands must fit registers
        return Tuning(32, 32, 8, 1) if block_d <= 64 else Tuning(16, 16, 8, 1)
    if block_d > 128:
        return Tuning(32, 32, 8, 1)
    return DEFAULTS[kernel, max(block_d, 64)]


@triton.constexpr_function
def padded_head(d):
    """Head size as the kernels hold it: a power of two, 16 at least, as matrix instructions need."""
    return max(16, 1 << (d - 1).bit_length())


@triton.constexpr_function
def turns_in_kernels(d):
    """Whether kernels can rotate their own tiles: halves of a head must be powers of two."""
    return padded_head(d) == d


def score_scale(d: int) -> float:
    """Factor from q·k to the exponent of 2."""
    return LOG2_E / math.sqrt(d)


def dropout_numbers(p: float) -> tuple[int, float]:
    """What the kernels need of a dropout probability: the threshold of `kept`, and 1/(1-p)."""
    return round(p * 2**31), 1 / (1 - p)


@triton.jit
def load_tile(base, start, stride, stop, ROWS: tl.constexpr, HEAD: tl.constexpr, MASKED: tl.constexpr):
    """Rows start.. of a matrix [*, HEAD] with padded columns; if MASKED, those from `stop` on are 0."""
    BLOCK_D: tl.constexpr = padded_head(HEAD)
    row = tl.arange(0, ROWS)
    col = tl.arange(0, BLOCK_D)
    # 64 bits for the tile's place only: inside the tile 32 bits do, and they stay constant in a loop.
    pointers = base + tl.cast(start, tl.int64) * stride + (row[:, None] * stride + col[None, :])
    if MASKED:
        mask = (row < stop - start)[:, None] & (col < HEAD)[None, :]
        tile = tl.load(pointers, mask=mask, other=0.0)
    elif HEAD < BLOCK_D:
        tile = tl.load(pointers, mask=(col < HEAD)[None, :], other=0.0)
    else:
        tile = tl.load(pointers)
    return tile


@triton.jit
def load_described(descriptor, head, start, ROWS: tl.constexpr, HEAD: tl.constexpr):
    """As `load_tile` of one head, by `Tuning.descriptors`; rows before the first and after the last are 0."""
    return descriptor.load([head, start, 0]).reshape([ROWS, padded_head(HEAD)])


@triton.jit
def load_line(descriptor, head, start, ROWS: tl.constexpr):
    """Numbers of rows start.. of one head, start a multiple of 4, by `line_descriptors`."""
    return descriptor.load([head, start]).reshape([ROWS])


@triton.jit
def line(head, R):
    """Where a head's numbers begin in the memory that `per_row` gives."""
    return tl.cast(head, tl.int64) * (tl.cdiv(R, 4) * 4)


@triton.jit
def store_tile(base, start, stride, stop, tile, HEAD: tl.constexpr):
    """Write the rows of `tile` below `stop` to rows start.. of a matrix [*, HEAD]."""
    row = tl.arange(0, tile.shape[0])
    col = tl.arange(0, tile.shape[1])
    pointers = base + tl.cast(start, tl.int64) * stride + (row[:, None] * stride + col[None, :])
    mask = (row < stop - start)[:, None] & (col < HEAD)[None, :]
    tl.store(pointers, tile.to(base.dtype.element_ty), mask=mask)


@triton.jit
def turned_back(tile, angles, place, factor, HEAD: tl.constexpr):
    """factor times tile [rows, HEAD] float32, rotated back by the angles at `place` [rows].

    angles: pointers to cos and sin [*, HEAD/2] float32.
    """
    cos_ptr, sin_ptr = angles
    HALF: tl.constexpr = HEAD // 2
    ROWS: tl.constexpr = tile.shape[0]
    first, second = tl.split(tl.permute(tl.reshape(tile, [ROWS, 2, HALF]), [0, 2, 1]))
    angle = tl.cast(place, tl.int64)[:, None] * HALF + tl.arange(0, HALF)[None, :]
    cos, sin = tl.load(cos_ptr + angle) * factor, tl.load(sin_ptr + angle) * factor
    both = tl.join(first * cos + second * sin, second * cos - first * sin)
    return tl.reshape(tl.permute(both, [0, 2, 1]), [ROWS, HEAD])


@triton.jit
def finished(tile, after, place, factor, line_of_sums, HEAD: tl.constexpr):
    """factor times the gradient `tile` of rotated rows, rotated back where there are angles at `place`.

    after: pointers to cos, sin and, if they are wanted, sums over rows: they go to that line.
    """
    cos_ptr, sin_ptr, sums_ptr = after
    if cos_ptr is None:
        tile *= factor
    else:
        tile = turned_back(tile, (cos_ptr, sin_ptr), place, factor, HEAD)
        if sums_ptr is not None:
            tl.store(sums_ptr + line_of_sums * HEAD + tl.arange(0, HEAD), tl.sum(tile, 0))
    return tile


@triton.jit
def rows_before(first_ptr, last_ptr, edge, by_last, sizes):
    """How many rows, padding left out, have last < edge where by_last holds, else first <= edge."""
    R, steps = sizes
    low = edge * 0
    high = low + R
    for _ in range(steps):
        middle = (low + high) >> 1
        open_ = low < high
        first = tl.load(first_ptr + middle, mask=open_, other=0)
        last = tl.load(last_ptr + middle, mask=open_, other=-1)
        # Padding rows stand at the end: beyond every key, both stay sorted.
        counts = tl.where(by_last, last < edge, first <= edge) & (first <= last)
        low = tl.where(open_ & counts, middle + 1, low)
        high = tl.where(open_ & (counts == 0), middle, high)
    return low


@triton.jit
def within(x, low, stop):
    """low <= x < stop for int32, by one comparison; anything where stop < low."""
    return (x - low).to(tl.uint32, bitcast=True) < (stop - low).to(tl.uint32, bitcast=True)


@triton.jit
def key_range(first_ptr, last_ptr, start, row_stop, BLOCK_Q: tl.constexpr):
    """Ranges of the rows from start on and before row_stop, and of their block: low, mid, mid_stop, stop.

    Some valid row sees keys of [low, stop), all of them see [mid, mid_stop). Without a valid row both
    are empty. Padding rows and those from row_stop on have last < first.
    """
    NEVER: tl.constexpr = 2**31 - 2
    row = start + tl.arange(0, BLOCK_Q)
    first = tl.load(first_ptr + row, mask=row < row_stop, other=1)
    last = tl.load(last_ptr + row, mask=row < row_stop, other=0)
    # Both are sorted, padding stands last: the first row has the least of both, the last valid one the most.
    least = tl.load(first_ptr + start, mask=start < row_stop, other=1)
    some = tl.load(last_ptr + start, mask=start < row_stop, other=0)
    low = tl.where(some < least, NEVER, least)
    mid_stop = tl.where(some < least, NEVER, some) + 1
    end = row_stop - 1
    mid, most = tl.load(first_ptr + end), tl.load(last_ptr + end)
    if most < mid:
        both = (tl.cast(last, tl.int64) << 32) | tl.cast(first, tl.int64)
        found = tl.max(tl.where(first <= last, both, -1), 0)
        mid, most = tl.cast(found, tl.int32), tl.cast(found >> 32, tl.int32)
    return first, last, low, mid, mid_stop, most + 1


@triton.jit
def inner_range(low, mid, mid_stop, stop, BLOCK: tl.constexpr):
    """Cut [low, stop) in three, at steps of BLOCK: the middle lies within [mid, mid_stop)."""
    inner = tl.minimum(low + tl.cdiv(tl.maximum(mid - low, 0), BLOCK) * BLOCK, stop)
    outer = inner + tl.maximum(tl.minimum(mid_stop, stop) - inner, 0) // BLOCK * BLOCK
    return inner, outer


@triton.jit
def kept(seed_ptr, head, row, key, threshold):
    """Which attention probabilities dropout keeps: a function of seed, head, row and key alone.

    row and key broadcast against each other, in either order. Each has a counter word of its own, so
    nothing overflows below 2^31 rows and keys.
    """
    zero = (row + key) * 0
    word, _, _, _ = tl.philox(tl.load(seed_ptr), row + zero, key + zero, head + zero, zero, PHILOX_ROUNDS)
    # 31 bits, since integer arguments of kernels are signed.
    return (word >> 1).to(tl.int32) >= threshold


@triton.jit
def _kept_kernel(out_ptr, seed_ptr, K, threshold, BLOCK: tl.constexpr):
    row, head = tl.program_id(0), tl.program_id(1)
    for start in range(0, K, BLOCK):
        key = start + tl.arange(0, BLOCK)
        mask = kept(seed_ptr, head, row, key, threshold)
        place = (tl.cast(head, tl.int64) * tl.num_programs(0) + row) * K
        tl.store(out_ptr + place + key, mask.to(tl.int8), mask=key < K)


def dropout_mask(seed: Tensor, R: int, n: int, K: int, p: float) -> Tensor:
    """The kept probabilities as a mask [n, R, K], True where kept: for tests, as it is large.

    seed: int64 [1], as `routed_attention` takes it.
    """
    kept_nRK = torch.empty(n, R, K, dtype=torch.int8, device=seed.device)
    if kept_nRK.numel():
        _kept_kernel[R, n](kept_nRK, seed, K, dropout_numbers(p)[0], BLOCK=64)
    return kept_nRK.bool()
