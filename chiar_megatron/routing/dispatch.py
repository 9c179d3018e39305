"""Dispatch: carry out a `RouteDecision`. Here densely: every operator sees every token, which is the
reference that skipping is measured against."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from chiar_megatron.routing.decision import ATTENTION, SPECTRAL, RouteDecision


def dispatch_dense(decision: RouteDecision, outputs_SBH: Sequence[Tensor]) -> Tensor:
    """Each token's update `[s, b, h]` from every operator's, in the order spectral, attention, RBF.

    Source: paper, section 3.2; a token takes one operator's output, or (soft, hard) their blend.
    """
    if decision.weights_SBO is None:
        light_SB1 = decision.light_SB[..., None]
        return torch.where(light_SB1, outputs_SBH[ATTENTION], outputs_SBH[SPECTRAL])
    weights_SBO = decision.weights_SBO.to(outputs_SBH[0].dtype)
    blended = outputs_SBH[0] * weights_SBO[..., 0:1]
    for index in range(1, len(outputs_SBH)):
        blended = blended + outputs_SBH[index] * weights_SBO[..., index : index + 1]
    return blended
