"""Some of a micro-batch's tokens as rows of their own: taken out, worked on, put back.

N tokens are numbered sequence after sequence (`batch · s + position`); R rows hold some of them in that
order, unused rows at the end. Taking and putting back are each other's adjoint, so neither direction
needs atomic adds, and both are gathers that a compiler can fuse into what stands around them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenRows:
    """Which token stands in which row.

    index_R: int64, the token of each row, ascending; 0 in unused rows.
    valid_R: bool, whether the row is used.
    slot_N: int64, the row of each token; 0 where it has none.
    has_row_N: bool.
    rest_N, rest_count: int32, the tokens without a row, as many as rest_count `[1]` says; None where nobody
        has counted them.
    wanted: float64 `[]`, how many tokens were to have a row, before any cut; None where nobody has counted.
    tally: float64 `[4]`, that number, how many of them found no row, and the sums of all tokens' scores and
        of the scores' squares; None where nobody has counted.
    """

    index_R: Tensor
    valid_R: Tensor
    slot_N: Tensor
    has_row_N: Tensor
    rest_N: Tensor | None = None
    rest_count: Tensor | None = None
    wanted: Tensor | None = None
    tally: Tensor | None = None


def rows_of(chosen_N: Tensor, capacity: int | None = None, wanted: Tensor | None = None) -> TokenRows:
    """The rows of the chosen tokens (bool `[N]`), at most `capacity` of them.

    capacity: number of rows, a constant whatever the choice; None: exactly as many as are chosen, which
    the host must wait for. wanted: see `TokenRows`.
    """
    if capacity is None:
        index_R = chosen_N.nonzero().squeeze(1)
        slot_N = torch.zeros_like(chosen_N, dtype=torch.int64)
        slot_N[index_R] = torch.arange(len(index_R), device=index_R.device)
        valid_R = torch.ones_like(index_R, dtype=torch.bool)
        return TokenRows(index_R, valid_R, slot_N, chosen_N, wanted=wanted)
    count_N = chosen_N.cumsum(0)
    slot_N = torch.where(chosen_N, count_N - 1, 0)
    # What is not chosen is written into one row too many, which is cut off.
    index_R = torch.zeros(capacity + 1, dtype=torch.int64, device=chosen_N.device)
    tokens_N = torch.arange(len(chosen_N), device=chosen_N.device)
    index_R = index_R.scatter(0, torch.where(chosen_N, slot_N, capacity), tokens_N)[:capacity]
    valid_R = torch.arange(capacity, device=chosen_N.device) < count_N[-1]
    return TokenRows(torch.where(valid_R, index_R, 0), valid_R, slot_N, chosen_N, wanted=wanted)


def take_rows(x_NX: Tensor, rows: TokenRows) -> Tensor:
    """`[N, ...]` to `[R, ...]`; unused rows are 0."""
    return _Gather.apply(x_NX, rows.index_R, rows.valid_R, rows.slot_N, rows.has_row_N)  # type: ignore[no-any-return,no-untyped-call]


def put_rows(y_RX: Tensor, rows: TokenRows) -> Tensor:
    """`[R, ...]` to `[N, ...]`; tokens without a row are 0."""
    return _Gather.apply(y_RX, rows.slot_N, rows.has_row_N, rows.index_R, rows.valid_R)  # type: ignore[no-any-return,no-untyped-call]


def as_rows(x_XYH: Tensor) -> tuple[Tensor, bool]:
    """The tokens of `[x, y, h]` as `[N, h]` in the order they have in memory, without a copy where either
    leading dim runs outermost; the flag is True where that is y."""
    swapped = not x_XYH.is_contiguous() and x_XYH.transpose(0, 1).is_contiguous()
    return (x_XYH.transpose(0, 1) if swapped else x_XYH).flatten(0, 1), swapped


def from_rows(y_NX: Tensor, like_XYH: Tensor, swapped: bool) -> Tensor:
    """What belongs to each of `as_rows`' tokens, as `[x, y, ...]`."""
    x, y = like_XYH.shape[:2]
    if swapped:
        return y_NX.view(y, x, *y_NX.shape[1:]).transpose(0, 1)
    return y_NX.view(x, y, *y_NX.shape[1:])


def _gather(values_XH: Tensor, index_Y: Tensor, mask_Y: Tensor) -> Tensor:
    """values[index] where the mask holds, else 0."""
    if values_XH.shape[0] == 0:
        return values_XH.new_zeros(len(index_Y), *values_XH.shape[1:])
    mask = mask_Y.view(-1, *[1] * (values_XH.dim() - 1))
    gathered: Tensor = torch.where(mask, values_XH[index_Y], 0)
    return gathered


class _Gather(torch.autograd.Function):
    """A gather whose adjoint is the gather by the other pair of index and mask."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, index: Tensor, mask: Tensor, index_back: Tensor, mask_back: Tensor
    ) -> Tensor:
        ctx.save_for_backward(index_back, mask_back)
        return _gather(x, index, mask)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _gather(grad, *ctx.saved_tensors), None, None, None, None
