"""Parameters that one process holds, exactly: what tensor parallelism splits, and what every rank repeats."""

from __future__ import annotations

from chiar_megatron.config.mcore import padded_vocab_size
from chiar_megatron.config.pipeline import Layout
from chiar_megatron.config.schedule import parse_schedule
from chiar_megatron.config.schema import ModelConfig, ParallelConfig
from chiar_megatron.model.pieces import Sizes


def layer_parameters(model: ModelConfig, kind: str, tensor: int) -> int:
    """Of one layer ("D", "R" or "A") on one of `tensor` ranks, without the MetaRouter."""
    sizes, norm = Sizes.of(model), _norm(model)
    h, bias = sizes.h, int(model.add_bias)
    feed_forward = ((h + bias) * sizes.fc1_width + sizes.ffn * h) // tensor + bias * h
    count = feed_forward + norm
    if kind in "DR":
        count += h + norm
    if kind in "AR":
        qkv_width = sizes.query_width + sizes.key_value_width
        count += ((h + bias) * qkv_width + sizes.query_width * h) // tensor + bias * h + norm
    if kind == "R":
        if model.router.kind in ("learned", "entropy_gated"):
            count += h + 1
        count += sizes.operators * (h + 2)
        if sizes.rbf:
            count += (2 * sizes.rbf + 1) * h + feed_forward + norm
    return count


def stage_parameters(model: ModelConfig, parallel: ParallelConfig, layout: Layout, stage: int) -> int:
    """Of all chunks of one pipeline stage (from 0) on one process, padding of the vocabulary included.

    A tied embedding stands on the first and on the last stage, where these differ.
    """
    tensor, stages = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    kinds = parse_schedule(model.schedule)
    count, first = 0, 0
    for chunk, layers in enumerate(layout):
        if chunk % stages == stage:
            count += sum(layer_parameters(model, kind, tensor) for kind in kinds[first : first + layers])
            if first == 0 and layers > 0 and model.meta_router.enabled:
                count += model.hidden_size + 1
        first += layers
    assert model.vocab_size is not None, "the config must be resolved"
    table = padded_vocab_size(model.vocab_size, tensor) // tensor * model.hidden_size
    if stage == 0:
        count += table
    if stage == stages - 1:
        count += _norm(model)
        if stages > 1 or not model.tie_embeddings:
            count += table
    return count


def _norm(model: ModelConfig) -> int:
    return model.hidden_size * (2 if model.normalization == "LayerNorm" else 1)
