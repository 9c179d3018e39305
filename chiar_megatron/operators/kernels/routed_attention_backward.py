"""Gradients of `routed_attention`: one launch for those of queries, then one for those of keys and values."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from chiar_megatron.operators.kernels.routed_attention_key_gradient import key_gradient
from chiar_megatron.operators.kernels.routed_attention_query_gradient import (
    query_gradient,
    space_for_value_sums,
)
from chiar_megatron.operators.kernels.routed_attention_tiles import Saved, score_scale, tuning_of


class After(NamedTuple):
    """What becomes of gradients before they are written; d by `turns_in_kernels`.

    angles: cos and sin of the keys, or of one sequence of them, contiguous float32 [*, d/2], by which the
    gradients of k, and of q as its last key, are rotated back. row_sums, key_sums, value_sums: None, or where
    to add up each block's gradients, [*, n, d] of queries, [*, g, d] of keys and values, by `space_for_sums`;
    those of values only without dropout.
    """

    angles: tuple[Tensor, Tensor]
    row_sums: Tensor | None
    key_sums: Tensor | None
    value_sums: Tensor | None


def space_for_sums(q: Tensor, k: Tensor, blocks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Those of `After`."""
    (_, n, d), (K, g, _) = q.shape, k.shape
    keys = triton.cdiv(K, tuning_of("key_grad", q).block_k)
    options: dict[str, Any] = {"dtype": torch.float32, "device": q.device}
    of_rows, of_keys = torch.empty(blocks.shape[1], n, d, **options), torch.empty(keys, g, d, **options)
    return of_rows, of_keys, space_for_value_sums(q, k, blocks)


def gradients(
    grad: Tensor,
    saved: Saved,
    seed: Tensor | None,
    dropout: tuple[int, float],
    out: tuple[Tensor, ...],
    after: After | None = None,
) -> None:
    """Writes the gradients of q, k and v, for the gradient `grad` [R, n, d] of the output, into `out`: that
    of q contiguous, those of k and v with the same strides, the last of them 1.

    dropout: what `dropout_numbers` says of its probability; it counts where there is a seed.
    """
    saved = saved._replace(first=saved.first.contiguous(), last=saved.last.contiguous())
    dq, dk, dv = out
    if saved.q.numel() == 0 or saved.k.numel() == 0:
        sums = () if after is None else after[1:]
        for empty in (*out, *sums):
            if empty is not None:
                empty.zero_()
        return
    blocks_of = (tuning_of(kernel, saved.q).block_q for kernel in ("forward", "query_grad"))
    assert len(set(blocks_of)) == 1, "the forward pass has cut the rows"
    angles: tuple[Tensor | None, ...] = (None, None)
    of_rows, of_keys, of_values = None, None, None
    if after is not None:
        angles, of_rows, of_keys, of_values = after
    numbers = (score_scale(saved.q.shape[-1]), *dropout)
    found = query_gradient(grad, saved, seed, numbers, dq, (*angles, of_rows, of_values))
    key_gradient(grad, saved, found, seed, numbers, (dk, dv), (*angles, of_keys))
