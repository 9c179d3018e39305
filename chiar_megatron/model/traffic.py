"""The ledger of bytes: what a process sends to others within each layer, by layout (beside `accounting.py`).

Counted by what rings need, for a group of p ranks: gathering or scattering a tensor of B bytes in all,
(p - 1)/p · B; summing it for every rank, twice that; an all-to-all of a buffer of B, (p - 1)/p · B. Sums of
gradients over replicas, once a step, and what pipeline stages hand on are no part of a layer; nor is the
repetition of the forward pass where activations are recomputed.

With c context-parallel and t tensor-parallel ranks a rank holds n/c tokens inside a layer (a t-th of them
between layers under sequence parallelism). Of R rows of attention it sends O = min(R, n/c): a buffer of
fixed size that cannot overflow, so what moves falls with the share of light tokens below 1/c of them.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from chiar_megatron.config.schedule import parse_schedule
from chiar_megatron.config.schema import ModelConfig, ParallelConfig
from chiar_megatron.errors import ConfigError
from chiar_megatron.model.pieces import Sizes
from chiar_megatron.operators.context_parallel import key_value_copies
from chiar_megatron.routing.balance import capacity_rows

FLOAT32 = 4
_OVER_CONTEXT = ("heads", "decision", "collapse", "rbf_features", "meta_router")


@dataclass(frozen=True)
class Transfer:
    """Bytes that one process sends for one part of a layer, for one micro-batch in training."""

    name: str
    layer: int
    """From 1."""
    forward: float
    backward: float

    @property
    def crosses_context(self) -> bool:
        """Whether it goes to context-parallel ranks too; else it stays among tensor-parallel ones."""
        return self.name in _OVER_CONTEXT


@dataclass(frozen=True)
class Traffic:
    """Every transfer of a micro-batch's way through the layers."""

    transfers: tuple[Transfer, ...]

    def total(self, layer: int | None = None, names: Collection[str] | None = None) -> tuple[float, float]:
        """(forward, backward) bytes: of all layers or of one (from 1), of all names or of some."""
        chosen = [
            transfer
            for transfer in self.transfers
            if (layer is None or transfer.layer == layer) and (names is None or transfer.name in names)
        ]
        return sum(t.forward for t in chosen), sum(t.backward for t in chosen)


def traffic_per_micro_batch(
    model: ModelConfig,
    parallel: ParallelConfig,
    micro_batch_size: int,
    *,
    routed_fraction: float | None = None,
    element_bytes: int = 2,
) -> Traffic:
    """The bytes of one micro-batch of sequences of `model.seq_length` (a resolved model) in training.

    routed_fraction: share of light tokens in R layers; needed where rows are as many as light tokens
    (`capacity: none`, or no target), else the capacity says how many there are.
    element_bytes: of an activation, 2 in bfloat16. Scores and what is pooled are float32.
    Raises ConfigError for a null size, or if the number of rows is not known.
    """
    tokens = micro_batch_size * model.seq_length
    rows = capacity_rows(model.router, tokens)
    if rows is None and routed_fraction is not None:
        rows = round(routed_fraction * tokens)
    counter = _Counter(model, parallel, Sizes.of(model), tokens, element_bytes)
    transfers: list[Transfer] = []
    for layer, kind in enumerate(parse_schedule(model.schedule), start=1):
        parts = [("feed_forward", *counter.matrices())]
        if kind == "A":
            parts += counter.full_attention()
        elif kind == "R":
            parts += counter.routed(rows)
        if layer == 1 and model.meta_router.enabled:
            parts.append(("meta_router", *counter.meta_router()))
        transfers += [Transfer(name, layer, forward, backward) for name, forward, backward in parts]
    return Traffic(tuple(transfers))


_Part = tuple[str, float, float]  # name, bytes forward, bytes backward


@dataclass(frozen=True)
class _Counter:
    model: ModelConfig
    parallel: ParallelConfig
    sizes: Sizes
    tokens: int
    element_bytes: int

    @property
    def held(self) -> int:
        """Tokens that a tensor-parallel group works on."""
        return self.tokens // self.parallel.context_parallel_size

    def matrices(self) -> tuple[float, float]:
        """A column-parallel product of all tokens followed by a row-parallel one."""
        hidden = self._hidden(self.held)
        if self.parallel.sequence_parallel:
            # megatron-core gathers the input a second time, for the gradient of the weights.
            return 2 * self._gather(hidden), 3 * self._gather(hidden)
        return 2 * self._gather(hidden), 2 * self._gather(hidden)

    def full_attention(self) -> list[_Part]:
        """Attention of every token: an A layer, or an R layer that computes densely."""
        numbers = self.held * (2 * self._query_width() + self._key_value_width())
        return [("projections", *self.matrices()), ("heads", *self._exchange(numbers))]

    def routed(self, rows: int | None) -> list[_Part]:
        """An R layer's router and operators."""
        router, scores = self.model.router, self._over_parts(FLOAT32 * self.tokens)
        blends, routed_keys = router.kind in ("soft", "hard"), router.keys_values == "routed"
        parts: list[_Part] = []
        if blends and router.collapse_weight > 0.0:
            parts.append(("collapse", 2 * self._over_parts(FLOAT32 * self.sizes.operators), 0.0))
        if self.sizes.rbf:
            features = self._over_parts(FLOAT32 * self.tokens * 2 * self.sizes.rbf)
            parts += [("rbf_features", features, features), ("rbf_feed_forward", *self.matrices())]
        if blends or router.dispatch == "dense":
            return [*parts, ("decision", scores if routed_keys else 0.0, 0.0), *self.full_attention()]
        if rows is None:
            raise ConfigError(
                "routed_fraction: is needed, since model.router.target and capacity fix no number of rows"
            )
        return [("decision", scores, 0.0), *self._skipping(rows, routed_keys)]

    def _skipping(self, rows: int, routed_keys: bool) -> list[_Part]:
        own = min(rows, self.held)
        hidden, row_hidden = self._hidden(self.held), self._hidden(own)
        keys = own if routed_keys else self.held
        numbers = own * 2 * self._query_width() + keys * self._key_value_width()
        heads: _Part = ("heads", *self._exchange(numbers))
        summed = 2 * self._gather(row_hidden)
        if not self.parallel.sequence_parallel:
            entering = summed if routed_keys else 2 * self._gather(hidden)
            return [("rows_in", 0.0, entering), heads, ("rows_out", summed, 0.0)]
        least = min(self._gather(hidden), summed)
        entering = least if routed_keys else self._gather(hidden)
        return [("rows_in", entering, entering), heads, ("rows_out", least, least)]

    def meta_router(self) -> tuple[float, float]:
        """What pools the embeddings; `running` adds its sums to those of the step."""
        pooling, h = self.model.meta_router.pooling, self.sizes.h
        if pooling == "batch":
            summed = 2 * self._over_parts(FLOAT32 * h)
            return summed, summed
        if pooling == "causal":
            gathered = self._over_parts(FLOAT32 * h * self.tokens)
            return gathered, gathered
        return 0.0, 0.0

    def _hidden(self, tokens: int) -> int:
        return tokens * self.sizes.h * self.element_bytes

    def _gather(self, size: float) -> float:
        """Gathering or scattering over tensor-parallel ranks; a sum is both."""
        return _share(self.parallel.tensor_model_parallel_size) * size

    def _exchange(self, numbers: int) -> tuple[float, float]:
        """All-to-alls over context-parallel ranks, whose gradients go the same way back."""
        sent = _share(self.parallel.context_parallel_size) * numbers * self.element_bytes
        return sent, sent

    def _over_parts(self, size: float) -> float:
        """Gathering over all ranks that hold parts of a sequence."""
        tensor = self.parallel.tensor_model_parallel_size if self.parallel.sequence_parallel else 1
        return _share(tensor * self.parallel.context_parallel_size) * size

    def _query_width(self) -> int:
        return self.sizes.query_width // self.parallel.tensor_model_parallel_size

    def _key_value_width(self) -> int:
        """Of keys and values, with the copies that context-parallel ranks are sent."""
        groups = (self.model.num_query_groups or 1) // self.parallel.tensor_model_parallel_size
        copies = key_value_copies(groups, self.parallel.context_parallel_size)
        return copies * self.sizes.key_value_width // self.parallel.tensor_model_parallel_size


def _share(ranks: int) -> float:
    return (ranks - 1) / ranks
