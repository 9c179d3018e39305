"""How many light tokens traced sequences would have had at other thresholds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from chiar_megatron.metrics.traces import StepTraces
from chiar_megatron.routing.statistics import BIN_WIDTH, EDGES, FIRST_EDGE

_TAIL = 2.0  # width of the outermost bins, in standard deviations


def light_at(step: StepTraces, threshold_L: Any) -> Any:
    """Light tokens of each sequence and layer at other thresholds, float64 `[S, L]`.

    threshold_L: float64, in scores.
    """
    sequences, layers = step.light.shape
    light_SL = np.empty((sequences, layers))
    edges_X = FIRST_EDGE + BIN_WIDTH * np.arange(EDGES)
    edges_X = np.concatenate(([edges_X[0] - _TAIL], edges_X, [edges_X[-1] + _TAIL]))
    spread_L = np.maximum(step.score_deviation, 1e-30)
    wanted_L = (threshold_L - step.score_mean) / spread_L
    recorded_L = (step.threshold - step.score_mean) / spread_L
    for layer in range(layers):
        counts_SX = step.histogram[:, layer].astype(np.float64)
        above_SX = counts_SX[:, ::-1].cumsum(1)[:, ::-1]
        above_SX = np.concatenate((above_SX, np.zeros((sequences, 1))), axis=1)
        # One more point, where the count is known exactly; it lies within its bin's two ends.
        place = int(np.searchsorted(edges_X, recorded_L[layer]))
        knots = np.insert(edges_X, place, recorded_L[layer])
        values_SX = np.insert(above_SX, place, step.light[:, layer], axis=1)
        light_SL[:, layer] = _interpolate(wanted_L[layer], knots, values_SX)
    return light_SL


def _interpolate(x: float, knots_X: Any, values_SX: Any) -> Any:
    """Every row's value at x, linear between knots, constant outside."""
    x = min(max(x, knots_X[0]), knots_X[-1])
    high = min(max(int(np.searchsorted(knots_X, x)), 1), len(knots_X) - 1)
    width = max(knots_X[high] - knots_X[high - 1], 1e-30)
    share = (x - knots_X[high - 1]) / width
    return values_SX[:, high - 1] * (1.0 - share) + values_SX[:, high] * share


def threshold_for(step: StepTraces, target: float) -> Any:
    """The threshold of each layer at which `target` of the step's tokens are light, by bisection."""
    spread_L = np.maximum(step.score_deviation, 1e-30)
    reach = -FIRST_EDGE + _TAIL
    low_L, high_L = step.score_mean - reach * spread_L, step.score_mean + reach * spread_L
    for _ in range(30):
        middle_L = (low_L + high_L) / 2.0
        above_L = light_at(step, middle_L).mean(0) / step.seq_length > target
        low_L, high_L = np.where(above_L, middle_L, low_L), np.where(above_L, high_L, middle_L)
    return high_L


def light_of_steps(traces: Sequence[StepTraces], target: float | None) -> list[Any]:
    """Light tokens `[S, L]` of every traced step; target: what a controller holds, None without one."""
    if target is None:
        return [light_at(step, traces[0].threshold) for step in traces]
    return [light_at(step, threshold_for(step, target)) for step in traces]
