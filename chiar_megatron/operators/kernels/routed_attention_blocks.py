"""Which rows each program over query rows of `routed_attention` takes: blocks that end where sequences do.

A block sees all keys up to its last row's. One that held the last rows of a sequence and the first of the
next would go over a sequence's keys for both; cut from the end, what is left over are the first rows of a
sequence, which see few keys. Blocks stand in the order in which programs begin: of sequences taken together
first the last block of each, then the last but one, so that short ones fill the end of a launch.
"""

# Kernels are Triton's language, not typed Python.
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,misc"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from chiar_megatron.operators.kernels.routed_attention_tiles import rows_before, tuning_of

MOST_SEQUENCES = 1024  # that one program looks up
PROGRAMS_AT_ONCE = 512  # a Hopper GPU has room for about 400
MOST_TOGETHER = 16
STEP = tl.constexpr(32)


def empty_blocks(q: Tensor, keys: int, sequences: int, block_q: int | None = None) -> Tensor:
    """Space for `cut_rows`, whatever the rows: [2, blocks] int32. block_q: the forward kernel's."""
    block_q = block_q or tuning_of("forward", q).block_q
    blocks = triton.cdiv(len(q), block_q) + _cut_at(keys, sequences) + 1
    return torch.empty(2, blocks, dtype=torch.int32, device=q.device)


def cut_rows(q: Tensor, keys: int, ranges: tuple[Tensor, Tensor], sequences: int, block_q: int) -> Tensor:
    """First row and one behind the last of each block, [2, blocks] int32, on the device; q: [R, n, d], R > 0.

    ranges: first and last key of each row. Every row is in one block, padding in the last ones; some blocks
    are empty. sequences: of how many, equally long, the keys are; a wrong number only costs time.
    """
    R, n, _ = q.shape
    blocks = empty_blocks(q, keys, sequences, block_q)
    sequences = _cut_at(keys, sequences)
    programs_of_sequence = max(1, R // (block_q * sequences)) * n
    together = min(sequences, MOST_TOGETHER, max(1, PROGRAMS_AT_ONCE // programs_of_sequence))
    together = 1 << (together.bit_length() - 1)
    _cut_kernel[(triton.cdiv(sequences, together) + 1,)](
        (*ranges, blocks),
        (R, keys // sequences, sequences, blocks.shape[1], R.bit_length()),
        triton.next_power_of_2(sequences),
        together,
        block_q,
    )
    return blocks


def _cut_at(keys: int, sequences: int) -> int:
    return sequences if 0 < sequences <= MOST_SEQUENCES and keys % sequences == 0 else 1


@triton.jit
def _cut_kernel(tensors, sizes, SEQUENCES: tl.constexpr, TOGETHER: tl.constexpr, BLOCK_Q: tl.constexpr):
    """A program for each group of sequences, and one for padding and what then remains."""
    first_ptr, last_ptr, blocks_ptr = tensors
    R, length, sequences, blocks, steps = sizes
    sequence = tl.arange(0, SEQUENCES)
    edge = (sequence[:, None] + tl.arange(0, 2)[None, :]) * length
    begin, end = tl.split(rows_before(first_ptr, last_ptr, edge, edge >= 0, (R, steps)))
    count = tl.cdiv(end - begin, BLOCK_Q)
    front = tl.program_id(0) * TOGETHER
    if front >= sequences:
        used, valid = tl.sum(count, 0), tl.max(end, 0)
        for at in tl.range(used, blocks, STEP):
            block = at + tl.arange(0, STEP)
            start = tl.minimum(valid + (block - used) * BLOCK_Q, R)
            tl.store(blocks_ptr + block, start, mask=block < blocks)
            tl.store(blocks_ptr + blocks + block, tl.minimum(start + BLOCK_Q, R), mask=block < blocks)
    else:
        before = tl.sum(tl.where(sequence >= front + TOGETHER, count, 0), 0)
        own = sequence[None, :] == front + tl.arange(0, TOGETHER)[:, None]
        begins = tl.sum(tl.where(own, begin[None, :], 0), 1)[:, None]
        ends = tl.sum(tl.where(own, end[None, :], 0), 1)[:, None]
        counts = tl.cdiv(ends - begins, BLOCK_Q)
        for at in tl.range(0, tl.max(tl.where(own, count[None, :], 0)), STEP):
            turn = at + tl.arange(0, STEP)[None, :]
            there = (turn < counts).to(tl.int32)
            # Blocks of earlier turns, and of this one before it.
            place = tl.sum(tl.minimum(counts, turn), 0)[None, :] + tl.cumsum(there, 0) - there
            stop = ends - turn * BLOCK_Q
            target = blocks_ptr + before + place
            tl.store(target, tl.maximum(stop - BLOCK_Q, begins), mask=there > 0)
            tl.store(target + blocks, stop, mask=there > 0)
