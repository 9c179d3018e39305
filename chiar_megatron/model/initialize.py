"""Initial weights as a pure function of (seed, name): the same full tensors in every layout.

µP (Yang et al. 2022, arXiv:2203.03466), so that one learning rate holds at every width: with m = hidden size
over base width, matrices start at `init_std/√m`, the head and routers at `init_std/m`, and all of them learn
at `lr/m` (`training/optimizer.py`); the embedding, norms and biases stay. Heads keep their size, so attention
needs no other scale.

Each rank draws the full tensor of a parameter from a generator seeded by its global name, and keeps
its own slice; rows that pad the vocabulary are zero.
"""

from __future__ import annotations

import hashlib
import re
from typing import Any

import torch
from megatron.core.utils import get_pg_rank
from torch import Tensor

from chiar_megatron.config.schema import ModelConfig
from chiar_megatron.model.gpt import ChiarModel

_LAYER = re.compile(r"decoder\.layers\.(\d+)\.")


@torch.no_grad()
def initialize_parameters(model: ChiarModel, seed: int) -> None:
    """Matrices N(0, init_std), biases 0, norms and filters 1; MetaRouter's weight 0 and bias as configured.

    Source: paper, appendix; DESIGN section 1. With µP the std follows the width (Yang et al. 2022,
    arXiv:2203.03466, table 3).
    """
    rank, size = get_pg_rank(model.tp_group), model.config.tensor_model_parallel_size
    for name, parameter in model.named_parameters():
        full = _full_tensor(global_name(model, name), _full_shape(model, name, parameter), model.model, seed)
        parameter.copy_(_shard(full, parameter, rank, size))


def global_name(model: ChiarModel, name: str) -> str:
    """A parameter's name with its layer numbered (from 0) in the whole model, and one name for the
    shared embedding on every stage."""
    if name == "output_layer.weight" and model.share_embeddings_and_output_weights:
        return "embedding.word_embeddings.weight"
    match = _LAYER.match(name)
    if match is None:
        return name
    number = model.chiar_layers[int(match.group(1))].layer_number - 1
    return f"decoder.layers.{number}.{name[match.end() :]}"


def _full_shape(model: ChiarModel, name: str, parameter: Any) -> list[int]:
    shape = list(parameter.shape)
    if getattr(parameter, "tensor_model_parallel", False):
        shape[parameter.partition_dim] *= model.config.tensor_model_parallel_size
    if "word_embeddings" in name or name == "output_layer.weight":
        assert model.model.vocab_size is not None
        shape[0] = model.model.vocab_size
    return shape


def _full_tensor(name: str, shape: list[int], model: ModelConfig, seed: int) -> Tensor:
    if "meta_router.gate_proj" in name:
        return torch.full(shape, model.meta_router.bias_init if name.endswith("bias") else 0.0)
    if name.endswith("bias"):
        return torch.zeros(shape)
    if len(shape) == 1:
        return torch.ones(shape)
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    return torch.randn(shape, generator=generator) * _initial_std(name, model)


def width_scale(model: ModelConfig) -> float:
    """µP's 1/m: the base width over the model's; 1 without µP."""
    base = model.mup_base_hidden_size
    return 1.0 if base is None else base / model.hidden_size


def follows_width(name: str, parameter: Tensor) -> bool:
    """Whether µP scales a parameter: a matrix whose inputs grow with the width, so not the embedding."""
    return parameter.dim() > 1 and "word_embeddings" not in name


def _initial_std(name: str, model: ModelConfig) -> float:
    scale = width_scale(model)
    if "word_embeddings" in name:
        return model.init_std
    # Outputs of a fixed number (head, routers) must not grow with the width at all.
    is_output = name == "output_layer.weight" or ".router." in name
    return model.init_std * (scale if is_output else scale**0.5)


def _shard(full: Tensor, parameter: Any, rank: int, size: int) -> Tensor:
    if not getattr(parameter, "tensor_model_parallel", False):
        return full
    dim, stride = parameter.partition_dim, getattr(parameter, "partition_stride", 1)
    padding = parameter.shape[dim] * size - full.shape[dim]
    if padding:
        full = torch.cat((full, full.new_zeros(padding, *full.shape[1:])))
    # A gated layer stacks `stride` matrices: each is split over ranks on its own.
    pieces = [piece.chunk(size, dim)[rank] for piece in full.chunk(stride, dim)]
    return torch.cat(pieces, dim)
