"""The small linear layers of routers and gates, which compute in float32 at any precision."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from chiar_megatron.runtime.device import current_device


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
