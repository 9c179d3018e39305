"""What every router answers, and all that dispatch, balance and metrics know of it (DESIGN, decision 3)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

SPECTRAL, ATTENTION, RBF = 0, 1, 2  # order of a blend's weights


@dataclass(frozen=True)
class RouteDecision:
    """One layer's decision for one micro-batch; `[s, b]` covers this rank's part of the sequence.

    light_SB: bool, True: attention (soft: where attention has the largest weight; only reported).
    score_SB: float32, what was compared with the threshold (soft, hard: attention's weight).
    entropy_SB: float32, the spectral entropy where the router computed it.
    gate_SB: multiplies the attention operator's output before its residual sum; None: 1.
    weights_SBO: blend over operators; None: each token takes one operator, by `light_SB`.
    """

    light_SB: Tensor
    score_SB: Tensor
    entropy_SB: Tensor | None = None
    gate_SB: Tensor | None = None
    weights_SBO: Tensor | None = None
