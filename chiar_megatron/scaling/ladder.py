"""Sizes and schedules of a sweep's models: `96x6` (hidden size × layers) and `chiar:0.5`."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from chiar_megatron.config.schema import ModelConfig
from chiar_megatron.errors import ConfigError

_GRAMMAR = (
    "write twin, chiar, chiar:RHO (0 < RHO < 1) or interleave:K (attention in every K-th layer, K >= 2)"
)


@dataclass(frozen=True)
class Size:
    """One rung of the ladder."""

    hidden_size: int
    layers: int

    def __str__(self) -> str:
        return f"{self.hidden_size}x{self.layers}"


@dataclass(frozen=True)
class Variant:
    """Which schedule a size gets."""

    kind: str
    """twin, chiar or interleave."""
    target: float | None = None
    """chiar: the share of tokens each routed layer is held at; None: the recipe's own routing."""
    every: int = 0
    """interleave: attention in every so many layers, counted from the top."""

    def __str__(self) -> str:
        if self.kind == "interleave":
            return f"interleave:{self.every}"
        return self.kind if self.target is None else f"{self.kind}:{self.target:g}"

    def schedule(self, layers: int) -> str:
        """The schedule string. Raises ConfigError for too few layers."""
        least = {"twin": 1, "chiar": 3, "interleave": self.every}[self.kind]
        if layers < least:
            raise ConfigError(f"--ladder: {layers} layers are too few for {self}; use at least {least}")
        if self.kind == "twin":
            return f"A*{layers}"
        if self.kind == "chiar":
            return f"D R*{layers - 2} A"
        kinds = ["D"] * layers
        kinds[:: -self.every] = ["A"] * len(kinds[:: -self.every])
        return " ".join(kinds)


def parse_size(text: str) -> Size:
    """`96x6`. Raises ConfigError for anything else."""
    match = re.fullmatch(r"\s*(\d+)[x×](\d+)\s*", text)
    if match is None or int(match[1]) < 1 or int(match[2]) < 1:
        raise ConfigError(f"--ladder: {text!r} must be HIDDENxLAYERS, such as 96x6")
    return Size(int(match[1]), int(match[2]))


def parse_variant(text: str) -> Variant:
    """`twin`, `chiar`, `chiar:0.5`, `interleave:2`. Raises ConfigError for anything else."""
    kind, colon, value = text.strip().partition(":")
    try:
        if kind == "twin" and not colon:
            return Variant("twin")
        if kind == "chiar":
            target = float(value) if colon else None
            if target is None or 0 < target < 1:
                return Variant("chiar", target)
        if kind == "interleave" and int(value) >= 2:
            return Variant("interleave", every=int(value))
    except ValueError:
        pass
    raise ConfigError(f"--schedules: {text!r} is none; {_GRAMMAR}")


def apply(model: ModelConfig, size: Size, variant: Variant) -> ModelConfig:
    """The base recipe's model at a size and schedule. Heads keep the base's size and so grow in number;
    sizes that follow from the width are left to it. Raises ConfigError where heads do not fit."""
    head = model.kv_channels or model.hidden_size // model.num_attention_heads
    if size.hidden_size % head:
        raise ConfigError(
            f"--ladder: hidden size {size.hidden_size} of {size} is not divisible by the base recipe's head "
            f"size {head}; use {max(1, size.hidden_size // head) * head}, or another base"
        )
    heads = size.hidden_size // head
    groups = model.num_query_groups
    if groups is not None:
        groups = max(1, heads * groups // model.num_attention_heads)
        if heads % groups:
            raise ConfigError(f"--ladder: {heads} heads of {size} do not divide into {groups} query groups")
    ffn = model.ffn_hidden_size
    return replace(
        model,
        preset=None,
        schedule=variant.schedule(size.layers),
        hidden_size=size.hidden_size,
        num_attention_heads=heads,
        num_query_groups=groups,
        kv_channels=head if model.kv_channels is not None else None,
        ffn_hidden_size=None if ffn is None else round(ffn * size.hidden_size / model.hidden_size),
        router=replace(model.router, target=variant.target) if variant.target is not None else model.router,
        meta_router=replace(model.meta_router, enabled=model.meta_router.enabled and variant.kind == "chiar"),
    )
