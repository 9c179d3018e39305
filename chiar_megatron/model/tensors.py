"""Every tensor of a model by name, shape and cut, without building the model: what conversion works on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from chiar_megatron.config.fields import nearest_name
from chiar_megatron.config.problems import MAX_LINES
from chiar_megatron.config.schedule import parse_schedule
from chiar_megatron.config.schema import ModelConfig
from chiar_megatron.errors import CheckpointError
from chiar_megatron.model.pieces import Sizes

EMBEDDING, HEAD = "embedding.word_embeddings.weight", "output_layer.weight"


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of the whole model, the vocabulary without padding."""

    shape: tuple[int, ...]
    split: int | None = None
    """The dimension that tensor parallelism cuts; None: every rank has it whole."""
    parts: int = 1
    """Matrices stacked along that dimension, each cut on its own (SwiGLU's gate and up: 2)."""
    is_buffer: bool = False
    """Whether it is no trained parameter (thresholds, running means, RBF's Ω): always float32."""


Specs = dict[str, TensorSpec]


def tensor_specs(model: ModelConfig) -> Specs:
    """All persistent tensors of a resolved model under their names in one process."""
    sizes = Sizes.of(model)
    specs: Specs = {EMBEDDING: TensorSpec((sizes.vocab, sizes.h), split=0)}
    for index, kind in enumerate(parse_schedule(model.schedule)):
        prefix = f"decoder.layers.{index}."
        if index == 0 and model.meta_router.enabled:
            specs[f"{prefix}meta_router.running_mean_H"] = TensorSpec((sizes.h,), is_buffer=True)
            specs[f"{prefix}meta_router.running_weight"] = TensorSpec((), is_buffer=True)
            specs |= _linear(f"{prefix}meta_router.gate_proj", 1, sizes.h)
        specs |= _layer(prefix, kind, model, sizes)
    specs |= _norm("decoder.final_layernorm", model)
    if not model.tie_embeddings:
        specs[HEAD] = TensorSpec((sizes.vocab, sizes.h), split=0)
    return specs


def extra_states(model: ModelConfig) -> list[str]:
    """Names of the empty objects that megatron-core's linear layers keep in its checkpoints."""
    layers = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")
    names = [name.removesuffix(".weight") for name in tensor_specs(model) if name.endswith(".weight")]
    return [f"{name}._extra_state" for name in names if name.endswith(layers)]


def split_heads(qkv: Tensor, heads: int, groups: int, head_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value rows of megatron-core's fused `linear_qkv` `[(heads + 2·groups)·d, ...]`: for each
    group its query heads, one key, one value."""
    grouped = qkv.unflatten(0, (groups, heads // groups + 2, head_size))
    return grouped[:, :-2].flatten(0, 2), grouped[:, -2].flatten(0, 1), grouped[:, -1].flatten(0, 1)


def join_heads(query: Tensor, key: Tensor, value: Tensor, groups: int, head_size: int) -> Tensor:
    """The inverse of `split_heads`."""
    rows = query.shape[0] // (groups * head_size)
    parts = (
        query.unflatten(0, (groups, rows, head_size)),
        key.unflatten(0, (groups, 1, head_size)),
        value.unflatten(0, (groups, 1, head_size)),
    )
    return torch.cat(parts, dim=1).flatten(0, 2)


def _layer(prefix: str, kind: str, model: ModelConfig, sizes: Sizes) -> Specs:
    specs: Specs = {}
    if kind in "DR":
        specs[f"{prefix}spectral.weight"] = TensorSpec((sizes.h,))
        specs |= _norm(f"{prefix}spectral_norm", model)
    if kind in "AR":
        attention, bias = f"{prefix}self_attention", model.add_bias
        width = sizes.query_width + sizes.key_value_width
        qkv_bias = bias if model.add_qkv_bias is None else model.add_qkv_bias
        specs |= _linear(f"{attention}.linear_qkv", width, sizes.h, 0, bias=qkv_bias)
        specs |= _linear(f"{attention}.linear_proj", sizes.h, sizes.query_width, 1, bias=bias)
        specs |= _norm(f"{prefix}input_layernorm", model)
    if kind == "R":
        specs |= _router(f"{prefix}router", model, sizes)
        if sizes.rbf:
            specs[f"{prefix}rbf.omega"] = TensorSpec((sizes.h, sizes.rbf), is_buffer=True)
            specs |= _linear(f"{prefix}rbf.projection", sizes.h, 2 * sizes.rbf)
            specs |= _feed_forward(f"{prefix}rbf.feed_forward", model, sizes)
            specs |= _norm(f"{prefix}rbf_norm", model)
    return specs | _feed_forward(f"{prefix}mlp", model, sizes) | _norm(f"{prefix}pre_mlp_layernorm", model)


def _router(name: str, model: ModelConfig, sizes: Sizes) -> Specs:
    router = model.router
    specs: Specs = {f"{name}.threshold": TensorSpec((), is_buffer=True)}
    if router.kind in ("soft", "hard"):
        return specs | _linear(f"{name}.gate_proj", sizes.operators, sizes.h + 1)
    if router.target is not None:
        for part in ("place", "spread", "started"):
            specs[f"{name}.controller.{part}"] = TensorSpec((), is_buffer=True)
    if router.kind == "learned":
        specs |= _linear(f"{name}.score.linear", 1, sizes.h)
    if router.kind == "entropy_gated":
        specs |= _linear(f"{name}.gate_score.linear", 1, sizes.h)
    return specs


def _feed_forward(name: str, model: ModelConfig, sizes: Sizes) -> Specs:
    parts = sizes.fc1_width // sizes.ffn
    fc1 = _linear(f"{name}.linear_fc1", sizes.fc1_width, sizes.h, 0, parts, bias=model.add_bias)
    return fc1 | _linear(f"{name}.linear_fc2", sizes.h, sizes.ffn, 1, bias=model.add_bias)


def _linear(
    name: str, rows: int, columns: int, split: int | None = None, parts: int = 1, bias: bool = True
) -> Specs:
    specs = {f"{name}.weight": TensorSpec((rows, columns), split, parts)}
    if bias:  # a row-parallel layer's bias is whole on every rank
        specs[f"{name}.bias"] = TensorSpec((rows,), split if split == 0 else None, parts)
    return specs


def _norm(name: str, model: ModelConfig) -> Specs:
    parts = ("weight", "bias") if model.normalization == "LayerNorm" else ("weight",)
    return {f"{name}.{part}": TensorSpec((model.hidden_size,)) for part in parts}


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is read when asked for, so that a whole model need never be in memory."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[], Tensor]
    """Reads it: of that shape and dtype, on the CPU, not to be written into."""


def read_values(path: Path, begin: int, dtype: torch.dtype, count: int) -> Tensor:
    """So many values that lie in a file from byte `begin` on, 1-D: a plain read, nothing is mapped.

    Raises CheckpointError if the file ends before.
    """
    out = torch.empty(count, dtype=dtype)
    if count == 0:
        return out
    with path.open("rb") as file:
        file.seek(begin)
        if file.readinto(out.view(torch.uint8).numpy().data) != out.nbytes:
            raise CheckpointError(f"{path} is torn: it ends within a tensor; copy it again")
    return out


def mismatches(wanted: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]) -> list[str]:
    """What is missing, surplus or of another shape, a line each with the nearest name; [] if all fits."""
    missing = [name for name in wanted if name not in found]
    surplus = [name for name in found if name not in wanted]
    lines = [f"missing {name} {list(wanted[name])}{_nearest(name, surplus, found)}" for name in missing]
    lines += [
        f"surplus {name} {list(found[name])}{_nearest(name, missing or list(wanted), wanted)}"
        for name in surplus
    ]
    lines += [
        f"{name} has shape {list(found[name])}, expected {list(shape)}"
        for name, shape in wanted.items()
        if name in found and found[name] != shape
    ]
    return lines


def refuse(problems: list[str], path: Path, what: str) -> None:
    """Raise CheckpointError with the problems, if there are any, in no more lines than a screen takes."""
    if not problems:
        return
    room = MAX_LINES - 1
    if len(problems) > room:
        problems = [*problems[: room - 1], f"and {len(problems) - room + 1} more"]
    raise CheckpointError("\n".join([f"{path}: {what}:", *problems]))


def _nearest(name: str, candidates: list[str], shapes: Mapping[str, tuple[int, ...]]) -> str:
    nearest = nearest_name(name, candidates)
    return f"{nearest} {list(shapes[nearest.split(': ')[1]])}" if nearest else ""
