"""Which tensor of the `transformers` model is which of ours, and back: names, and how fused ones are cut."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from chiar_megatron.config.schema import ModelConfig
from chiar_megatron.model.tensors import TensorSpec, join_heads, split_heads, tensor_specs

_RENAMED = (
    (r"^embedding\.word_embeddings\.", "model.embed_tokens."),
    (r"^output_layer\.", "lm_head."),
    (r"^decoder\.final_layernorm\.", "model.norm."),
    (r"^decoder\.layers\.", "model.layers."),
    (r"\.self_attention\.linear_proj\.", ".self_attn.o_proj."),
    (r"\.self_attention\.linear_qkv\.", ".self_attn.qkv_proj."),
    (r"\.linear_fc2\.", ".down_proj."),
    (r"\.linear_fc1\.", ".up_proj."),
    (r"\.pre_mlp_layernorm\.", ".post_attention_layernorm."),
)


@dataclass(frozen=True)
class Group:
    """One native tensor and the foreign ones it is cut into (most often one)."""

    native: str
    spec: TensorSpec
    foreign: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    split: Callable[[Tensor], tuple[Tensor, ...]]
    join: Callable[[tuple[Tensor, ...]], Tensor]


def groups(model: ModelConfig) -> list[Group]:
    """Every tensor of a resolved model, in both tongues."""
    return [_group(name, spec, model) for name, spec in tensor_specs(model).items()]


def foreign_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the `transformers` model's tensors."""
    return {
        name: shape
        for group in groups(model)
        for name, shape in zip(group.foreign, group.shapes, strict=True)
    }


def _group(native: str, spec: TensorSpec, model: ModelConfig) -> Group:
    name = native
    for pattern, replacement in _RENAMED:
        name = re.sub(pattern, replacement, name)
    heads, kv_heads, size = model.num_attention_heads, model.num_query_groups, model.kv_channels
    assert kv_heads is not None and size is not None, "the config must be resolved"
    rest = spec.shape[1:]
    if ".qkv_proj." in name:
        names = tuple(name.replace("qkv_proj", f"{part}_proj") for part in "qkv")
        shapes = tuple((rows * size, *rest) for rows in (heads, kv_heads, kv_heads))
        return Group(
            native,
            spec,
            names,
            shapes,
            lambda tensor: split_heads(tensor, heads, kv_heads, size),
            lambda parts: join_heads(parts[0], parts[1], parts[2], kv_heads, size),
        )
    if spec.parts == 2:
        names = (name.replace("up_proj", "gate_proj"), name)
        half = (spec.shape[0] // 2, *rest)
        return Group(native, spec, names, (half, half), _halves, torch.cat)
    return Group(native, spec, (name,), (spec.shape,), lambda tensor: (tensor,), lambda parts: parts[0])


def _halves(tensor: Tensor) -> tuple[Tensor, ...]:
    return tensor.chunk(2)
