"""What a routed layer counts while it trains, without a host synchronisation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from chiar_megatron.operators.rows import TokenRows
from chiar_megatron.routing.decision import RouteDecision
from chiar_megatron.runtime.device import current_device

FIELDS = ("tokens", "light", "score_sum", "score_square_sum", "entropy_sum", "overflow", "rows")

# Of the score histogram, in standard deviations from the mean; two more bins lie outside the edges.
FIRST_EDGE, BIN_WIDTH, EDGES = -4.0, 0.5, 17
BINS = EDGES + 1


class RoutingStatistics:
    """Sums over this rank's tokens since the last `take_all`, on the device.

    sums_F: float64 `[len(FIELDS)]`. `light` is what the router wants, `overflow` the part of it that found
    no row, `rows` what attention executes, used or not (dense dispatch: every token).
    most_light: float64 `[1]`, light tokens before capacity of the fullest micro-batch: of the whole
    micro-batch where layers skip, of this rank's part of it where they compute densely.
    last_score_SB, last_light_SB: this rank's part of the last micro-batch; None before the first.
    """

    def __init__(self) -> None:
        device = current_device()
        self.sums_F = torch.zeros(len(FIELDS), dtype=torch.float64, device=device)
        # Of one element: a write to a tensor without dims gets lost in compiled code on a CPU.
        self.most_light = torch.zeros(1, dtype=torch.float64, device=device)
        self.last_score_SB: Tensor | None = None
        self.last_light_SB: Tensor | None = None

    @torch.no_grad()
    def add(self, decision: RouteDecision, kept_SB: Tensor, rows: TokenRows | None = None) -> None:
        """Count one micro-batch; kept_SB: bool, the light tokens that attention computes; rows: those of
        the whole micro-batch, None where every operator sees every token."""
        tokens = decision.light_SB.numel()
        light, overflow, score, square = _counted(decision, kept_SB, rows)
        executed, wanted = float(tokens), light
        if rows is not None:  # of which this rank's tokens have their share
            executed = len(rows.index_R) * tokens / len(rows.has_row_N)
            wanted = light if rows.wanted is None else rows.wanted
        entropy = torch.zeros_like(score)
        if decision.entropy_SB is decision.score_SB:
            entropy = score
        elif decision.entropy_SB is not None:
            entropy = decision.entropy_SB.sum(dtype=torch.float64)
        given = torch.full_like(score, tokens), torch.full_like(score, executed)
        self.sums_F += torch.stack((given[0], light, score, square, entropy, overflow, given[1]))
        self.most_light.copy_(torch.maximum(self.most_light, wanted))
        # Not copied: whoever wants more of a step than sums looks at them after its backward pass.
        self.last_score_SB, self.last_light_SB = decision.score_SB.detach(), decision.light_SB


def _counted(decision: RouteDecision, kept_SB: Tensor, rows: TokenRows | None) -> tuple[Tensor, ...]:
    """float64 `[]` each, of this rank's tokens: how many are light, how many of those found no row, the sums
    of all scores and of their squares. From the rows' own tally if it is of the same tokens."""
    if rows is not None and rows.tally is not None and len(rows.has_row_N) == decision.light_SB.numel():
        return rows.tally.unbind()
    score_SB = decision.score_SB.double()
    light, overflow = (x.sum(dtype=torch.float64) for x in (decision.light_SB, decision.light_SB & ~kept_SB))
    return light, overflow, score_SB.sum(), score_SB.square().sum()


@dataclass(frozen=True)
class Counts:
    """What several layers have counted, in their order."""

    sums_LF: Tensor
    most_light_L: Tensor


def take_all(statistics: Sequence[RoutingStatistics]) -> Counts:
    """The counts of several layers so far; each starts anew."""
    sums, most = [layer.sums_F for layer in statistics], [layer.most_light for layer in statistics]
    counts = Counts(torch.stack(sums), torch.cat(most))
    torch._foreach_zero_([*sums, *most])
    return counts


def score_histogram(score_LSB: Tensor, mean_L: Tensor, deviation_L: Tensor) -> Tensor:
    """How many of each sequence's scores lie in each bin, float64 `[layers, b, BINS]`; bins in units of the
    layer's `deviation_L` around its `mean_L`, a score on an edge in the upper one. No host synchronisation.
    """
    edges_E = FIRST_EDGE + BIN_WIDTH * torch.arange(EDGES, device=score_LSB.device, dtype=torch.float64)
    spread_L = deviation_L.clamp_min(1e-30)
    z_LSB = (score_LSB.double() - mean_L[:, None, None]) / spread_L[:, None, None]
    reached_LBE = (z_LSB[..., None] >= edges_E).sum(dim=1).double()
    all_LB1 = torch.full_like(reached_LBE[..., :1], score_LSB.shape[1])
    reached_LBE = torch.cat((all_LB1, reached_LBE, torch.zeros_like(all_LB1)), dim=-1)
    return reached_LBE[..., :-1] - reached_LBE[..., 1:]
