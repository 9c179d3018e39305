"""GELU of a linear layer's output and its bias."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from chiar_megatron.runtime.paths import kernels_available


def bias_gelu(x_XYF: Tensor, bias_F: Tensor | None) -> Tensor:
    """Exact `gelu(x + bias)`; by one kernel on CUDA in half precision, which sums the bias's gradient too.

    Same shape and dtype as x `[..., f]`.
    """
    half = x_XYF.dtype in (torch.bfloat16, torch.float16)
    if not (half and kernels_available(x_XYF.device)):
        return F.gelu(x_XYF if bias_F is None else x_XYF + bias_F)
    from chiar_megatron.operators.kernels import bias_gelu as kernel

    return kernel.bias_gelu(x_XYF.flatten(0, -2), bias_F).view(x_XYF.shape)
