"""Load balance: a controller holds each layer's routed share at ρ, a capacity fixes the number of rows.

The controller moves only the threshold, never a gate (DESIGN, decision 5). Its counts are those before
the capacity cut, over the whole global batch, so every layout moves alike.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

import torch
from torch import Tensor

from chiar_megatron.config.schema import RouterConfig
from chiar_megatron.runtime.device import current_device

SPREAD_DECAY = 0.9  # a step, of the running spread of scores
_STATE = ("place", "spread", "started")
ROW_MULTIPLE = 64  # rows come in whole tiles of the matrix products that work on them


def capacity_rows(config: RouterConfig, tokens: int) -> int | None:
    """Rows of a routed layer's attention for a micro-batch of `tokens`: `min(n, ceil64(ρ(1 + slack)·n))`.

    None: no limit (`capacity: none`, or no target to derive one from).
    """
    if config.target is None or config.capacity == "none":
        return None
    wanted = math.ceil(config.target * (1.0 + config.slack) * tokens - 1e-9)
    return min(tokens, -(-wanted // ROW_MULTIPLE) * ROW_MULTIPLE)


def cut_to_capacity(light_N: Tensor, score_N: Tensor, capacity: int) -> Tensor:
    """The light tokens that fit: those of the highest scores, of equal ones the earlier; bool `[N]`.

    Without overflow the same choice, bit for bit. No host synchronisation.
    """
    if capacity >= len(light_N):
        return light_N
    order_N = torch.sort(torch.where(light_N, score_N, -math.inf), descending=True, stable=True).indices
    fits_N = torch.zeros_like(light_N)
    fits_N[order_N[:capacity]] = True
    return light_N & fits_N


class ThresholdController(torch.nn.Module):
    """What one layer's threshold control remembers, all of it part of the checkpoint: the threshold's place
    in standard deviations above the scores' mean, the running spread of the scores, and whether there was
    a step yet."""

    place: Tensor
    spread: Tensor
    started: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("place", "spread", "started"):
            self.register_buffer(name, torch.zeros((), dtype=torch.float32, device=current_device()))


@torch.no_grad()
def move_thresholds(
    config: RouterConfig,
    thresholds: Sequence[Tensor],
    controllers: Sequence[ThresholdController],
    sums_LF: Tensor,
    taken: Tensor,
) -> None:
    """Move every layer's threshold (float32 `[]`, in place) by one step's sums over all ranks.

    `τ = mean + σ·z`, with the scores' mean of this step, their running spread σ, and the integrator
    `z += gain · (share - ρ)`, which starts where Gaussian scores would have it. So shifts and changes of
    scale pass straight through, and z only has to learn the distribution's shape.

    sums_LF: float64, columns in the order of `statistics.FIELDS`. taken: bool `[]`; False (a skipped step)
    changes nothing. All on the device, without a host synchronisation.
    """
    assert config.target is not None
    tokens_L, light_L, score_L, square_L = sums_LF[:, :4].unbind(1)
    count_L = tokens_L.clamp_min(1.0)
    mean_L = score_L / count_L
    now_L = (square_L / count_L - mean_L.square()).clamp_min(0.0).sqrt()
    states = [[getattr(controller, name) for controller in controllers] for name in _STATE]
    place_L, spread_L, started_L = (torch.stack(state).double() for state in states)
    moved_L = place_L + config.controller_gain * (light_L / count_L - config.target)
    new_place_L = torch.where(started_L > 0, moved_L, NormalDist().inv_cdf(1.0 - config.target))
    running_L = SPREAD_DECAY * spread_L + (1.0 - SPREAD_DECAY) * now_L
    new_spread_L = torch.where(started_L > 0, running_L, now_L)
    wanted_L = mean_L + new_spread_L * new_place_L
    holds_L = taken & (tokens_L > 0) & torch.isfinite(wanted_L)
    _write(thresholds, torch.where(holds_L, wanted_L, torch.stack(list(thresholds)).double()))
    new_states = (new_place_L, new_spread_L, torch.ones_like(started_L))
    for state, new_L, old_L in zip(states, new_states, (place_L, spread_L, started_L), strict=True):
        _write(state, torch.where(holds_L, new_L, old_L))


def _write(targets: Sequence[Tensor], values_L: Tensor) -> None:
    torch._foreach_copy_(list(targets), list(values_L.float().unbind()))
