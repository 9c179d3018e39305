"""Attention where context-parallel ranks hold parts of each sequence: heads change places, tokens do not.

Each rank projects its own tokens, then an all-to-all gives it some heads of the whole sequence, so that
attention itself is that of one process with fewer heads; a second one brings the outputs back (Jacobs et
al., 2023, DeepSpeed-Ulysses). Of a routed layer only light tokens' queries and outputs travel: wherever the
light tokens lie, every rank gets all of them for its heads, hence equal work.

Every buffer has a fixed size, and none can overflow: a rank sends `min(R, tokens it holds)` rows, the most
light tokens it can have. Both directions split evenly, so no size is read on the host.
P ranks; R rows of the whole micro-batch, of which a rank owns O at most; n query heads, g key-value groups.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from chiar_megatron.operators.rows import TokenRows, put_rows, rows_of, take_rows
from chiar_megatron.operators.transfers import all_to_all


@dataclass(frozen=True)
class PartedRows:
    """Rows of whole sequences, and where the ranks hold them.

    own: this rank's, numbered within its own tokens; O of them.
    arrived: all R, numbered within what arrives: each rank's O, rank after rank.
    """

    own: TokenRows
    arrived: TokenRows


def key_value_copies(groups: int, size: int) -> int:
    """How often each of some key-value groups is sent, so that they go round `size` ranks."""
    return math.lcm(groups, size) // groups


class HeadExchange:
    """Swaps parts of sequences for heads among the context-parallel ranks; gradients go the same way back."""

    def __init__(self, group: dist.ProcessGroup, heads: int, groups: int) -> None:
        """heads, groups: query heads and key-value groups of this tensor-parallel rank. Groups that do not
        go round are replicated: the least common multiple of both numbers is sent."""
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        assert heads % self.size == 0 and heads % groups == 0, "checked with the config"
        self.copies = key_value_copies(groups, self.size)

    def sequences(
        self, query_BSND: Tensor, key_BSGD: Tensor, value_BSGD: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`[b, s / P, all heads, d]` to `[b, s, some heads, d]`."""
        arrived = self._to_heads(query_BSND, self._copied(key_BSGD), self._copied(value_BSGD))
        query_BSND, key_BSGD, value_BSGD = (_joined(x) for x in arrived)
        return query_BSND, key_BSGD, value_BSGD

    def tokens(self, x_BSND: Tensor) -> Tensor:
        """`[b, s, some heads, d]` back to `[b, s / P, all heads, d]`."""
        return self._to_tokens(x_BSND.unflatten(1, (self.size, -1)).transpose(0, 1))

    def rows(self, x_OND: Tensor, parted: PartedRows) -> Tensor:
        """Own rows `[O, all heads, d]` to all rows `[R, some heads, d]`."""
        (arrived,) = self._to_heads(x_OND)
        return take_rows(arrived.flatten(0, 1), parted.arrived)

    def keys_and_values(self, kv_KGYD: Tensor, b: int, parted: PartedRows | None) -> Tensor:
        """Those `[K, all groups, 2, d]` of own tokens of b sequences or, with `parted`, of own rows, to all
        tokens' or rows' `[K, some groups, 2, d]`."""
        (arrived,) = self._to_heads(self._copied(kv_KGYD.flatten(2)))
        if parted is None:
            joined = _joined(arrived.unflatten(1, (b, -1))).flatten(0, 1)
        else:
            joined = take_rows(arrived.flatten(0, 1), parted.arrived)
        return joined.unflatten(2, (2, -1))  # type: ignore[no-any-return]

    def own_rows(self, x_RND: Tensor, parted: PartedRows) -> Tensor:
        """All rows `[R, some heads, d]` back to own rows `[O, all heads, d]`."""
        return self._to_tokens(put_rows(x_RND, parted.arrived).unflatten(0, (self.size, -1)))

    def part(self, rows: TokenRows, b: int) -> PartedRows:
        """Whose is each row of b sequences. No host synchronisation."""
        tokens = len(rows.has_row_N) // self.size
        most = min(len(rows.index_R), tokens)
        has_row_PN, slot_PN = (self._by_rank(x_N, b) for x_N in (rows.has_row_N, rows.slot_N))
        count_PN = has_row_PN.cumsum(1)
        first_P1 = most * torch.arange(self.size, device=count_PN.device)[:, None]
        place_PN = torch.where(has_row_PN, first_P1 + count_PN - 1, 0)
        place_N = place_PN.view(self.size, b, -1).transpose(0, 1).flatten()
        index_R = torch.where(rows.valid_R, place_N[rows.index_R], 0)
        # What has no row is written into one place too many, which is cut off.
        places = self.size * most
        slot_Q = torch.zeros(places + 1, dtype=torch.int64, device=place_N.device)
        target_PN = torch.where(has_row_PN, place_PN, places)
        slot_Q = slot_Q.scatter(0, target_PN.flatten(), slot_PN.flatten())[:places]
        used_PO = torch.arange(most, device=place_N.device) < count_PN[:, -1:]
        arrived = TokenRows(index_R, rows.valid_R, slot_Q, used_PO.flatten())
        return PartedRows(rows_of(has_row_PN[self.rank], most), arrived)

    def _by_rank(self, x_N: Tensor, b: int) -> Tensor:
        """`[P, tokens of a rank]`, in each rank's own order."""
        return x_N.view(b, self.size, -1).transpose(0, 1).flatten(1)

    def _copied(self, x_XGD: Tensor) -> Tensor:
        return x_XGD if self.copies == 1 else x_XGD.repeat_interleave(self.copies, dim=-2)

    def _to_heads(self, *parts_XND: Tensor) -> tuple[Tensor, ...]:
        """`[..., all heads, d]` each, in one transfer, to `[P, ..., some heads, d]`: of every rank."""
        by_rank = [x.unflatten(-2, (self.size, -1)).movedim(-3, 0) for x in parts_XND]
        arrived = all_to_all(self.group, torch.cat(by_rank, dim=-2))
        return arrived.split([x.shape[-2] for x in by_rank], dim=-2)  # type: ignore[no-any-return]

    def _to_tokens(self, x_PXND: Tensor) -> Tensor:
        """`[P, ..., some heads, d]`, for every rank, to `[..., all heads, d]`."""
        return all_to_all(self.group, x_PXND).movedim(0, -3).flatten(-3, -2)  # type: ignore[no-any-return]


def _joined(x_PBSND: Tensor) -> Tensor:
    """Parts of b sequences as whole ones, `[b, s, heads, d]`."""
    return x_PBSND.transpose(0, 1).flatten(1, 2)
