"""Attention of some rows over ranges of keys: each query row sees the keys `first` to `last` of its own.

One primitive for light queries over all tokens of their sequence (`kv: all`: first is where the sequence
or document starts, last the query's own place) and over light tokens alone (`kv: routed`). Rows are
sorted, so a block of queries needs keys only from its smallest `first` to its largest `last`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from chiar_megatron.operators.rotary import rotate, split_and_rotate
from chiar_megatron.runtime.paths import kernels_available

# Query rows that plain PyTorch handles at once: fewer waste less on masked keys, more cost fewer calls.
QUERY_BLOCK = 128
MASKED_BLOCK = 1024  # the same on CUDA in float32, where each block sees all keys through a mask


def routed_attention(
    q_RND: Tensor,
    k_KGD: Tensor,
    v_KGD: Tensor,
    first_R: Tensor,
    last_R: Tensor,
    dropout_p: float = 0.0,
    sequences: int = 1,
) -> Tensor:
    """Softmax attention, scaled by 1/√d, in float32 where inputs are of half precision; `[R, n, d]`.

    q_RND: query rows. k_KGD, v_KGD: keys and values of all K tokens (or rows); each of g groups serves
    n/g query heads. first_R, last_R: int, both ascending over used rows; an unused row (at the end) has
    last < first and gives 0. sequences: of how many, equally long, the keys are; for speed alone. By the
    Triton kernel on CUDA in half precision, else by plain PyTorch.
    """
    if kernels_available(q_RND.device) and q_RND.dtype in (torch.bfloat16, torch.float16):
        from chiar_megatron.operators.kernels import routed_attention as kernel

        seed = _seed(q_RND, dropout_p)
        return kernel.routed_attention(q_RND, k_KGD, v_KGD, first_R, last_R, dropout_p, seed, sequences)
    if q_RND.device.type == "cpu":
        return _by_blocks(q_RND, k_KGD, v_KGD, first_R, last_R, dropout_p)
    # Blocks only bound the mask's memory: where each begins to see keys the host would have to wait for.
    blocks = [slice(at, at + MASKED_BLOCK) for at in range(0, len(q_RND), MASKED_BLOCK)]
    parts = [_attend(q_RND[r], k_KGD, v_KGD, first_R[r], last_R[r], 0, dropout_p) for r in blocks]
    return torch.cat(parts) if parts else _nothing(q_RND, k_KGD, v_KGD)


def rotated_attention(
    q_RND: Tensor,
    kv_KGYD: Tensor,
    angles: tuple[Tensor, Tensor],
    ranges: tuple[Tensor, Tensor],
    dropout_p: float = 0.0,
    bias: Tensor | None = None,
) -> Tensor:
    """`routed_attention` of queries and keys not yet rotated; `[R, n, d]`.

    kv_KGYD: keys and values `[K, g, 2, d]`. angles: cos and sin of the keys, float32 `[K, d/2]`, or of one
    sequence `[s, d/2]` of them. ranges: first and last key of each row, which stands where the latter does.
    bias: `[g·(n/g + 2)·d]` in Megatron's layout, which queries, keys and values have been given without a
    gradient (`bias_for_split`): its gradient is taken here.
    """
    if kernels_available(q_RND.device) and q_RND.dtype in (torch.bfloat16, torch.float16):
        from chiar_megatron.operators.kernels import rotated_attention as kernel

        return kernel.rotated_attention(
            q_RND, kv_KGYD, angles, ranges, dropout_p, _seed(q_RND, dropout_p), bias
        )
    assert bias is None, "see bias_for_split"
    cos_K, sin_K = (table.repeat(len(kv_KGYD) // max(1, len(table)), 1)[:, None] for table in angles)
    place_R = ranges[1].clamp_min(0).long()
    query_RND = rotate(q_RND, cos_K[place_R], sin_K[place_R])
    _, key_KGD, value_KGD = split_and_rotate(kv_KGYD, cos_K, sin_K)
    return routed_attention(query_RND, key_KGD, value_KGD, *ranges, dropout_p)


def _seed(q_RND: Tensor, dropout_p: float) -> Tensor | None:
    """The kernel's dropout draws from its own counter; the seed comes from torch's stream."""
    return torch.randint(2**62, (1,), device=q_RND.device) if dropout_p > 0.0 else None


def _by_blocks(
    q_RND: Tensor, k_KGD: Tensor, v_KGD: Tensor, first_R: Tensor, last_R: Tensor, dropout_p: float
) -> Tensor:
    outputs = []
    used_R = last_R >= first_R
    if not bool(used_R.any()):
        return _nothing(q_RND, k_KGD, v_KGD)
    for start in range(0, len(q_RND), QUERY_BLOCK):
        block = slice(start, start + QUERY_BLOCK)
        first_Q, last_Q, used_Q = first_R[block], last_R[block], used_R[block]
        if not bool(used_Q.any()):
            outputs.append(torch.zeros_like(q_RND[block]))
            continue
        low, high = int(first_Q[used_Q].min()), int(last_Q[used_Q].max()) + 1
        keys, values = k_KGD[low:high], v_KGD[low:high]
        outputs.append(_attend(q_RND[block], keys, values, first_Q, last_Q, low, dropout_p))
    return torch.cat(outputs)


def _nothing(*tensors: Tensor) -> Tensor:
    """Zeros like the first, of which all get gradients, of 0: replicas wait for everyone's gradients."""
    return _Nothing.apply(*tensors)  # type: ignore[no-any-return,no-untyped-call]


class _Nothing(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        return torch.zeros_like(tensors[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.zeros_like(x) for x in ctx.saved_tensors)


def _attend(
    q_RND: Tensor, k_KGD: Tensor, v_KGD: Tensor, first_R: Tensor, last_R: Tensor, low: int, dropout_p: float
) -> Tensor:
    """One call of torch's attention with a mask; the first key given is number `low`."""
    key_K = torch.arange(low, low + len(k_KGD), device=q_RND.device)
    mask_RK = (key_K >= first_R[:, None]) & (key_K <= last_R[:, None])
    used_R = last_R >= first_R
    # An unused row looks at one key, so that its softmax is finite, and is thrown away.
    mask_RK = mask_RK | (~used_R[:, None] & (key_K == low))
    out_1NRD = F.scaled_dot_product_attention(
        q_RND.transpose(0, 1)[None],
        k_KGD.transpose(0, 1)[None],
        v_KGD.transpose(0, 1)[None],
        attn_mask=mask_RK[None, None],
        dropout_p=dropout_p,
        enable_gqa=q_RND.shape[1] != k_KGD.shape[1],
    )
    return torch.where(used_R[:, None, None], out_1NRD[0].transpose(0, 1), 0)
