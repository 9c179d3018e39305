"""What each part of a layer costs: the arithmetic beneath `accounting.py`, which says what is counted."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

from chiar_megatron.config.schema import ModelConfig
from chiar_megatron.errors import ConfigError

CountedDct = Literal["gemm", "fft"]


@dataclass(frozen=True)
class Flops:
    """Floating-point operations."""

    executed: float = 0.0
    padded: float = 0.0
    useful: float = 0.0

    def __add__(self, other: Flops) -> Flops:
        return Flops(self.executed + other.executed, self.padded + other.padded, self.useful + other.useful)


@dataclass(frozen=True)
class Piece:
    """One kind of work in one layer, for one sequence."""

    name: str
    layer: int | None
    """From 1; None for the head."""
    forward: Flops
    training: Flops
    """Forward and backward."""


@dataclass(frozen=True)
class Sizes:
    """Widths that follow from a resolved ModelConfig."""

    h: int
    query_width: int
    key_value_width: int
    ffn: int
    fc1_width: int
    vocab: int
    rbf: int
    """Random features R; 0 without RBF mixing."""
    operators: int
    """Operators that a soft or hard router blends; 0 for other routers."""

    @staticmethod
    def of(model: ModelConfig) -> Sizes:
        """Raises ConfigError if a size is still null."""
        head_size = _resolved(model.kv_channels, "kv_channels")
        ffn = _resolved(model.ffn_hidden_size, "ffn_hidden_size")
        blends = model.router.kind in ("soft", "hard")
        has_rbf = blends and model.router.operators == "spectral_attention_rbf"
        return Sizes(
            h=model.hidden_size,
            query_width=model.num_attention_heads * head_size,
            key_value_width=2 * _resolved(model.num_query_groups, "num_query_groups") * head_size,
            ffn=ffn,
            fc1_width=2 * ffn if model.activation == "swiglu" else ffn,
            vocab=_resolved(model.vocab_size, "vocab_size"),
            rbf=model.rbf_features if has_rbf else 0,
            operators=(3 if has_rbf else 2) if blends else 0,
        )


@dataclass(frozen=True)
class Rows:
    """Tokens of one sequence that attention works on, and the query-key pairs among them."""

    queries: float
    keys: float
    pairs: float


@dataclass(frozen=True)
class PieceCounter:
    """Counts the pieces of one sequence of `tokens`; the arguments of `flops_per_sequence`."""

    model: ModelConfig
    sizes: Sizes
    tokens: int
    causal: bool
    dct_form: CountedDct

    def rows(self, queries: float, keys: float, masked: bool = False) -> Rows:
        """Queries and keys spread evenly over the sequence; masked: the kernel executes every pair."""
        if not self.causal or masked:
            return Rows(queries, keys, queries * keys)
        return Rows(queries, keys, queries * (keys + 1) / 2)

    def attention_layer(self, layer: int) -> list[Piece]:
        """An A layer without its feed-forward layer."""
        useful = self.rows(self.tokens, self.tokens)
        executed = self.rows(self.tokens, self.tokens, masked=self.model.mask_documents)
        return self.attention(layer, executed, useful)

    def routed_layer(
        self, layer: int, fraction: float, rbf_fraction: float, capacity_fraction: float | None
    ) -> list[Piece]:
        """An R layer without its feed-forward layer."""
        router, tokens = self.model.router, self.tokens
        soft, blends = router.kind == "soft", router.kind in ("soft", "hard")
        skips = router.dispatch == "skip" and not blends
        capacity = capacity_fraction if skips and capacity_fraction is not None else 1.0
        light = tokens * (1.0 if soft else min(fraction, capacity))
        rbf = tokens * (1.0 if soft else rbf_fraction) if self.sizes.rbf else 0.0
        dark = tokens if soft else tokens - light - rbf
        useful = self.rows(light, light if router.keys_values == "routed" else tokens)
        if skips:
            slots = light if capacity_fraction is None else tokens * capacity
            pieces = self.attention(layer, self._with_unused_rows(useful, slots), useful, padded=True)
        else:
            masked = router.keys_values == "routed" or self.model.mask_documents
            pieces = self.attention(layer, self.rows(tokens, tokens, masked), useful)
        pieces.append(self.mixing(layer, dark if skips else tokens, dark))
        if blends or router.kind in ("entropy", "entropy_gated"):
            pieces.append(_piece("entropy", layer, tokens * self._dct(), training=2 if blends else 1))
        inputs = (self.sizes.h + 1) * self.sizes.operators
        if router.kind in ("learned", "entropy_gated"):
            inputs = self.sizes.h
        if inputs:
            pieces.append(_piece("router", layer, 2.0 * tokens * inputs))
        if self.sizes.rbf:
            pieces += self.rbf(layer, rbf)
        return pieces

    def _with_unused_rows(self, used: Rows, slots: float) -> Rows:
        """As many rows as `slots`: matrix products run over all of them, but an unused row has an empty
        range of keys, so the attention kernel meets no further pair."""
        keys = slots if self.model.router.keys_values == "routed" else used.keys
        return Rows(slots, keys, used.pairs)

    def attention(self, layer: int, executed: Rows, useful: Rows, padded: bool = False) -> list[Piece]:
        """executed and useful rows; padded: the difference between them is capacity, not dense dispatch."""
        h, query_width, key_value_width = self.sizes.h, self.sizes.query_width, self.sizes.key_value_width
        costs: dict[str, Callable[[Rows], float]] = {
            "qkv": lambda rows: 2 * h * (query_width * rows.queries + key_value_width * rows.keys),
            "scores": lambda rows: 2 * query_width * rows.pairs,
            "values": lambda rows: 2 * query_width * rows.pairs,
            "output_projection": lambda rows: 2 * query_width * h * rows.queries,
        }
        return [
            _piece(
                name, layer, cost(executed), cost(useful), cost(executed) - cost(useful) if padded else 0.0
            )
            for name, cost in costs.items()
        ]

    def mixing(self, layer: int, executed_tokens: float, useful_tokens: float) -> Piece:
        """Spectral mixing."""
        transforms = 2 * self._dct()
        return _piece("mixing", layer, executed_tokens * transforms, useful_tokens * transforms, training=2)

    def rbf(self, layer: int, useful_tokens: float) -> list[Piece]:
        """RBF mixing: its scores are never cut to the causal half, and backward computes them again
        (torch's checkpointing stops once it has them, before the product with the features)."""
        h, features, tokens = self.sizes.h, self.sizes.rbf, self.tokens
        projection = 2.0 * h * features
        scores = 2.0 * 2 * features
        feed_forward = 2.0 * 2 * features * h + self._feed_forward()
        pairs, useful_pairs = tokens * tokens, self.rows(useful_tokens, tokens).pairs
        recomputed = Flops(executed=scores * pairs)
        mixed = _piece("rbf_mixing", layer, 2 * scores * pairs, 2 * scores * useful_pairs)
        return [
            _piece(
                "rbf_features",
                layer,
                projection * tokens,
                projection * tokens * (useful_tokens > 0),
                training=2,
            ),
            replace(mixed, training=mixed.training + recomputed),
            _piece("rbf_feed_forward", layer, feed_forward * tokens, feed_forward * useful_tokens),
        ]

    def feed_forward(self, layer: int) -> Piece:
        """The layer's feed-forward part."""
        return _piece("ffn", layer, self.tokens * self._feed_forward())

    def meta_router(self, layer: int) -> Piece:
        """The gate over layer 1; what `running` pools is a constant and takes no gradient."""
        pooling = self.model.meta_router.pooling
        gates = self.tokens if pooling == "causal" else 1
        return _piece(
            "meta_router", layer, 2.0 * self.sizes.h * gates, training=2 if pooling == "running" else 3
        )

    def head(self) -> Piece:
        """The output head."""
        return _piece("head", None, 2.0 * self.tokens * self.sizes.h * self.sizes.vocab)

    def _feed_forward(self) -> float:
        return 2.0 * self.sizes.h * (self.sizes.fc1_width + self.sizes.ffn)

    def _dct(self) -> float:
        h = self.sizes.h
        return 2.0 * h * h if self.dct_form == "gemm" else 2.5 * h * math.log2(h)


def _piece(
    name: str,
    layer: int | None,
    executed: float,
    useful: float | None = None,
    padded: float = 0.0,
    *,
    training: float = 3,
) -> Piece:
    """useful: None for all; training: forward passes' worth of work in forward and backward."""
    forward = Flops(executed, padded, executed if useful is None else useful)
    trained = Flops(training * forward.executed, training * forward.padded, training * forward.useful)
    return Piece(name, layer, forward, trained)


_T = TypeVar("_T")


def _resolved(value: _T | None, name: str) -> _T:
    if value is None:
        raise ConfigError(f"model.{name} is null; resolve the config before counting")
    return value
