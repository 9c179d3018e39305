"""What a recipe's routing fields mean together."""

from __future__ import annotations

from chiar_megatron.config.schema import RouterConfig


def computes_all(router: RouterConfig) -> bool:
    """Whether a training step runs every operator for every token: by wish, or because blends need to."""
    return router.dispatch == "dense" or router.kind in ("soft", "hard")


def has_fixed_rows(router: RouterConfig) -> bool:
    """Whether a routed layer's shapes are equal in every training step, as compiled code and graphs need."""
    return computes_all(router) or (router.target is not None and router.capacity == "auto")
