"""Rows of attention on their way into and out of the tensor-parallel ranks, moving as little as can be.

Under sequence parallelism each rank holds a part of the tokens and all ranks need all rows. Either all
tokens are gathered, or each rank writes its own rows into a zeroed buffer of all R rows and the buffers are
summed. The buffer cannot overflow wherever rows lie; the sum moves twice its size, so it is taken where
2·R is below the number of tokens: what moves then falls with the share of light tokens.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from chiar_megatron.operators.parallel_linear import enter_tensor_parallel, leave_tensor_parallel
from chiar_megatron.operators.rows import TokenRows, put_rows, take_rows
from chiar_megatron.operators.transfers import sum_over_ranks


def enter_rows(config: TransformerConfig, group: Any, x_BSH: Tensor, rows: TokenRows) -> Tensor:
    """The rows `[R, h]` on every rank of the group, from each rank's part `[b, own s, h]` of the tokens;
    gradients of the ranks are added up. rows: numbered over all tokens of the group."""
    if config.tensor_model_parallel_size == 1:
        return take_rows(x_BSH.flatten(0, 1), rows)
    if not config.sequence_parallel:
        return sum_over_ranks(take_rows(x_BSH.flatten(0, 1), rows), group, False, True)
    if not sums_rows(rows):
        return take_rows(enter_tensor_parallel(config, group, x_BSH).flatten(0, 1), rows)
    own_RH = take_rows(x_BSH.flatten(0, 1), _rows_of_part(rows, x_BSH.shape[0], group))
    return sum_over_ranks(own_RH, group, True, True)


def leave_rows(config: TransformerConfig, group: Any, partial_RH: Tensor, rows: TokenRows, b: int) -> Tensor:
    """Each rank's part `[b, own s, h]` of the tokens, from its share of a sum over ranks of rows; tokens
    without a row are 0."""
    sequence_parallel = config.sequence_parallel
    if sequence_parallel and not sums_rows(rows):
        return leave_tensor_parallel(config, group, put_rows(partial_RH, rows).unflatten(0, (b, -1)))
    if config.tensor_model_parallel_size > 1:
        partial_RH = sum_over_ranks(partial_RH, group, True, sequence_parallel)
    own = _rows_of_part(rows, b, group) if sequence_parallel else rows
    out_BSH: Tensor = put_rows(partial_RH, own).unflatten(0, (b, -1))
    return out_BSH


def sums_rows(rows: TokenRows) -> bool:
    """Whether, under sequence parallelism, rows alone are moved rather than all tokens."""
    return 2 * len(rows.index_R) < len(rows.has_row_N)


def _rows_of_part(rows: TokenRows, b: int, group: dist.ProcessGroup) -> TokenRows:
    """The same R rows of b sequences, numbered within this rank's part of the tokens; of those that lie
    elsewhere none is used."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    own = len(rows.has_row_N) // (b * size)  # tokens of one sequence
    sequence_R = rows.index_R // (own * size)
    place_R = rows.index_R % (own * size) - rank * own
    here_R = rows.valid_R & (place_R >= 0) & (place_R < own)
    slot_N, has_row_N = (x.view(b, size, own)[:, rank].flatten() for x in (rows.slot_N, rows.has_row_N))
    return TokenRows(torch.where(here_R, sequence_R * own + place_R, 0), here_R, slot_N, has_row_N)
