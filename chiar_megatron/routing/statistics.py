"""What a routed layer counts while it trains, without a host synchronisation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from chiar_megatron.routing.decision import RouteDecision
from chiar_megatron.runtime.device import current_device

FIELDS = ("tokens", "light", "score_sum", "score_square_sum", "entropy_sum", "overflow")


class RoutingStatistics:
    """Sums over this rank's tokens since the last `take_all`, float64 `[len(FIELDS)]` on the device.

    `light` is what the router wants; `overflow` the part of it that found no row.
    """

    def __init__(self) -> None:
        self.sums_F = torch.zeros(len(FIELDS), dtype=torch.float64, device=current_device())

    @torch.no_grad()
    def add(self, decision: RouteDecision, kept_SB: Tensor) -> None:
        """Count one micro-batch; kept_SB: bool, the light tokens that attention computes."""
        score_SB = decision.score_SB.double()
        entropy = decision.entropy_SB
        self.sums_F += torch.stack(
            (
                torch.full_like(self.sums_F[0], decision.light_SB.numel()),
                decision.light_SB.sum().double(),
                score_SB.sum(),
                score_SB.square().sum(),
                torch.zeros_like(self.sums_F[0]) if entropy is None else entropy.sum(dtype=torch.float64),
                (decision.light_SB & ~kept_SB).sum().double(),
            )
        )


def take_all(statistics: Sequence[RoutingStatistics]) -> Tensor:
    """The sums of several layers so far, float64 `[layers, len(FIELDS)]`; each starts anew."""
    sums = [layer.sums_F for layer in statistics]
    taken_LF = torch.stack(sums)
    torch._foreach_zero_(sums)
    return taken_LF
