"""Bytes that a layer keeps for its backward pass, as our CUDA code keeps them, tensor by tensor.

Counted are the tensors that forward saves, once each where several operations save the same one. Compiled
layers keep less: what is pointwise is computed again in the backward pass. What a kernel needs for itself
(logsumexp, statistics of norms, row numbers) is small and counted.

With c context-parallel ranks a rank has 1/c of the tokens but for their attention, where it has all tokens'
rows, keys and values of 1/c of the heads: as many numbers, plus the copies of key-value groups that do not go
round. The transfers keep nothing of their own, but what arrives from them is another tensor than what was
sent: an output is kept by attention, which has some heads of all rows, and by the projection, which has all
heads of own rows (min(R, tokens / c), used or not). Numbers of rows, and angles of keys that are rows, are
those of the whole micro-batch on every rank. What passes through the transfers of attention's backward pass
is taken to be less than what does in the feed-forward layer's. Counted so by reading, and checked against
what autograd keeps on a CPU; buffers of NCCL are not torch's, and not counted.
"""

from __future__ import annotations

from dataclasses import dataclass

from chiar_megatron.config.routing import computes_all, has_fixed_rows
from chiar_megatron.config.schema import RunConfig
from chiar_megatron.model.pieces import Sizes
from chiar_megatron.model.pipeline import expected_capacity, expected_fraction
from chiar_megatron.operators.context_parallel import key_value_copies
from chiar_megatron.runtime.paths import holds_whole_layers

_STATISTICS = 8  # bytes of a norm's mean and scale a token
_ROW_NUMBERS = 48  # bytes a token: which row it has, which token a row has, and what is without one
_PLACE = 9  # bytes of a number and a flag: of each row, where context-parallel ranks exchange them


@dataclass(frozen=True)
class LayerMemory:
    """Bytes a token of a micro-batch, on one process."""

    kept: float
    """From forward to backward, the input included."""
    passing: float
    """Needed for a moment more while backward goes through the layer."""
    input: float
    """The input alone: what is kept where the layer is computed again."""
    constant: float = 0.0
    """Bytes that are kept however few tokens there are."""


@dataclass(frozen=True)
class ActivationModel:
    """How tokens, widths and bytes of a resolved recipe fall to one process."""

    config: RunConfig
    compiled: bool
    """Whether layers are compiled, as they are on CUDA if nobody forbids it."""

    @property
    def element(self) -> int:
        """Bytes of an activation."""
        return 2 if self.config.training.precision == "bf16" else 4

    @property
    def tokens(self) -> float:
        """Of a micro-batch, on one context-parallel rank."""
        config = self.config
        tokens = config.training.micro_batch_size * config.model.seq_length
        return tokens / config.parallel.context_parallel_size

    def layer(self, kind: str) -> LayerMemory:
        """A layer of kind "D", "R" or "A"."""
        compiled = self.compiled and (kind != "R" or has_fixed_rows(self.config.model.router))
        sizes, tensor = Sizes.of(self.config.model), self.config.parallel.tensor_model_parallel_size
        e, own = self.element, self._own_part()
        token, constant = sizes.h * own * e, 0.0
        kept = token + self._feed_forward(sizes, compiled)
        if kind == "A":  # the input, and the sum with it before the norm (or the norm before it)
            kept += self._attention(sizes) + token + _STATISTICS
        elif kind == "D":
            kept += token + _STATISTICS
        elif computes_all(self.config.model.router):
            kept += self._all_operators(sizes, token, compiled)
        else:
            kept += self._skipping(sizes, token, compiled)
            if not compiled and self._groups() > 1:  # queries' weights lie between those of keys and values
                constant = (sizes.query_width + sizes.key_value_width) * sizes.h * e / tensor
        passing = ((sizes.fc1_width + sizes.ffn) / tensor + 3 * sizes.h) * e
        return LayerMemory(kept, passing, token, constant)

    def loss(self) -> float:
        """Bytes a token of logits; the kernel of the loss works inside them."""
        model, tensor = self.config.model, self.config.parallel.tensor_model_parallel_size
        assert model.vocab_size is not None
        return model.vocab_size / tensor * self.element

    def head(self) -> float:
        """Bytes a token that the final norm and the output product keep."""
        token = self.config.model.hidden_size * self._own_part() * self.element
        return 2 * token + _STATISTICS

    def embedding(self) -> float:
        """Bytes a token besides the first layer's input: the mask of dropout."""
        return self.config.model.hidden_size * self._own_part() * (self.config.model.dropout > 0)

    def _own_part(self) -> float:
        parallel = self.config.parallel
        return 1 / parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1.0

    def _feed_forward(self, sizes: Sizes, compiled: bool) -> float:
        """Its input, what stands before and after the activation, the sum after it and its norm; masks."""
        model, tensor = self.config.model, self.config.parallel.tensor_model_parallel_size
        token = sizes.h * self._own_part() * self.element
        inner = sizes.fc1_width + sizes.ffn
        if model.activation == "swiglu" and not compiled:
            inner += sizes.ffn  # silu of the gate
        masks = (sizes.ffn / tensor + sizes.h * self._own_part()) * (model.dropout > 0)
        return 2 * token + inner / tensor * self.element + _STATISTICS + masks

    def _attention(self, sizes: Sizes) -> float:
        """Of all tokens. The product's output stays for the values' sake; queries and keys are kept once
        more, rotated; then the output and its logsumexp. Of what context-parallel ranks exchange, what has
        arrived stays, and the output before and after."""
        parallel, e = self.config.parallel, self.element
        widths = 3 * sizes.query_width + 1.5 * sizes.key_value_width
        if parallel.context_parallel_size > 1:
            widths = 3 * sizes.query_width + self._copies() * sizes.key_value_width
        if parallel.sequence_parallel and self.config.training.micro_batch_size > 1:
            widths += sizes.query_width  # the output in the order of the ranks that it goes to
        return (widths * e + self.config.model.num_attention_heads * 4) / parallel.tensor_model_parallel_size

    def _rows(self, sizes: Sizes, rows: float, keys: float) -> float:
        """rows, keys: as shares of the tokens. The rows themselves; their rotated queries, output and its
        logsumexp; keys and values, and keys rotated; numbers of rows, and angles of keys that are rows."""
        parallel, e = self.config.parallel, self.element
        tensor, context = parallel.tensor_model_parallel_size, parallel.context_parallel_size
        heads = self.config.model.num_attention_heads
        widths = 2 * rows * sizes.query_width + 1.5 * keys * self._copies() * sizes.key_value_width
        own, numbers = rows, float(_ROW_NUMBERS)
        if context > 1:  # own rows, which projections have
            own = min(1.0, rows * context)
            widths += own * sizes.query_width
            numbers += _PLACE * (rows + own) * context
        routed_keys = self.config.model.router.keys_values == "routed"
        angles = 4 * sizes.query_width / heads if routed_keys else 0  # else those of the sequence
        numbers += rows * context * (angles + 8)  # and ranges of keys
        return (widths * e + rows * heads * 4) / tensor + own * sizes.h * e + numbers

    def _copies(self) -> int:
        """Of keys and values, as context-parallel ranks are sent them."""
        return key_value_copies(self._groups(), self.config.parallel.context_parallel_size)

    def _groups(self) -> int:
        """Of keys and values on one tensor-parallel rank."""
        groups = self.config.model.num_query_groups
        assert groups is not None, "the config must be resolved"
        return groups // self.config.parallel.tensor_model_parallel_size

    def _skipping(self, sizes: Sizes, token: float, compiled: bool) -> float:
        """Rows of light tokens; dark ones are mixed from the input, which is kept anyway."""
        parallel, router, e = self.config.parallel, self.config.model.router, self.element
        rows = expected_capacity(self.config) or expected_fraction(router)
        routed_keys = router.keys_values == "routed"
        kept = self._rows(sizes, rows, rows if routed_keys else 1.0)
        if parallel.sequence_parallel and not routed_keys:
            kept += sizes.h * e  # all tokens, gathered for keys and values
        kept += self._gate(token)
        fused = holds_whole_layers(parallel) and e == 2 and has_fixed_rows(router)
        if self.config.model.norm == "pre":  # of both norms what is not cut into rows or gathered
            kept += token * (0 if routed_keys or parallel.sequence_parallel else 1) + _STATISTICS
            return kept + token + _STATISTICS
        if compiled or fused:
            return kept + token + _STATISTICS
        # By plain code both operators' norm is one in float32: its input, result and chosen weights stay.
        return kept + (8 / e + 1) * token + _STATISTICS

    def _all_operators(self, sizes: Sizes, token: float, compiled: bool) -> float:
        """Dense dispatch, soft and hard: each operator's sum before its norm; blends also their outputs,
        which compiled code makes again."""
        router = self.config.model.router
        operators = 3 if sizes.rbf else 2
        kept = self._attention(sizes) + operators * (token + _STATISTICS)
        if router.kind not in ("soft", "hard"):
            return kept + self._gate(token)
        kept += 8 * token / self.element + (0 if compiled else operators * token)
        if sizes.rbf:
            kept += self._feed_forward(sizes, compiled) + token + 4 * sizes.rbf * 4
        return kept

    def _gate(self, token: float) -> float:
        """Attention's output before its gate, and of the score two numbers a token."""
        if self.config.model.router.kind not in ("learned", "entropy_gated"):
            return 0.0
        return token + 8
