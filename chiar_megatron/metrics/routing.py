"""Routing figures of one step, from sums that every rank contributes to one reduction."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from chiar_megatron.routing.statistics import FIELDS


@dataclass(frozen=True)
class RoutingSummary:
    """Per routed layer, in order; over all tokens of the step."""

    layers: list[int]
    routed_fraction: list[float]
    entropy_mean: list[float]
    score_std: list[float]
    overflow_fraction: list[float]
    """Share of light tokens that found no row."""

    @staticmethod
    def from_sums(sums_LF: Tensor) -> RoutingSummary:
        """sums_LF: float64 `[all layers, len(FIELDS)]` on the host; rows without tokens are not routed."""
        layers = [index + 1 for index, row in enumerate(sums_LF.tolist()) if row[0] > 0]
        rows = sums_LF[[layer - 1 for layer in layers]]
        tokens, light, score, square, entropy, overflow = (rows[:, i] for i in range(len(FIELDS)))
        variance = torch.clamp(square / tokens - (score / tokens).square(), min=0.0)
        return RoutingSummary(
            layers=layers,
            routed_fraction=(light / tokens).tolist(),
            entropy_mean=(entropy / tokens).tolist(),
            score_std=variance.sqrt().tolist(),
            overflow_fraction=(overflow / light.clamp_min(1.0)).tolist(),
        )
