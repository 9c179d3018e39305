"""Routing figures of one step, from sums that every rank contributes to one reduction."""

from __future__ import annotations

from collections.abc import Mapping
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
    score_mean: list[float]
    score_std: list[float]
    overflow_fraction: list[float]
    """Share of light tokens that found no row."""
    useful_over_executed: list[float]
    """Rows with a light token over rows that attention executed; 1 where it executed none."""

    @staticmethod
    def from_sums(sums_LF: Tensor) -> RoutingSummary:
        """sums_LF: float64 `[all layers, len(FIELDS)]` on the host; rows without tokens are not routed."""
        layers = [index + 1 for index, row in enumerate(sums_LF.tolist()) if row[0] > 0]
        rows = sums_LF[[layer - 1 for layer in layers]]
        tokens, light, score, square, entropy, overflow, executed = (rows[:, i] for i in range(len(FIELDS)))
        variance = torch.clamp(square / tokens - (score / tokens).square(), min=0.0)
        return RoutingSummary(
            layers=layers,
            routed_fraction=(light / tokens).tolist(),
            entropy_mean=(entropy / tokens).tolist(),
            score_mean=(score / tokens).tolist(),
            score_std=variance.sqrt().tolist(),
            overflow_fraction=(overflow / light.clamp_min(1.0)).tolist(),
            useful_over_executed=_ratio(light - overflow, executed).tolist(),
        )


@dataclass(frozen=True)
class BalanceSummary:
    """Who had how much to do in one step. Lists have an entry per routed layer, in order; a ratio of largest
    to mean is 1 where there was nothing to share."""

    rank_max_over_mean: list[float]
    """Of light tokens before capacity in the whole step, over data-parallel ranks."""
    micro_batch_max_over_mean: list[float]
    """The same over single micro-batches of all data-parallel ranks."""
    executed_max_over_mean: list[float]
    """Of rows that attention executed in the whole step, over data-parallel ranks."""
    all_layers_executed_max_over_mean: float
    """The same for the rows of all layers together, on which a rank's time depends."""
    threshold: list[float]
    """That decided this step's tokens (no meaning for soft and hard routers)."""
    score_histogram: list[list[int]]
    """Scores of every rank's last micro-batch by bins of `routing/statistics.py`: in standard deviations
    around the mean, both of the step before; [] in the first step of an attempt."""
    rank_seconds: list[float]
    """Each rank's own forward and backward work (`training/detail.py`), in the newest step that it can
    tell; [] if one can tell of none."""

    @staticmethod
    def from_parts(parts: Mapping[str, Tensor], layers: list[int], micro_batches: int) -> BalanceSummary:
        """parts: what `training/detail.py` packs, on the host; layers: numbers of the routed ones."""
        rows = [layer - 1 for layer in layers]
        light, executed, most = (parts[name][rows] for name in ("light", "rows", "most_light"))
        seconds: list[float] = parts["seconds"].tolist()
        histogram = parts.get("histogram")
        return BalanceSummary(
            rank_max_over_mean=_max_over_mean(light).tolist(),
            micro_batch_max_over_mean=_ratio(most.amax(1) * micro_batches, light.mean(1)).tolist(),
            executed_max_over_mean=_max_over_mean(executed).tolist(),
            all_layers_executed_max_over_mean=_max_over_mean(executed.sum(0, keepdim=True)).item(),
            threshold=parts["threshold"][rows].tolist(),
            score_histogram=[] if histogram is None else histogram[rows].long().tolist(),
            rank_seconds=seconds if min(seconds) > 0.0 else [],
        )

    def step_time(self) -> dict[str, float]:
        """Mean and largest of the ranks' seconds, their ratio, and whose is largest; {} if not known."""
        if not self.rank_seconds:
            return {}
        largest, mean = max(self.rank_seconds), sum(self.rank_seconds) / len(self.rank_seconds)
        slowest = self.rank_seconds.index(largest)
        return {"mean": mean, "max": largest, "max_over_mean": largest / mean, "slowest_rank": slowest}


def _ratio(part: Tensor, whole: Tensor) -> Tensor:
    return torch.where(whole > 0, part / whole.clamp_min(1e-30), 1.0)


def _max_over_mean(x_LR: Tensor) -> Tensor:
    return _ratio(x_LR.amax(1), x_LR.mean(1))
