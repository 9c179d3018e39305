"""Tokens as rows: what is taken and put back, and the gradients of both, against plain indexing."""

from __future__ import annotations

from typing import Optional

import numpy as np
import pytest
import torch
from torch import Tensor

from chiar_megatron.operators.rows import TokenRows, as_rows, from_rows, put_rows, rows_of, take_rows

N, H = 37, 5
CHOICES = ["some", "none", "all", "first", "last"]


def choice(name: str) -> Tensor:
    """Which of N tokens get a row; bool."""
    chosen_N = torch.zeros(N, dtype=torch.bool)
    if name == "some":
        chosen_N = torch.rand(N, generator=torch.Generator().manual_seed(1)) < 0.4
    elif name != "none":
        chosen_N[{"all": slice(None), "first": 0, "last": -1}[name]] = True
    return chosen_N


def cases(name: str) -> list[tuple[Tensor, Optional[int], TokenRows]]:
    """Rows without padding, with none to spare, and with some."""
    chosen_N = choice(name)
    count = int(chosen_N.sum())
    return [(chosen_N, capacity, rows_of(chosen_N, capacity)) for capacity in (None, count, count + 6, N + 3)]


@pytest.mark.parametrize("name", CHOICES)
def test_rows_number_the_chosen_tokens_in_order(name):
    for chosen_N, capacity, rows in cases(name):
        expected = np.flatnonzero(chosen_N.numpy())
        size = len(expected) if capacity is None else capacity
        assert rows.index_R.dtype == rows.slot_N.dtype == torch.int64
        assert rows.valid_R.dtype == rows.has_row_N.dtype == torch.bool
        padded = np.zeros(size, dtype=np.int64)
        padded[: len(expected)] = expected
        np.testing.assert_array_equal(rows.index_R, padded)
        np.testing.assert_array_equal(rows.valid_R, np.arange(size) < len(expected))
        slots = np.zeros(N, dtype=np.int64)
        slots[expected] = np.arange(len(expected))
        np.testing.assert_array_equal(rows.slot_N, slots)
        assert torch.equal(rows.has_row_N, chosen_N)


@pytest.mark.parametrize("name", CHOICES)
def test_taking_and_putting_back_is_indexing_with_zeros_elsewhere(name):
    x_NH = torch.randn(N, H, generator=torch.Generator().manual_seed(2)).double()
    for chosen_N, _, rows in cases(name):
        used = int(chosen_N.sum())
        taken_RH = take_rows(x_NH, rows)
        assert torch.equal(taken_RH[:used], x_NH[chosen_N])
        assert taken_RH.shape == (len(rows.index_R), H) and not taken_RH[used:].any()
        # What stands in unused rows must not matter, whatever it is.
        taken_RH = torch.where(rows.valid_R[:, None], taken_RH, torch.nan)
        assert torch.equal(put_rows(taken_RH, rows), torch.where(chosen_N[:, None], x_NH, 0.0))


@pytest.mark.parametrize("name", CHOICES)
@pytest.mark.parametrize("width", [(), (H,), (2, 3)])
def test_each_is_the_adjoint_of_the_other(name, width):
    """<take(x), y> = <x, put(y)> for all x and y, and the backward pass of one is the other."""
    generator = torch.Generator().manual_seed(3)
    for _, _, rows in cases(name):
        x = torch.randn(N, *width, generator=generator, dtype=torch.float64, requires_grad=True)
        y = torch.randn(
            len(rows.index_R), *width, generator=generator, dtype=torch.float64, requires_grad=True
        )
        taken, put = take_rows(x, rows), put_rows(y, rows)
        products = (taken * y).sum().item(), (x * put).sum().item()
        assert products[0] == pytest.approx(products[1], rel=1e-12, abs=1e-12)
        (grad_x,) = torch.autograd.grad(taken, x, y.detach())
        (grad_y,) = torch.autograd.grad(put, y, x.detach())
        assert torch.equal(grad_x, put.detach()) and torch.equal(grad_y, taken.detach())
        assert torch.autograd.gradcheck(lambda a, rows=rows: take_rows(a, rows), x)
        if len(y) > 0:
            assert torch.autograd.gradcheck(lambda a, rows=rows: put_rows(a, rows), y)


def test_gradients_in_unused_rows_are_thrown_away():
    """Attention's backward pass may leave anything there."""
    chosen_N = choice("some")
    rows = rows_of(chosen_N, 30)
    x_NH = torch.randn(N, H, requires_grad=True)
    grad_RH = torch.full((30, H), torch.inf)
    grad_RH[: int(chosen_N.sum())] = 1.0
    take_rows(x_NH, rows).backward(grad_RH)
    assert torch.equal(x_NH.grad, chosen_N[:, None].expand(N, H).float())


@pytest.mark.parametrize("order", ["x outermost", "y outermost", "neither"])
def test_tokens_as_rows_in_the_order_of_memory(order):
    x, y = 3, 4
    whole = torch.randn(x, y, 2 * H, generator=torch.Generator().manual_seed(4))
    tokens_XYH = {
        "x outermost": whole[..., :H].contiguous(),
        "y outermost": whole[..., :H].transpose(0, 1).contiguous().transpose(0, 1),
        "neither": whole[..., :H],
    }[order]
    rows_NH, swapped = as_rows(tokens_XYH)
    assert swapped == (order == "y outermost")
    assert rows_NH.shape == (x * y, H)
    assert rows_NH.data_ptr() == tokens_XYH.data_ptr(), "a copy where none is needed"
    for n, row_H in enumerate(rows_NH):
        i, j = (n % x, n // x) if swapped else (n // y, n % y)
        assert torch.equal(row_H, tokens_XYH[i, j])
    assert torch.equal(from_rows(rows_NH, tokens_XYH, swapped), tokens_XYH)
    numbers_N = torch.arange(x * y)
    back_XY = from_rows(numbers_N, tokens_XYH, swapped)
    expected = numbers_N.view(y, x).T if swapped else numbers_N.view(x, y)
    assert torch.equal(back_XY, expected)
