"""Bytes that a layer keeps for its backward pass, as our CUDA code keeps them, tensor by tensor.

Counted are the tensors that forward saves, once each where several operations save the same one. Compiled
layers keep less: what is pointwise is computed again in the backward pass. What a kernel needs for itself
(logsumexp, statistics of norms, row numbers) is small and counted.
"""

from __future__ import annotations

from dataclasses import dataclass

from chiar_megatron.config.routing import computes_all, has_fixed_rows
from chiar_megatron.config.schema import RunConfig
from chiar_megatron.model.pieces import Sizes
from chiar_megatron.model.pipeline import expected_capacity, expected_fraction

_STATISTICS = 8  # bytes of a norm's mean and scale a token
_ROW_NUMBERS = 48  # bytes a token: which row it has, which token a row has, and what is without one


@dataclass(frozen=True)
class LayerMemory:
    """Bytes a token of a micro-batch, on one process."""

    kept: float
    """From forward to backward, the input included."""
    passing: float
    """Needed for a moment more while backward goes through the layer."""
    input: float
    """The input alone: what is kept where the layer is computed again."""


@dataclass(frozen=True)
class ActivationModel:
    """How tokens, widths and bytes of a resolved recipe fall to one process."""

    config: RunConfig
    compiled: bool
    """Whether layers are compiled, as they are on CUDA without tensor parallelism."""

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
        token = sizes.h * own * e
        kept = token + self._feed_forward(sizes, compiled)
        if kind == "A":  # the input, and the sum with it before the norm (or the norm before it)
            kept += self._attention(sizes, 1.0, 1.0) + token + _STATISTICS
        elif kind == "D":
            kept += token + _STATISTICS
        elif computes_all(self.config.model.router):
            kept += self._all_operators(sizes, token, compiled)
        else:
            kept += self._skipping(sizes, token, compiled)
        passing = ((sizes.fc1_width + sizes.ffn) / tensor + 3 * sizes.h) * e
        return LayerMemory(kept, passing, token)

    def loss(self) -> float:
        """Bytes a token of logits and what the loss makes of them; the kernel works inside the logits."""
        model, tensor = self.config.model, self.config.parallel.tensor_model_parallel_size
        assert model.vocab_size is not None
        # Over several ranks megatron-core's cross entropy keeps a float32 softmax beside the logits.
        return model.vocab_size / tensor * (self.element if tensor == 1 else self.element + 4)

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

    def _attention(self, sizes: Sizes, queries: float, keys: float) -> float:
        """queries, keys: as shares of the tokens. The products' output stays for the values' sake; queries
        and keys are kept once more, rotated; then the output and its logsumexp."""
        tensor, e = self.config.parallel.tensor_model_parallel_size, self.element
        heads = self.config.model.num_attention_heads
        product = queries * sizes.query_width + keys * sizes.key_value_width
        rotated = queries * sizes.query_width + keys * sizes.key_value_width / 2
        output = queries * sizes.query_width
        return ((product + rotated + output) * e + queries * heads * 4) / tensor

    def _skipping(self, sizes: Sizes, token: float, compiled: bool) -> float:
        """Rows of light tokens; dark ones are mixed from the input, which is kept anyway."""
        router = self.config.model.router
        rows = expected_capacity(self.config) or expected_fraction(router)
        keys = rows if router.keys_values == "routed" else 1.0
        kept = self._attention(sizes, rows, keys)
        # Queries have a product of their own, which their rotation does not keep.
        tensor, e = self.config.parallel.tensor_model_parallel_size, self.element
        kept -= rows * sizes.query_width * e / tensor
        kept += rows * sizes.h * e + _ROW_NUMBERS
        if self.config.parallel.sequence_parallel:
            kept += sizes.h * e  # all tokens, gathered for keys and values
        kept += self._gate(token, compiled)
        fused = tensor == 1 and e == 2 and has_fixed_rows(router)
        if compiled or fused or self.config.model.norm == "pre":
            return kept + token + _STATISTICS
        # By plain code both operators' norm is one in float32: its input, result and chosen weights stay.
        return kept + (8 / e + 1) * token + _STATISTICS

    def _all_operators(self, sizes: Sizes, token: float, compiled: bool) -> float:
        """Dense dispatch, soft and hard: each operator's sum before its norm; blends also their outputs,
        which compiled code makes again, and the gate's float32 input."""
        router = self.config.model.router
        operators = 3 if sizes.rbf else 2
        kept = self._attention(sizes, 1.0, 1.0) + operators * (token + _STATISTICS)
        if router.kind not in ("soft", "hard"):
            return kept + self._gate(token, compiled)
        kept += 8 * token / self.element + (0 if compiled else operators * token)
        if sizes.rbf:
            kept += self._feed_forward(sizes, compiled) + token + 4 * sizes.rbf * 4
        return kept

    def _gate(self, token: float, compiled: bool) -> float:
        """Attention's output before its gate, and the score's input: float32, normalised."""
        if self.config.model.router.kind not in ("learned", "entropy_gated"):
            return 0.0
        return token * (1 + (4 if compiled else 8) / self.element)
