"""Cross entropy and z-loss, one pass over the logits per direction.

Where tensor-parallel ranks hold shards of the vocabulary, what they exchange is three numbers a token.
The backward pass writes the gradient into the logits' own memory: at 32,768 tokens and 50,304 entries they
are 3.3 GB in bfloat16, the largest tensor of a step.
"""

# Kernels are Triton's language, not typed Python.
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,misc"

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import triton
import triton.language as tl
from torch import Tensor

BLOCK, WARPS = 8192, 8


def cross_entropy(
    logits_NV: Tensor,
    labels_N: Tensor,
    vocab_size: int,
    z_loss: float,
    group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """Cross entropy in nats and `z_loss · (ln Σ exp logits)²` of each token, float32 `[N]`.

    logits_NV: any floating dtype, contiguous rows; entries from `vocab_size` on are padding. Their memory is
    overwritten by the backward pass, which can therefore run only once. group: the ranks that hold shards of
    the vocabulary, with `vocab_size` and labels counted within this one's; other labels lie elsewhere.
    """
    losses: tuple[Tensor, Tensor] = _CrossEntropy.apply(logits_NV, labels_N, vocab_size, z_loss, group)
    return losses


@triton.jit
def _forward_kernel(pointers, stride, vocab_size, BLOCK_V: tl.constexpr):
    logits_ptr, labels_ptr, target_ptr, lse_ptr = pointers
    row = tl.cast(tl.program_id(0), tl.int64)
    top = tl.full([BLOCK_V], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_V], tl.float32)
    for start in range(0, vocab_size, BLOCK_V):
        col = start + tl.arange(0, BLOCK_V)
        x = tl.load(logits_ptr + row * stride + col, mask=col < vocab_size, other=float("-inf")).to(
            tl.float32
        )
        # Each lane keeps a sum of its own; they meet once, after the loop.
        new_top = tl.maximum(top, x)
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
        total = total * tl.exp(top - shift) + tl.exp(x - shift)
        top = new_top
    highest = tl.max(top, 0)
    shift = tl.where(highest == float("-inf"), 0.0, highest)  # a shard may be nothing but padding
    label = tl.load(labels_ptr + row)
    here = (label >= 0) & (label < vocab_size)
    target = tl.load(logits_ptr + row * stride + label, mask=here, other=0.0)
    tl.store(target_ptr + row, target.to(tl.float32))
    tl.store(lse_ptr + row, shift + tl.log(tl.sum(total * tl.exp(top - shift), 0)))


@triton.jit
def _backward_kernel(pointers, stride, width, vocab_size, z_loss, BLOCK_V: tl.constexpr):
    logits_ptr, labels_ptr, lse_ptr, grad_loss_ptr, grad_z_ptr = pointers
    row = tl.cast(tl.program_id(0), tl.int64)
    label = tl.load(labels_ptr + row)
    lse = tl.load(lse_ptr + row)
    grad_loss = tl.load(grad_loss_ptr + row)
    weight = grad_loss + tl.load(grad_z_ptr + row) * (2.0 * z_loss) * lse
    for start in range(0, width, BLOCK_V):
        col = start + tl.arange(0, BLOCK_V)
        place = logits_ptr + row * stride + col
        x = tl.load(place, mask=col < vocab_size, other=float("-inf")).to(tl.float32)
        grad = weight * tl.exp(x - lse) - tl.where(col == label, grad_loss, 0.0)
        tl.store(place, grad.to(logits_ptr.dtype.element_ty), mask=col < width)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        labels: Tensor,
        vocab_size: int,
        z_loss: float,
        group: dist.ProcessGroup | None,
    ) -> tuple[Tensor, Tensor]:
        rows, width = logits.shape
        logits, labels = (x if x.stride(-1) == 1 else x.contiguous() for x in (logits, labels))
        target, lse = torch.empty(2, rows, dtype=torch.float32, device=logits.device)
        block = min(BLOCK, triton.next_power_of_2(width))
        if rows:
            pointers = (logits, labels, target, lse)
            _forward_kernel[(rows,)](pointers, logits.stride(0), vocab_size, block, num_warps=WARPS)
        if group is not None:
            target, lse = _joined(target, lse, group)
        ctx.logits, ctx.vocab_size, ctx.z_loss, ctx.block = logits.detach(), vocab_size, z_loss, block
        ctx.save_for_backward(labels, lse)
        return lse - target, z_loss * lse.square()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, grad_z: Tensor) -> tuple[Tensor | None, ...]:
        (labels, lse), logits, ctx.logits = ctx.saved_tensors, ctx.logits, None
        assert logits is not None, "the gradient has taken the logits' memory"
        rows, width = logits.shape
        if rows:
            _backward_kernel[(rows,)](
                (logits, labels, lse, grad_loss.contiguous(), grad_z.contiguous()),
                *(logits.stride(0), width, ctx.vocab_size, ctx.z_loss, ctx.block),
                num_warps=WARPS,
            )
        return logits, None, None, None, None


def _joined(target_N: Tensor, lse_N: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """Logits of the labels and logarithms of sums over the whole vocabulary, from those of the shards."""
    highest_N = lse_N.clone()
    dist.all_reduce(highest_N, dist.ReduceOp.MAX, group=group)
    both = torch.stack((target_N, torch.exp(lse_N - highest_N)))
    dist.all_reduce(both, group=group)
    return both[0], highest_N + both[1].log()
