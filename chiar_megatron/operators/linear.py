"""The small linear layers of routers and gates, which compute in float32 at any precision."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from chiar_megatron.runtime.device import current_device

SCORE_EPSILON = 1e-6


class Float32Linear(torch.nn.Linear):
    """`torch.nn.Linear` whose product is float32 whatever the parameters' dtype; `[..., in]` to `[..., out]`.

    Parameters share the model's dtype because megatron-core's bf16 optimizer cannot save a model of mixed
    dtypes (it numbers parameters as if all were bf16); their float32 master copies are the optimizer's.
    """

    def __init__(self, in_features: int, out_features: int, dtype: torch.dtype) -> None:
        super().__init__(in_features, out_features, device=current_device(), dtype=dtype)

    def forward(self, input: Tensor) -> Tensor:
        """float32 output."""
        with torch.autocast(input.device.type, enabled=False):
            return F.linear(input.float(), self.weight.float(), self.bias.float())


def normalised_score(x: Tensor, weight_H: Tensor, bias: Tensor) -> Tensor:
    """`w·x / rms(x) + bias` of each token, float32: `[..., h]` to `[...]`.

    rms(x)² is the mean of squares and 1e-6. Of each token two numbers are kept for the backward pass, and x
    as it is; a norm and a linear layer would keep and move x in float32.
    """
    return _NormalisedScore.apply(x, weight_H, bias)  # type: ignore[no-any-return,no-untyped-call]


class _NormalisedScore(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_H: Tensor, bias: Tensor) -> Tensor:
        wide = x.float()
        scale = torch.rsqrt(wide.square().mean(-1) + SCORE_EPSILON)
        projection = (wide * scale[..., None] * weight_H.float()).sum(-1)
        ctx.save_for_backward(x, weight_H, scale, projection)
        ctx.bias_dtype = bias.dtype
        return projection + bias.float()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, weight_H, scale, projection = ctx.saved_tensors
        normal, grad_1 = x.float() * scale[..., None], grad[..., None]
        along = (projection / x.shape[-1])[..., None]
        grad_x = grad_1 * (weight_H.float() - normal * along) * scale[..., None]
        grad_weight = (grad_1 * normal).flatten(0, -2).sum(0)
        return grad_x.to(x.dtype), grad_weight.to(weight_H.dtype), grad.sum().to(ctx.bias_dtype)
