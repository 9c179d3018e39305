"""FLOPs of runs, planned and measured, from the one ledger; and the share of attention ρ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from chiar_megatron.config.schedule import parse_schedule
from chiar_megatron.config.schema import RunConfig
from chiar_megatron.model.accounting import flops_per_sequence
from chiar_megatron.routing.balance import capacity_rows

UNKNOWN_FRACTION = 0.5  # of a router whose share nothing holds, before it has run


@dataclass(frozen=True)
class TokenFlops:
    """Training FLOPs of one token."""

    executed: float
    """What the hardware does, unused rows and dense dispatch included; DCTs as matrix products."""
    useful: float
    """What the routing decision needs."""
    attention_share: float
    """ρ of the whole model: D layers 0, A layers 1, R layers their routed fraction, averaged over layers."""


def token_flops(config: RunConfig, fractions: float | Sequence[float] | None = None) -> TokenFlops:
    """FLOPs of a token of a resolved recipe's run.

    fractions: share of tokens that each routed layer sent to attention, as measured; None: planned, the
    target, or the share of a random router, or `UNKNOWN_FRACTION`.
    """
    model, router = config.model, config.model.router
    kinds = parse_schedule(model.schedule)
    routed = kinds.count("R")
    if fractions is None:
        fractions = planned_fraction(config)
    each = [fractions] * routed if isinstance(fractions, float) else list(fractions)
    tokens = config.training.micro_batch_size * model.seq_length
    rows = capacity_rows(router, tokens)
    ledger = flops_per_sequence(
        model, model.seq_length, each, capacity_fraction=None if rows is None else rows / tokens
    )
    total = ledger.total("training")
    share = (kinds.count("A") + sum(each)) / len(kinds)
    return TokenFlops(total.executed / model.seq_length, total.useful / model.seq_length, share)


def planned_fraction(config: RunConfig) -> float:
    """The routed fraction to expect of a recipe."""
    router = config.model.router
    if router.target is not None:
        return router.target
    return router.random_fraction if router.kind == "random" else UNKNOWN_FRACTION
