"""GELU of a linear layer's output, with the layer's bias where one kernel takes both."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from chiar_megatron.runtime.paths import kernels_available


def fuses_gelu(x: Tensor) -> bool:
    """Whether `gelu` adds the bias of a linear layer before it to what comes of x, summing its gradient too:
    on CUDA in half precision."""
    return kernels_available(x.device) and x.dtype in (torch.bfloat16, torch.float16)


def gelu(x_XYF: Tensor, bias_F: Tensor | None) -> Tensor:
    """Exact `gelu(x + bias)`, same shape and dtype as x `[..., f]`; bias only where `fuses_gelu`."""
    if not fuses_gelu(x_XYF):
        assert bias_F is None
        return F.gelu(x_XYF)
    from chiar_megatron.operators.kernels.bias_gelu import bias_gelu

    return bias_gelu(x_XYF.flatten(0, -2), bias_F).view(x_XYF.shape)
