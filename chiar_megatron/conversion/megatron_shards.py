"""Megatron-LM's older files, `mp_rank_XX[_YYY]/model_optim_rng.pt`: their shards put together and cut.

XX is the tensor-parallel rank, YYY the pipeline-parallel one. Layers are numbered anew in every stage.
"""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from megatron.core.safe_globals import SAFE_GLOBALS, _reconstruct
from torch import Tensor

from chiar_megatron.conversion.canonical import Canonical
from chiar_megatron.conversion.megatron_args import count_of
from chiar_megatron.conversion.torch_files import StoredTensor, read_torch_file
from chiar_megatron.errors import CheckpointError
from chiar_megatron.model.tensors import EMBEDDING, HEAD, LazyTensor, TensorSpec

FILE = "model_optim_rng.pt"
_RANK = re.compile(r"mp_rank_(\d\d)(?:_(\d\d\d))?(_\d\d\d)?$")
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)$")
# TransformerEngine's layers hold the norm before a linear layer as part of it.
_FUSED = (
    ("input_layernorm.", "self_attention.linear_qkv.layer_norm_"),
    ("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_"),
)
# Modules of TransformerEngine's, from 2.0 on, that have an extra state.
_WITH_STATE = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2", "decoder.final_layernorm")
# numpy's arrays (states of random numbers): numpy 1 and 2 name their maker otherwise, each in its files.
_ARRAYS = [(_reconstruct, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")]


def read_megatron_file(path: Path) -> dict[str, Any]:
    """A pickle of tensors, plain values, Megatron-LM's Namespace and megatron-core's enums; anything else is
    refused by name."""
    return read_torch_file(path, [Namespace, *SAFE_GLOBALS, *_ARRAYS])


@dataclass(frozen=True)
class Shards:
    """The files of one iteration, and what they hold by native names."""

    args: Namespace
    iteration: int
    tensor_parallel: int
    pipeline_parallel: int
    has_optimizer: bool
    has_extra_states: bool
    """Whether TransformerEngine's modules left more than nothing."""
    parts: Mapping[str, tuple[LazyTensor, ...]]
    """Each tensor's shards by tensor-parallel rank."""


def read_shards(folder: Path) -> Shards:
    """Raises CheckpointError if ranks are missing, or what they hold does not fit together."""
    found: dict[tuple[int, int], Path] = {}
    for path in sorted(folder.glob("mp_rank_*")):
        match = _RANK.match(path.name)
        if match is None or match[3]:
            raise CheckpointError(f"{path}: shards of expert parallelism are not converted")
        found[int(match[1]), int(match[2] or 0)] = path / FILE
    tensor, pipeline = (1 + max(rank[i] for rank in found) for i in (0, 1))
    lost = [f"mp_rank_{t:02}_{p:03}" for t in range(tensor) for p in range(pipeline) if (t, p) not in found]
    if lost:
        raise CheckpointError(f"{folder}: {', '.join(lost[:6])} is missing; copy every rank's folder")
    contents = {rank: read_megatron_file(path) for rank, path in found.items()}
    first = contents[0, 0]
    args = first.get("args")
    if not isinstance(args, Namespace):
        raise CheckpointError(f"{found[0, 0]} has no 'args', Megatron-LM's arguments")
    version = first.get("checkpoint_version", 0)
    if not isinstance(version, (int, float)) or version < 3.0:
        raise CheckpointError(
            f"{found[0, 0]}: checkpoint_version is {version!r}; below 3.0 qkv is ordered otherwise"
        )
    told = getattr(args, "tensor_model_parallel_size", tensor)
    if told != tensor:
        raise CheckpointError(
            f"{folder}: its arguments tell of {told} tensor-parallel ranks, folders are there of {tensor}; "
            "copy every rank's folder"
        )
    parts = {}
    stages = _stages(contents, tensor, pipeline, args, folder)
    for pipeline_rank, (names, states) in enumerate(stages):
        for own, native in names.items():
            if native == HEAD and not getattr(args, "untie_embeddings_and_output_weights", False):
                continue  # the last stage's copy of the shared table
            shards = tuple(state.get(own) for state in states)
            if any(not isinstance(shard, StoredTensor) for shard in shards):
                raise CheckpointError(f"{folder}: {own} is not in every rank of stage {pipeline_rank}")
            shapes = {shard.shape for shard in shards if shard is not None}
            if len(shapes) > 1:
                raise CheckpointError(f"{folder}: {own} has other shapes in other ranks: {sorted(shapes)}")
            parts[native] = cast("tuple[LazyTensor, ...]", shards)
    states = [state for _, ranks in stages for state in ranks]
    has_extra = any(_holds_something(v) for state in states for k, v in state.items() if "_extra_state" in k)
    iteration = count_of(first.get("iteration"), "iteration", found[0, 0])
    return Shards(args, iteration, tensor, pipeline, "optimizer" in first, has_extra, parts)


def _holds_something(extra_state: Any) -> bool:
    is_tensor = isinstance(extra_state, StoredTensor)
    return 0 not in extra_state.shape if is_tensor else extra_state is not None


def _stages(
    contents: Mapping[tuple[int, int], dict[str, Any]],
    tensor: int,
    pipeline: int,
    args: Namespace,
    folder: Path,
) -> list[tuple[dict[str, str], list[dict[str, LazyTensor]]]]:
    """In the order of the layers: every stage's names to native ones, and its states by rank."""
    name = "virtual_pipeline_model_parallel_size"
    virtual = count_of(getattr(args, name, None), name, folder)
    held = sum(str(key).startswith("model") for key in contents[0, 0])
    if virtual > held:
        raise CheckpointError(f"{folder}: its {name} is {virtual}, but {held} chunks of layers are there")
    keys = [f"model{chunk}" for chunk in range(virtual)] or ["model"]
    stages, offset = [], 0
    for key in keys:
        for stage in range(pipeline):
            try:
                states = [contents[rank, stage][key] for rank in range(tensor)]
            except KeyError:
                raise CheckpointError(f"{folder}: a file of stage {stage} has no '{key}'") from None
            if not all(isinstance(state, dict) for state in states):
                raise CheckpointError(f"{folder}: '{key}' of stage {stage} is no dict of tensors")
            names, layers = _native_names(states[0], offset, folder)
            offset += layers
            stages.append((names, states))
    return stages


def _native_names(state: Mapping[str, Any], offset: int, folder: Path) -> tuple[dict[str, str], int]:
    names: dict[str, str] = {}
    layers = 0
    if "language_model" in state:
        raise CheckpointError(
            f"{folder} is of Megatron-LM's legacy model; convert it to a mcore one there first"
        )
    for own, value in state.items():
        if not isinstance(value, StoredTensor) or "_extra_state" in own or own.startswith("rotary_pos_emb."):
            continue
        native = own
        match = _LAYER.match(own)
        if match is not None:
            layers = max(layers, int(match[1]) + 1)
            native = f"decoder.layers.{offset + int(match[1])}.{unfused(match[2])}"
        names[own] = native
    return names, layers


def unfused(name: str) -> str:
    """A layer's tensor by the name that megatron-core's own layers give it."""
    for own, fused in _FUSED:
        if name.startswith(fused):
            return own + name.removeprefix(fused)
    return name


def fused(name: str) -> str:
    """The same by the name that TransformerEngine's layers and distributed checkpoints give it."""
    for own, with_linear in _FUSED:
        if own in name:
            return name.replace(own, with_linear)
    return name


def transformer_engine_states(names: Iterable[str]) -> list[str]:
    """Names of the extra states that TransformerEngine's modules expect beside these tensors: without them
    Megatron-LM refuses to load. Without fp8 they hold nothing."""
    found = []
    for name in names:
        module = name.removesuffix(".weight")
        if module != name and module.endswith(_WITH_STATE):
            found.append(f"{module}._extra_state")
            if module.endswith("linear_qkv"):
                found.append(f"{module.removesuffix('linear_qkv')}core_attention._extra_state")
    return found


def joined(parts: Sequence[LazyTensor], spec: TensorSpec) -> LazyTensor:
    """The whole tensor of its tensor-parallel shards; vocabulary padding still on it."""
    dim = spec.split
    if dim is None or len(parts) == 1:
        return parts[0]
    shape = list(parts[0].shape)
    shape[dim] *= len(parts)

    def load() -> Tensor:
        # A gated layer stacks two matrices, each of them cut.
        pieces = [part.load().chunk(spec.parts, dim) for part in parts]
        order = [pieces[rank][part] for part in range(spec.parts) for rank in range(len(parts))]
        return torch.cat(order, dim)

    return LazyTensor(tuple(shape), parts[0].dtype, load)


def cut(whole: LazyTensor, spec: TensorSpec, rank: int, size: int) -> LazyTensor:
    """One rank's shard."""
    dim = spec.split
    if dim is None or size == 1:
        return whole
    shape = [length // size if axis == dim else length for axis, length in enumerate(whole.shape)]

    def load() -> Tensor:
        pieces = [piece.chunk(size, dim)[rank] for piece in whole.load().chunk(spec.parts, dim)]
        return torch.cat(pieces, dim)

    return LazyTensor(tuple(shape), whole.dtype, load)


def stage_names(model: Canonical, stage: int, stages: int, layers: int) -> dict[str, str]:
    """What a pipeline stage holds: native names to those within the stage."""
    per_stage = layers // stages
    names: dict[str, str] = {}
    for name in model.tensors:
        match = _LAYER.match(name)
        if match is not None:
            number = int(match[1]) - stage * per_stage
            if 0 <= number < per_stage:
                names[name] = f"decoder.layers.{number}.{match[2]}"
        elif name == EMBEDDING:
            if stage == 0:
                names[name] = name
        elif stage == stages - 1:
            names[name] = name
    return names
