"""Dispatch: carry out a `RouteDecision`.

Skipping: light tokens become the rows of attention, dark ones those of spectral mixing, and each token is
computed once. Densely: every operator sees every token, the reference that skipping is measured against;
blends (`soft`, and `hard` in training, whose straight-through gradient needs every operator's output)
have no other way.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from chiar_megatron.config.schema import RouterConfig
from chiar_megatron.operators.rows import TokenRows, rows_of
from chiar_megatron.routing.balance import capacity_rows, cut_to_capacity
from chiar_megatron.routing.decision import ATTENTION, SPECTRAL, RouteDecision
from chiar_megatron.runtime.paths import kernels_available


def can_skip(config: RouterConfig, decision: RouteDecision) -> bool:
    """Whether each token takes one operator alone, and the recipe does not ask for the dense reference."""
    return config.dispatch == "skip" and decision.weights_SBO is None


def light_rows(
    config: RouterConfig, light_SB: Tensor, score_SB: Tensor, training: bool, forced: bool
) -> TokenRows:
    """The rows of attention for one micro-batch's whole sequences: all light tokens at evaluation (a pure
    per-token threshold) and where decisions are forced, at most the capacity in training."""
    light_N = light_SB.transpose(0, 1).flatten()
    capacity = capacity_rows(config, len(light_N)) if training and not forced else None
    if capacity is None:
        return rows_of(light_N, wanted=light_N.sum(dtype=torch.float64))
    score_N = score_SB.transpose(0, 1).flatten()
    if not kernels_available(light_N.device):
        wanted = light_N.sum(dtype=torch.float64)
        return rows_of(cut_to_capacity(light_N, score_N, capacity), capacity, wanted)
    from chiar_megatron.operators.kernels.select_rows import select_rows

    kept_N, slot_N, index_R, rest_N, counts, tally = select_rows(light_N, score_N, capacity)
    valid_R = torch.arange(capacity, device=counts.device) < counts[0]
    return TokenRows(index_R, valid_R, slot_N, kept_N, rest_N, counts[1:], tally[0], tally)


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
