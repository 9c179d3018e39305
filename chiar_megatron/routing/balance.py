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
    """What one layer's threshold control remembers: the layer's threshold apart, it is the last step's mean
    score and whether there was one. Both belong to the checkpoint."""

    score_mean: Tensor
    started: Tensor

    def __init__(self) -> None:
        super().__init__()
        device = current_device()
        self.register_buffer("score_mean", torch.zeros((), dtype=torch.float32, device=device))
        self.register_buffer("started", torch.zeros((), dtype=torch.float32, device=device))


@torch.no_grad()
def move_thresholds(
    config: RouterConfig,
    thresholds: Sequence[Tensor],
    controllers: Sequence[ThresholdController],
    sums_LF: Tensor,
    taken: Tensor,
) -> None:
    """Move every layer's threshold (float32 `[]`, in place) by one step's sums over all ranks.

    The first step sets it as if scores were Gaussian; then
    `τ += (change of the scores' mean) + gain · σ · (share - ρ)`: an integrator in units of the score's
    spread σ, with the drift of the scores fed forward.

    sums_LF: float64, columns in the order of `statistics.FIELDS`. taken: bool `[]`; False (a skipped step)
    changes nothing. All on the device, without a host synchronisation.
    """
    assert config.target is not None
    tokens_L, light_L, score_L, square_L = sums_LF[:, :4].unbind(1)
    count_L = tokens_L.clamp_min(1.0)
    mean_L = score_L / count_L
    spread_L = (square_L / count_L - mean_L.square()).clamp_min(0.0).sqrt()
    threshold_L = torch.stack(list(thresholds)).double()
    last_mean_L = torch.stack([controller.score_mean for controller in controllers]).double()
    started_L = torch.stack([controller.started for controller in controllers])
    error_L = light_L / count_L - config.target
    moved_L = threshold_L + (mean_L - last_mean_L) + config.controller_gain * spread_L * error_L
    start_L = mean_L + spread_L * NormalDist().inv_cdf(1.0 - config.target)
    wanted_L = torch.where(started_L > 0, moved_L, start_L)
    holds_L = taken & (tokens_L > 0) & torch.isfinite(wanted_L)
    _write(thresholds, torch.where(holds_L, wanted_L, threshold_L))
    _write([c.score_mean for c in controllers], torch.where(holds_L, mean_L, last_mean_L))
    _write([c.started for c in controllers], torch.where(holds_L, 1.0, started_L))


def _write(targets: Sequence[Tensor], values_L: Tensor) -> None:
    torch._foreach_copy_(list(targets), list(values_L.float().unbind()))
