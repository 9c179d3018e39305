"""What a routed layer counts while it trains, without a host synchronisation."""

from __future__ import annotations

import torch
from torch import Tensor

from chiar_megatron.routing.decision import RouteDecision
from chiar_megatron.runtime.device import current_device

FIELDS = ("tokens", "light", "score_sum", "score_square_sum", "entropy_sum")


class RoutingStatistics:
    """Sums over this rank's tokens since the last `take`, float64 `[len(FIELDS)]` on the device."""

    def __init__(self) -> None:
        self.sums_F = torch.zeros(len(FIELDS), dtype=torch.float64, device=current_device())

    @torch.no_grad()
    def add(self, decision: RouteDecision) -> None:
        """Count one micro-batch."""
        score_SB = decision.score_SB.double()
        entropy = decision.entropy_SB
        self.sums_F += torch.stack(
            (
                torch.full_like(self.sums_F[0], decision.light_SB.numel()),
                decision.light_SB.sum().double(),
                score_SB.sum(),
                score_SB.square().sum(),
                torch.zeros_like(self.sums_F[0]) if entropy is None else entropy.sum().double(),
            )
        )

    def take(self) -> Tensor:
        """The sums so far; starts anew."""
        taken = self.sums_F.clone()
        self.sums_F.zero_()
        return taken
