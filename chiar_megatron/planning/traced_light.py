"""How many light tokens traced sequences would have had at other thresholds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from chiar_megatron.metrics.traces import StepTraces
from chiar_megatron.routing.statistics import BIN_WIDTH, EDGES, FIRST_EDGE

POOL_SEQUENCES = 256  # the largest of many draws is no larger than the largest there is to draw
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


@dataclass(frozen=True)
class Pool:
    """Sequences of neighbouring traced steps, and their light tokens by whether there is a controller."""

    replica_S: Any
    light_SL: Mapping[bool, Any]


def pools(traces: Sequence[StepTraces], target: float) -> list[Pool]:
    """The traced steps in order, as many together as make `POOL_SEQUENCES` (the last one may have more).

    target: what a controller holds over a pool; without one thresholds stay where the first step had them.
    """
    groups: list[list[StepTraces]] = [[]]
    for step in traces:
        if sum(len(member.replica) for member in groups[-1]) >= POOL_SEQUENCES:
            groups.append([])
        groups[-1].append(step)
    if len(groups) > 1 and sum(len(member.replica) for member in groups[-1]) < POOL_SEQUENCES:
        groups[-2:] = [groups[-2] + groups[-1]]
    return [
        Pool(
            np.concatenate([step.replica for step in group]),
            {
                False: np.concatenate([light_at(step, traces[0].threshold) for step in group]),
                True: controlled_light(group, target),
            },
        )
        for group in groups
    ]


def controlled_light(steps: Sequence[StepTraces], target: float) -> Any:
    """Light tokens `[S, L]` under a controller that is right: each layer's threshold stands at one place
    among the scores of all steps, mean + z · deviation, where `target` of the tokens are light."""
    reach = -FIRST_EDGE + _TAIL
    low_L = np.full(len(steps[0].layers), -reach)
    high_L = -low_L
    for _ in range(30):
        z_L = (low_L + high_L) / 2.0
        light_SL = np.concatenate([light_at(s, s.score_mean + z_L * s.score_deviation) for s in steps])
        above_L = light_SL.mean(0) / steps[0].seq_length > target
        low_L, high_L = np.where(above_L, z_L, low_L), np.where(above_L, high_L, z_L)
    return light_SL
