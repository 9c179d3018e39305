"""Attention of selected query rows over ranges of keys, as one Triton kernel per direction.

    out[r] = Σ_k softmax_k(q[r]·k / √d) v[k]        over the keys first[r] <= k <= last[r]

Keys stand in one flat array over all sequences, query rows in another, in the same order: so one
primitive serves light queries against all keys of their sequence and light rows against light rows,
with or without document boundaries. Work grows with the number of query rows, not with the positions.
"""

# Kernels are Triton's language, not typed Python.
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,misc"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from chiar_megatron.operators.kernels.routed_attention_backward import After, gradients
from chiar_megatron.operators.kernels.routed_attention_blocks import cut_rows, empty_blocks
from chiar_megatron.operators.kernels.routed_attention_tiles import (
    Saved,
    dropout_numbers,
    inner_range,
    kept,
    key_range,
    line,
    load_described,
    load_tile,
    padded_head,
    per_row,
    score_scale,
    store_tile,
    tuning_of,
)


def routed_attention(
    q_RND: Tensor,
    k_KGD: Tensor,
    v_KGD: Tensor,
    first_R: Tensor,
    last_R: Tensor,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    sequences: int = 1,
) -> Tensor:
    """Softmax attention of each query row over its range of keys, scale 1/√d.

    q: [R, n, d]; k, v: [K, g, d] with n a multiple of g, float32 or 16 bits, d <= 256, any strides with
    a contiguous last dimension; all of k and v is finite. first, last: [R] int32, inclusive; both must not
    decrease, except that rows with last < first (padding) may stand at the end: their output and gradient
    are 0. dropout_p: dropout of the probabilities, drawn from seed, int64 [1] on the device (None: from
    torch's generator). sequences: of how many, equally long, the keys are; for speed alone.
    Returns [R, n, d], contiguous, in q's dtype. Results and gradients repeat bit for bit.
    """
    assert q_RND.ndim == k_KGD.ndim == 3 and k_KGD.shape == v_KGD.shape, (q_RND.shape, k_KGD.shape)
    assert q_RND.shape[1] % k_KGD.shape[1] == 0 and q_RND.shape[2] == k_KGD.shape[2] <= 256, q_RND.shape
    assert q_RND.dtype == k_KGD.dtype == v_KGD.dtype, (q_RND.dtype, k_KGD.dtype, v_KGD.dtype)
    assert first_R.dtype == last_R.dtype == torch.int32 and 0 <= dropout_p < 1
    if dropout_p == 0:
        seed = None
    elif seed is None:
        seed = torch.randint(2**62, (1,), device=q_RND.device)
    out: Tensor = _forward_op(q_RND, k_KGD, v_KGD, first_R, last_R, seed, dropout_p, sequences)[0]
    return out


@triton.jit
def _attend(
    state,
    kv,
    span,
    rows,
    numbers,
    HEAD: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EDGE: tl.constexpr,
):
    """Online softmax of one block of rows over the keys start..stop-1.

    EDGE: 0 where every row of the block sees all of these keys, else the stages of a loop with masks. Below 0
    tiles come by descriptors: kv then has a descriptor and the head's number for each of k and v, instead of
    a pointer to the head and the stride of a row. At -1 every row sees the keys up to `all_stop`, so that
    only the others are masked, and by one comparison.
    """
    acc, top, total = state  # top: largest exponent so far; acc and total are relative to it
    k_base, k_step, v_base, v_step = kv
    start, all_stop, stop = span
    q, row, first, last = rows
    scale, seed_ptr, head, threshold, keep_scale = numbers
    TMA: tl.constexpr = EDGE < 0
    STAGES: tl.constexpr = EDGE if EDGE > 0 else None
    for at in tl.range(start, stop, BLOCK_K, num_stages=STAGES):
        if TMA:
            k = load_described(k_base, k_step, at, BLOCK_K, HEAD)
        else:
            k = load_tile(k_base, at, k_step, stop, BLOCK_K, HEAD, EDGE > 0)
        s = tl.dot(q, tl.trans(k), input_precision="ieee")
        key = at + tl.arange(0, BLOCK_K)
        if EDGE != 0:
            if EDGE == -1:
                if at + BLOCK_K > all_stop:
                    s = tl.where(key[None, :] <= last[:, None], s, float("-inf"))
            else:
                # Not `within`: with it, ptxas makes every matrix instruction wait for the one before.
                seen = (key[None, :] >= first[:, None]) & (key[None, :] <= last[:, None])
                s = tl.where(seen, s, float("-inf"))
        new_top = tl.maximum(top, tl.max(s, 1) * scale)
        # A row that has seen no key yet stays at -inf, and -inf - -inf is no number.
        shift = tl.where(new_top == float("-inf"), 0.0, new_top) if EDGE != 0 else new_top
        p = tl.exp2(s * scale - shift[:, None])
        old = tl.exp2(top - shift)
        total = total * old + tl.sum(p, 1)
        if seed_ptr is not None:
            p = tl.where(kept(seed_ptr, head, row[:, None], key[None, :], threshold), p * keep_scale, 0.0)
        if TMA:
            v = load_described(v_base, v_step, at, BLOCK_K, HEAD)
        else:
            v = load_tile(v_base, at, v_step, stop, BLOCK_K, HEAD, EDGE > 0)
        acc = tl.dot(p.to(v.dtype), v, acc * old[:, None], input_precision="ieee")
        top = new_top
    return acc, top, total


@triton.jit
def _forward_kernel(
    tensors,
    k_tiles,
    v_tiles,
    strides,
    sizes,
    numbers,
    BLOCKS: tl.constexpr,
):
    HEAD: tl.constexpr = BLOCKS[0]
    BLOCK_Q: tl.constexpr = BLOCKS[1]
    BLOCK_K: tl.constexpr = BLOCKS[2]
    EDGE_STAGES: tl.constexpr = BLOCKS[3]
    BLOCK_D: tl.constexpr = padded_head(HEAD)
    q_ptr, k_ptr, v_ptr, first_ptr, last_ptr, blocks_ptr, out_ptr, lse_ptr, seed_ptr = tensors
    q_row, q_head, k_row, k_head, v_row, v_head = strides
    R, heads, group = sizes
    scale, threshold, keep_scale = numbers
    block = tl.program_id(0) // heads
    head = tl.program_id(0) % heads
    start, row_stop = tl.load(blocks_ptr + block), tl.load(blocks_ptr + tl.num_programs(0) // heads + block)
    row = start + tl.arange(0, BLOCK_Q)
    q = load_tile(q_ptr + tl.cast(head, tl.int64) * q_head, start, q_row, row_stop, BLOCK_Q, HEAD, True)
    first, last, low, mid, mid_stop, stop = key_range(first_ptr, last_ptr, start, row_stop, BLOCK_Q)
    rows = (q, row, first, last)
    extra = (scale, seed_ptr, head, threshold, keep_scale)
    top = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    acc = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    state = (acc, top, total)
    if k_tiles is not None:
        kv = (k_tiles, head // group, v_tiles, head // group)
        inner, _ = inner_range(low, mid, mid_stop, stop, BLOCK_K)
        state = _attend(state, kv, (low, low, inner), rows, extra, HEAD, BLOCK_K, -2)
        state = _attend(state, kv, (inner, mid_stop, stop), rows, extra, HEAD, BLOCK_K, -1)
    else:
        k_base = k_ptr + tl.cast(head // group, tl.int64) * k_head
        v_base = v_ptr + tl.cast(head // group, tl.int64) * v_head
        kv = (k_base, k_row, v_base, v_row)
        # Only the edges of the block's range need masks.
        inner, outer = inner_range(low, mid, mid_stop, stop, BLOCK_K)
        state = _attend(state, kv, (low, low, inner), rows, extra, HEAD, BLOCK_K, EDGE_STAGES)
        state = _attend(state, kv, (inner, inner, outer), rows, extra, HEAD, BLOCK_K, 0)
        state = _attend(state, kv, (outer, outer, stop), rows, extra, HEAD, BLOCK_K, EDGE_STAGES)
    acc, top, total = state
    # Padding rows may have met their neighbours' keys in the unmasked loop.
    valid = first <= last
    acc = tl.where(valid[:, None], acc * (1.0 / tl.where(valid, total, 1.0))[:, None], 0.0)
    out_base = out_ptr + tl.cast(head, tl.int64) * HEAD
    store_tile(out_base, start, heads * HEAD, row_stop, acc, HEAD)
    # An infinite logsumexp makes every probability of a padding row 0 in the backward pass.
    lse = tl.where(valid, top + tl.log2(tl.where(valid, total, 1.0)), float("inf"))
    tl.store(lse_ptr + line(head, R) + row, lse, mask=row < row_stop)


def attend(
    q: Tensor,
    kv: tuple[Tensor, Tensor],
    ranges: tuple[Tensor, Tensor],
    seed: Tensor | None,
    dropout_p: float,
    sequences: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output [R, n, d]; logsumexp of the scores, to base 2, [n, R] float32 by `per_row`; blocks of rows."""
    (k, v), (first, last) = kv, ranges
    (R, n, d), g = q.shape, k.shape[1]
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    first, last = first.contiguous(), last.contiguous()
    out = torch.empty(R, n, d, dtype=q.dtype, device=q.device)
    lse = per_row(q)
    if out.numel() == 0:
        return out, lse, empty_blocks(q, len(k), sequences)
    tuning = tuning_of("forward", q)
    blocks = cut_rows(q, len(k), (first, last), sequences, tuning.block_q)
    threshold, keep_scale = dropout_numbers(dropout_p)
    _forward_kernel[(blocks.shape[1] * n,)](
        (q, k, v, first, last, blocks, out, lse, seed),
        *tuning.descriptors(k, v, tuning.block_k),
        (*q.stride()[:2], *k.stride()[:2], *v.stride()[:2]),
        (R, n, n // g),
        (score_scale(d), threshold, keep_scale),
        **tuning.options(d),
    )
    return out, lse, blocks


def gradients_of(
    grad: Tensor,
    saved: list[Tensor],
    seed: Tensor | None,
    dropout_p: float,
    out: tuple[Tensor, ...],
    after: After | None = None,
) -> None:
    """Writes those of q, k and v into `out`, whose strides are for `gradients` to say; saved: what `attend`
    took and gave."""
    q, k, v, *rest = saved
    q, k, v, grad = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v, grad))
    gradients(grad, Saved(q, k, v, *rest), seed, dropout_numbers(dropout_p), out, after)


_LIBRARY = "chiar_megatron"
_FORWARD = (
    "(Tensor q, Tensor k, Tensor v, Tensor first, Tensor last, Tensor? seed, float dropout_p, int sequences) "
    "-> (Tensor, Tensor, Tensor)"
)
_BACKWARD = "(Tensor grad, Tensor[] saved, Tensor? seed, float dropout_p) -> Tensor[]"


@torch.library.custom_op(f"{_LIBRARY}::routed_attention", mutates_args=(), schema=_FORWARD)
def _forward_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    first: Tensor,
    last: Tensor,
    seed: Tensor | None,
    dropout_p: float,
    sequences: int,
) -> tuple[Tensor, Tensor, Tensor]:
    return attend(q, (k, v), (first, last), seed, dropout_p, sequences)


@_forward_op.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, first: Tensor, last: Tensor, seed: Any, dropout_p: float, sequences: int
) -> tuple[Tensor, Tensor, Tensor]:
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    return out, per_row(q), empty_blocks(q, len(k), sequences)


@torch.library.custom_op(f"{_LIBRARY}::routed_attention_backward", mutates_args=(), schema=_BACKWARD)
def _backward_op(grad: Tensor, saved: list[Tensor], seed: Tensor | None, dropout_p: float) -> list[Tensor]:
    """Gradients of q, k and v, contiguous; saved: by the names of `Saved`."""
    out = tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in saved[:3])
    gradients_of(grad, saved, seed, dropout_p, out)
    return list(out)


@_backward_op.register_fake
def _(grad: Tensor, saved: list[Tensor], *_: Any) -> list[Tensor]:
    return [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in saved[:3]]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, first, last, seed, ctx.dropout_p, _ = inputs
    ctx.save_for_backward(q, k, v, first, last, *output, seed)


def _backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    *saved, seed = ctx.saved_tensors
    return (*_backward_op(grad, saved, seed, ctx.dropout_p), *[None] * 5)


_forward_op.register_autograd(_backward, setup_context=_save)
