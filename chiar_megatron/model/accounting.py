"""The one ledger of parameters and floating-point operations (DESIGN, decision 7).

Planner, MFU, scaling laws, pipeline cutting and reports all read it. A multiply-add counts 2. Counted are
matrix products and DCTs; left out, as FLOP counters do, is what grows with h alone per token: norms,
activations, softmax, rotary positions, filters, the entropy's sum, biases, dropout, and the embedding's
look-up. So is recomputation of activations, except where an operator always does it (RBF mixing).

`executed` is what the hardware does, `padded` the part of it spent on unused capacity rows, `useful` what
the routing decision needs: light tokens through attention, dark ones through spectral mixing.

Where routed layers skip (`router.dispatch: skip`), executed = useful + padded. Dense dispatch executes every
operator on every token, and so do soft and hard routers whatever the dispatch (their gradient needs every
output; `hard` of two operators skips at evaluation, and is counted as dense there too). Of the kernels'
tiles only what rows and keys ask for is counted, not the edges; float32 on CUDA, which has no kernels and
computes every key for every row and mixes all tokens, executes more than is written here. So do c context
parallel ranks, whose query and output projections have min(R, tokens / c) rows each for R in all.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from chiar_megatron.config.schedule import parse_schedule
from chiar_megatron.config.schema import ModelConfig
from chiar_megatron.errors import ConfigError
from chiar_megatron.model.pieces import CountedDct, Flops, Piece, PieceCounter, Sizes

Phase = Literal["forward", "training"]
ATTENTION_PIECES = ("qkv", "scores", "values", "output_projection")


@dataclass(frozen=True)
class Parameters:
    """Exact numbers of trained parameters of the whole model, without padding of the vocabulary."""

    total: int
    embedding: int
    """The token table, shared with the head if tied."""
    head: int
    """The untied output head; 0 if tied."""
    non_embedding: int
    """total - embedding - head."""
    per_layer: tuple[int, ...]
    """First to last; layer 1 includes the MetaRouter."""


@dataclass(frozen=True)
class Ledger:
    """Every piece of one sequence's way through the model."""

    pieces: tuple[Piece, ...]

    def total(
        self, phase: Phase = "training", *, layer: int | None = None, names: Collection[str] | None = None
    ) -> Flops:
        """Sum over pieces: of all layers or of one (from 1), of all names or of some."""
        return _sum(
            piece.training if phase == "training" else piece.forward
            for piece in self.pieces
            if (layer is None or piece.layer == layer) and (names is None or piece.name in names)
        )

    def per_layer(self, phase: Phase = "training") -> tuple[Flops, ...]:
        """Sums of the layers, first to last, without the head."""
        last = max(piece.layer or 0 for piece in self.pieces)
        return tuple(self.total(phase, layer=layer) for layer in range(1, last + 1))


@dataclass(frozen=True)
class Savings:
    """What routing saves against the full-attention twin, as shares: 0.4 is 40% less, below 0 is more."""

    attention_executed: float
    """Attention's own pieces alone, not what replaces them: the flattering figure."""
    attention_useful: float
    model_executed: float
    """The whole model with its head."""
    model_useful: float
    measured_time: float | None
    """Of measured seconds; None if nothing was measured."""

    def __str__(self) -> str:
        """All three side by side; in brackets the useful share, which unused rows and dense dispatch lose."""
        time = (
            "time not measured" if self.measured_time is None else f"measured time {self.measured_time:.1%}"
        )
        return (
            f"saved against the full-attention twin: attention-only {self.attention_executed:.1%} "
            f"(useful {self.attention_useful:.1%}), whole model {self.model_executed:.1%} "
            f"(useful {self.model_useful:.1%}), {time}"
        )


def parameter_count(model: ModelConfig) -> Parameters:
    """Parameters of a resolved model. Raises ConfigError if a size is still null."""
    sizes = Sizes.of(model)
    per_layer = [_layer_parameters(model, sizes, kind) for kind in parse_schedule(model.schedule)]
    if model.meta_router.enabled:
        per_layer[0] += sizes.h + 1
    embedding = sizes.vocab * sizes.h
    head = 0 if model.tie_embeddings else embedding
    non_embedding = sum(per_layer) + _norm_parameters(model)
    return Parameters(embedding + head + non_embedding, embedding, head, non_embedding, tuple(per_layer))


def flops_per_sequence(
    model: ModelConfig,
    seq_length: int,
    routed_fraction: float | Sequence[float],
    *,
    causal: bool = True,
    dct_form: CountedDct = "gemm",
    capacity_fraction: float | None = None,
    rbf_fraction: float = 0.0,
) -> Ledger:
    """The ledger of one sequence of `seq_length` tokens through a resolved model.

    routed_fraction: share of tokens that go to attention in R layers, in [0, 1], one for all or one for
    each R layer; light tokens are taken to be spread evenly over the sequence. Soft routers ignore it:
    they use every operator for every token.
    causal: count the causal half of the scores; False counts all keys for every query, as FLOP counters do.
    Where an explicit mask is needed (documents in A layers and in dense R layers, `keys_values: routed` in
    dense ones) the full square is executed anyway; skipping gives each row a range of keys instead. What
    documents hide within the causal half is not subtracted: their lengths are unknown here.
    dct_form: "gemm" 2h² a transform (executed on GPUs), "fft" 2.5·h·log2 h.
    capacity_fraction: where R layers skip, None for exactly as many rows as light tokens; else the rows that
    attention has, as a share of the tokens. At most these are filled, and what overflows is mixed. The
    query and output projections (with `keys_values: routed` keys and values too) run over unused rows:
    padding. Scores and values do not: an unused row sees no key. Dense layers have no rows and ignore it.
    rbf_fraction: share of tokens that a three-operator hard router sends to RBF mixing.
    Training counts 3 forward passes for products of weights or activations, 2 for DCTs that pass a
    gradient (their matrix has none), 1 for a threshold router's entropy.
    Raises ConfigError for a fraction outside [0, 1], a wrong number of them, or a null size.
    """
    kinds = parse_schedule(model.schedule)
    fractions = iter(_fractions_of_routed_layers(kinds, routed_fraction, rbf_fraction))
    if capacity_fraction is not None:
        _check_fraction("capacity_fraction", capacity_fraction)
    counter = PieceCounter(model, Sizes.of(model), seq_length, causal, dct_form)
    pieces: list[Piece] = []
    for layer, kind in enumerate(kinds, start=1):
        if kind == "R":
            pieces += counter.routed_layer(layer, next(fractions), rbf_fraction, capacity_fraction)
        elif kind == "A":
            pieces += counter.attention_layer(layer)
        else:
            pieces.append(counter.mixing(layer, seq_length, seq_length))
        pieces.append(counter.feed_forward(layer))
        if layer == 1 and model.meta_router.enabled:
            pieces.append(counter.meta_router(layer))
    pieces.append(counter.head())
    return Ledger(tuple(pieces))


def model_flops_per_token(
    model: ModelConfig,
    seq_length: int,
    routed_fraction: float | Sequence[float],
    capacity_fraction: float | None = None,
) -> float:
    """Useful training FLOPs a token, for MFU: causal, DCTs as FFTs (a GEMM's extra work is no merit).

    capacity_fraction: given, light tokens beyond it count as mixed, not attended.
    """
    ledger = flops_per_sequence(
        model, seq_length, routed_fraction, dct_form="fft", capacity_fraction=capacity_fraction
    )
    return ledger.total("training").useful / seq_length


def full_attention_twin(model: ModelConfig) -> ModelConfig:
    """The same model with attention in every layer and no MetaRouter."""
    layers = len(parse_schedule(model.schedule))
    return replace(model, schedule=f"A*{layers}", meta_router=replace(model.meta_router, enabled=False))


def savings(
    model: ModelConfig,
    seq_length: int,
    routed_fraction: float | Sequence[float],
    *,
    phase: Phase = "training",
    dct_form: CountedDct = "gemm",
    capacity_fraction: float | None = None,
    measured_seconds: tuple[float, float] | None = None,
) -> Savings:
    """Savings against `full_attention_twin(model)`; arguments as for `flops_per_sequence`.

    measured_seconds: time for the same tokens of (this model, its twin), where it was measured.
    """
    own = flops_per_sequence(
        model, seq_length, routed_fraction, dct_form=dct_form, capacity_fraction=capacity_fraction
    )
    twin = flops_per_sequence(full_attention_twin(model), seq_length, 1.0)
    own_attention, twin_attention = (ledger.total(phase, names=ATTENTION_PIECES) for ledger in (own, twin))
    own_all, twin_all = own.total(phase), twin.total(phase)
    return Savings(
        attention_executed=1 - own_attention.executed / twin_attention.executed,
        attention_useful=1 - own_attention.useful / twin_attention.useful,
        model_executed=1 - own_all.executed / twin_all.executed,
        model_useful=1 - own_all.useful / twin_all.useful,
        measured_time=None if measured_seconds is None else 1 - measured_seconds[0] / measured_seconds[1],
    )


def _layer_parameters(model: ModelConfig, sizes: Sizes, kind: str) -> int:
    h, norm = sizes.h, _norm_parameters(model)
    bias = 1 if model.add_bias else 0
    feed_forward = (h + bias) * sizes.fc1_width + (sizes.ffn + bias) * h
    count = feed_forward + norm
    if kind in "DR":
        count += h + norm
    if kind in "AR":
        qkv_width = sizes.query_width + sizes.key_value_width
        count += (h + bias) * qkv_width + (sizes.query_width + bias) * h + norm
    if kind == "R":
        if model.router.kind in ("learned", "entropy_gated"):
            count += h + 1
        count += sizes.operators * (h + 1 + 1)
        if sizes.rbf:
            count += (2 * sizes.rbf + 1) * h + feed_forward + norm
    return count


def _norm_parameters(model: ModelConfig) -> int:
    return model.hidden_size * (2 if model.normalization == "LayerNorm" else 1)


def _sum(flops: Iterable[Flops]) -> Flops:
    return sum(flops, start=Flops())


def _fractions_of_routed_layers(
    kinds: Sequence[str], routed_fraction: float | Sequence[float], rbf_fraction: float
) -> Sequence[float]:
    layers = kinds.count("R")
    if isinstance(routed_fraction, (int, float)):
        fractions: Sequence[float] = [routed_fraction] * layers
    else:
        fractions = routed_fraction
    if len(fractions) != layers:
        raise ConfigError(
            f"routed_fraction: {len(fractions)} values for {layers} routed layers; "
            "give one number, or one for each R of model.schedule"
        )
    _check_fraction("rbf_fraction", rbf_fraction)
    for fraction in fractions:
        _check_fraction("routed_fraction", fraction)
        _check_fraction("routed_fraction + rbf_fraction", fraction + rbf_fraction)
    return fractions


def _check_fraction(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ConfigError(f"{name}: {value} must be a share of the tokens, from 0 to 1")
