"""What a token passes on to later ones besides keys and values: its document, and sums of embeddings.

Shapes: b batch, s new tokens, t cached and new ones, h hidden.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer


@dataclass
class Memory:
    """documents_BT: number of each token's document. sums_BSH, counts_BS1: of the embeddings from the start
    of its document up to each token."""

    documents_BT: Tensor | None = None
    sums_BSH: Tensor | None = None
    counts_BS1: Tensor | None = None


def remember(
    x_BSH: Tensor,
    end_BS: Tensor | None,
    present_BS: Tensor | None,
    pools: bool,
    cache: Cache | None,
    slot: int,
) -> Memory:
    """The memory of new tokens, which `slot` of the cache, if there is one, then holds.

    end_BS: bool, tokens that end a document; None: one document. present_BS: bool, False for padding.
    pools: whether sums are wanted.
    """
    b, s, _ = x_BSH.shape
    past_key, past_value = _past(cache, slot)
    ends_BS = torch.zeros(b, s, device=x_BSH.device) if end_BS is None else end_BS.float()
    before_B1 = 0.0 if past_key is None else past_key[:, 0, -1:, 1]
    closed_BS = ends_BS.cumsum(dim=1) + before_B1
    document_BS = closed_BS - ends_BS
    sums = torch.zeros(b, s, 1, device=x_BSH.device)
    if pools:
        sums = _prefix_sums(x_BSH, document_BS, present_BS, end_BS is None, past_key, past_value)
    key = torch.stack((document_BS, closed_BS), dim=-1)[:, None]
    if cache is not None:
        key, _ = cache.update(key, sums[:, None], slot)
    memory = Memory(None if end_BS is None else key[:, 0, :, 0].round().long())
    if pools:
        memory.sums_BSH, memory.counts_BS1 = sums[..., :-1], sums[..., -1:].clamp_min(1.0)
    return memory


def _past(cache: Cache | None, slot: int) -> tuple[Tensor | None, Tensor | None]:
    if cache is None:
        return None, None
    while len(cache.layers) <= slot:  # one made for a model of so many layers has no more
        cache.layers.append(DynamicLayer())
    layer: Any = cache.layers[slot]
    if layer.get_seq_length() == 0:
        return None, None
    return layer.keys, layer.values


def _prefix_sums(
    x_BSH: Tensor,
    document_BS: Tensor,
    present_BS: Tensor | None,
    is_one_document: bool,
    past_key: Tensor | None,
    past_value: Tensor | None,
) -> Tensor:
    """Sums of the embeddings, and last their number, `[b, s, h + 1]` float32."""
    ones_BS1 = torch.ones_like(x_BSH[..., :1], dtype=torch.float32)
    counted = torch.cat((x_BSH.float(), ones_BS1), dim=-1)
    if present_BS is not None:
        counted = counted * present_BS[..., None]
    if is_one_document:
        sums = counted.cumsum(dim=1)
    else:  # no difference of sums: no document's tokens reach the rounding of the next
        same = (document_BS[:, :, None] == document_BS[:, None, :]).float()
        sums = same.tril() @ counted
    if past_key is None or past_value is None:
        return sums
    continues = document_BS[..., None] == past_key[:, 0, -1:, :1]
    return sums + past_value[:, 0, -1:] * continues
