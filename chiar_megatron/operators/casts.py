"""Casts in what our own autograd functions return."""

from __future__ import annotations

import torch
from torch import Tensor


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in this dtype; x itself where it is of it already.

    `x.to` of the dtype that x has makes torch 2.11's compiler take a function's output for another name of an
    intermediate, and all gradients of that function are 0.
    """
    return x if x.dtype == dtype else x.to(dtype)
