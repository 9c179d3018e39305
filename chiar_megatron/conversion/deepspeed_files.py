"""DeepSpeed's checkpoint folders: ZeRO shards put together, universal checkpoints, plain model states.

`latest` names a tag's folder. In it `mp_rank_00_model_states.pt` holds the module (ZeRO-3: one file a rank,
with buffers alone), `[bf16_]zero_pp_rank_R_mp_rank_00_optim_states.pt` rank R's part of the float32 weights,
and of a universal checkpoint `zero/NAME/fp32.pt` each parameter. DeepSpeed need not be installed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from chiar_megatron.conversion.torch_files import StoredTensor, read_torch_file, read_torch_value, tensors_of
from chiar_megatron.errors import CheckpointError
from chiar_megatron.model.tensors import LazyTensor

LATEST, LATEST_UNIVERSAL = "latest", "latest_universal"
MODEL = "mp_rank_00_model_states.pt"
UNIVERSAL, WEIGHTS = "zero", "fp32.pt"
_SHARD = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_?optim_states\.pt$")
_MODEL3 = re.compile(r"zero_pp_rank_(\d+)_mp_rank_(\d+)_model_states\.pt$")
_MODEL = re.compile(r"mp_rank_(\d+)_model_states\.pt$")
_LAYERS = re.compile(r"layer_\d+.*[-_]model_states\.pt$|expp_rank_.*_optim_states\.pt$")


class DeepSpeedObject:
    """Stands for objects of DeepSpeed's own that lie beside the tensors; nothing of them is used."""


# What DeepSpeed pickles into its files, by name; the stage becomes a plain number.
_ACCEPTED: list[Any] = [
    (int, "deepspeed.runtime.zero.config.ZeroStageEnum"),
    (DeepSpeedObject, "deepspeed.runtime.fp16.loss_scaler.LossScaler"),
    (DeepSpeedObject, "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler"),
    (DeepSpeedObject, "deepspeed.utils.tensor_fragment.fragment_address"),
    (DeepSpeedObject, "deepspeed.checkpoint.universal_checkpoint.SubparamShape"),
]


@dataclass(frozen=True)
class DeepSpeedCheckpoint:
    """One tag's folder."""

    folder: Path
    form: str
    """In words: "ZeRO-2 shards", "universal", "model states"."""
    stage: int | None
    world_size: int | None
    """Data-parallel ranks that wrote it."""
    step: int
    tokens_seen: int
    version: str | None
    has_optimizer: bool
    tensors: Mapping[str, LazyTensor]
    """Parameters, float32 where ZeRO kept them so, and buffers."""
    module: Mapping[str, StoredTensor]
    """What `mp_rank_00_model_states.pt` holds in full, whatever its precision."""
    notes: tuple[str, ...]


@dataclass
class _Files:
    model: dict[int, Path] = field(default_factory=dict)
    """By model-parallel rank."""
    model3: dict[int, Path] = field(default_factory=dict)
    """ZeRO-3's, by data-parallel rank."""
    shards: dict[int, Path] = field(default_factory=dict)


def tag_folder(path: Path) -> Path | None:
    """The folder that `latest` names, or `path` itself; None if neither is DeepSpeed's."""
    for pointer in (path / LATEST, path / LATEST_UNIVERSAL):
        try:
            tag = pointer.read_text(encoding="utf-8").strip()
        except (OSError, ValueError):
            continue
        if tag and Path(tag).name == tag and _holds_states(path / tag):
            return path / tag
    return path if _holds_states(path) else None


def _holds_states(folder: Path) -> bool:
    return folder.is_dir() and (
        (folder / UNIVERSAL).is_dir() or any(folder.glob("*_model_states.pt")) or bool(_shard_names(folder))
    )


def _shard_names(folder: Path) -> list[str]:
    return [path.name for path in folder.glob("*optim_states.pt") if _SHARD.match(path.name)]


def read_deepspeed(path: Path) -> DeepSpeedCheckpoint:
    """Headers now, tensors when asked for.

    Raises CheckpointError for files that are missing, torn, malicious or do not fit together, and for what
    is cut by model, pipeline or expert parallelism.
    """
    folder = tag_folder(path)
    if folder is None:
        raise CheckpointError(_not_there(path))
    is_universal = (folder / UNIVERSAL).is_dir()
    files = _survey(folder, is_universal)
    main = files.model.get(0) or files.model3.get(0)
    if main is None:
        raise CheckpointError(f"{folder}: {MODEL} is missing (ZeRO-3: zero_pp_rank_0_{MODEL}); copy it too")
    head = read_torch_file(main, _ACCEPTED)
    if not isinstance(head.get("module"), dict):
        raise CheckpointError(f"{main} has no 'module' with tensors: it is no model states of DeepSpeed's")
    module = tensors_of(head["module"], main, "module")
    names = _of_names(head, "buffer_names", list, main)
    buffers = {name: module[name] for name in names if name in module}
    shared = _of_names(head, "shared_params", dict, main)
    notes: list[str] = []
    stage, world_size = _told_stage(head), head.get("dp_world_size")
    if is_universal:
        form, tensors = "universal", _universal(folder, _shapes(head, main))
    elif files.shards:
        shards = _read_shards(folder, files)
        form, stage, world_size = f"ZeRO-{shards.stage} shards", shards.stage, len(files.shards)
        is_3 = shards.stage == 3
        tensors = _partitioned(shards, head, main, files) if is_3 else _flattened(shards, head, main)
        tensors |= _frozen(head, main, files, is_3)
        if not is_3:  # ZeRO-1 has frozen parameters in the module alone
            tensors |= {n: t for n, t in module.items() if n not in tensors and n not in (buffers | shared)}
    elif 0 in files.model:
        form, tensors = "model states", dict(module)
        if stage:
            kinds = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in module.values()})
            notes.append(
                f"no ZeRO shards (…_optim_states.pt) in {folder}: the module's own {', '.join(kinds)} weights"
            )
    else:
        raise CheckpointError(f"{folder}: ZeRO-3 keeps all weights in …_optim_states.pt files; copy them too")
    tensors |= buffers
    tensors |= {name: tensors[own] for name, own in shared.items() if own in tensors and name not in tensors}
    return DeepSpeedCheckpoint(
        folder,
        form,
        stage,
        world_size if isinstance(world_size, int) else None,
        _count(head.get("global_steps")),
        _count(head.get("tokens_seen")),
        head.get("ds_version") if isinstance(head.get("ds_version"), str) else None,
        bool(files.shards) or is_universal or head.get("optimizer") is not None,
        tensors,
        {} if main.name != MODEL else module,
        tuple(notes),
    )


def _not_there(path: Path) -> str:
    pointer = path / LATEST
    if pointer.is_file():
        tag = pointer.read_bytes()[:80].decode(errors="replace").strip()
        return f"{pointer} names {tag!r}, where no model states of DeepSpeed's are; copy that folder too"
    return f"{path} holds neither 'latest' nor …_model_states.pt files of DeepSpeed"


def _survey(folder: Path, is_universal: bool) -> _Files:
    files = _Files()
    for path in sorted(folder.iterdir()):
        if _LAYERS.match(path.name):
            raise CheckpointError(
                f"{path}: DeepSpeed's pipeline and expert files are not converted; merge them there first"
            )
        for pattern, ranks in ((_SHARD, files.shards), (_MODEL3, files.model3), (_MODEL, files.model)):
            match = pattern.match(path.name)
            if match is None:
                continue
            if int(match[match.re.groups]) > 0 and not is_universal:
                raise CheckpointError(
                    f"{path}: the model is cut into mp_rank parts (tensor or pipeline parallel); merge them "
                    "by DeepSpeed's ds_to_universal first"
                )
            rank = int(match[1])
            if rank in ranks and not is_universal:
                raise CheckpointError(
                    f"{folder} has two files of rank {rank}: {ranks[rank].name}, {path.name}"
                )
            ranks.setdefault(rank, path)
    return files


def _told_stage(head: Mapping[str, Any]) -> int | None:
    config = head.get("ds_config")
    zero = config.get("zero_optimization") if isinstance(config, dict) else None
    stage = zero.get("stage", 0) if isinstance(zero, dict) else None
    return stage if isinstance(stage, int) else None


def _of_names(head: Mapping[str, Any], key: str, kind: type, path: Path) -> Any:
    """A list of names, or a dict of names by name; empty where it is not told."""
    value: Any = head.get(key)
    if value is None:
        return kind()
    if isinstance(value, (list, dict)) and isinstance(value, kind):
        entries = [*value, *value.values()] if isinstance(value, dict) else list(value)
        if all(isinstance(name, str) for name in entries):
            return value
    raise CheckpointError(f"{path}: {key} is no {kind.__name__} of names; save it again")


def _count(value: object) -> int:
    return value if isinstance(value, int) and value >= 0 else 0


@dataclass(frozen=True)
class _Shards:
    stage: int
    parts: list[list[StoredTensor]]
    """By rank, then by group of parameters: that part of the group's float32 values."""
    paddings: list[list[int]] | None
    """Values left free behind every parameter of a group (ZeRO-1 and 2)."""


def _read_shards(folder: Path, files: _Files) -> _Shards:
    contents = {}
    for rank, path in sorted(files.shards.items()):
        state = read_torch_file(path, _ACCEPTED).get("optimizer_state_dict")
        if not isinstance(state, dict):
            raise CheckpointError(f"{path} has no 'optimizer_state_dict': it is no ZeRO shard")
        contents[rank] = state
    first = contents[min(contents)]
    stage = first.get("zero_stage", 1)
    if stage not in (1, 2, 3):
        raise CheckpointError(f"{folder}: ZeRO stage {stage!r} is unknown; 1, 2 and 3 are converted")
    counts = first.get("partition_count", len(contents))
    told = set(counts) if isinstance(counts, list) else {counts}
    if len(told) > 1:
        raise CheckpointError(
            f"{folder}: groups of parameters are cut into {sorted(told)} parts (experts); not converted"
        )
    count = told.pop()
    missing = [rank for rank in range(count) if rank not in contents]
    if missing:
        names = ", ".join(f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in missing[:4])
        more = f" and {len(missing) - 4} more" if len(missing) > 4 else ""
        raise CheckpointError(f"{folder}: {names}{more} missing of {count} ranks'; copy every rank's files")
    if len(contents) > count:
        raise CheckpointError(
            f"{folder}: {len(contents)} ranks' files, but {count} ranks wrote; others are of an older save"
        )
    key = "fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"
    parts = []
    for rank in range(count):
        groups = contents[rank].get(key)
        if not isinstance(groups, list) or not all(isinstance(group, StoredTensor) for group in groups):
            raise CheckpointError(f"{files.shards[rank]} has no {key}, the float32 weights; save it again")
        parts.append(groups)
    if len({len(groups) for groups in parts}) > 1:
        raise CheckpointError(f"{folder}: ranks have different numbers of parameter groups: of several saves")
    return _Shards(stage, parts, first.get("param_alignment_paddings"))


def _shapes(head: Mapping[str, Any], path: Path) -> list[dict[str, tuple[int, ...]]]:
    """Shapes of the trained parameters in their order, a dict for every group."""
    groups = head.get("param_shapes")
    if not isinstance(groups, list) or not all(isinstance(group, dict) for group in groups):
        raise CheckpointError(f"{path} has no param_shapes: which weights lie where is unknown")
    return [{name: tuple(shape) for name, shape in group.items()} for group in groups]


def _flattened(shards: _Shards, head: Mapping[str, Any], path: Path) -> dict[str, LazyTensor]:
    """ZeRO-1 and 2: a group is one flat tensor, cut into as many parts as there are ranks."""
    shapes, world_size = _shapes(head, path), len(shards.parts)
    if len(shapes) != len(shards.parts[0]):
        raise CheckpointError(
            f"{path} tells of {len(shapes)} parameter groups, the shards hold {len(shards.parts[0])}"
        )
    tensors: dict[str, LazyTensor] = {}
    for number, group in enumerate(shapes):
        flat = [parts[number] for parts in shards.parts]
        gaps = [0] * len(group) if shards.paddings is None else shards.paddings[number]
        if len(gaps) != len(group):
            raise CheckpointError(f"{path}: paddings of group {number} do not fit its parameters")
        offset = 0
        for (name, shape), gap in zip(group.items(), gaps, strict=True):
            numel = math.prod(shape)
            tensors[name] = LazyTensor(shape, flat[0].dtype, partial(_slice, flat, offset, numel, shape))
            offset += numel + gap
        # DeepSpeed pads a group to a multiple of twice the ranks, and may cut that off again.
        held, unit = sum(map(_numel, flat)), 2 * world_size
        if held < offset - (gaps[-1] if gaps else 0) or math.ceil(held / unit) != math.ceil(offset / unit):
            raise CheckpointError(
                f"{path.parent}: group {number} holds {held} values, its parameters need {offset}: the files "
                "are of different saves"
            )
    return tensors


def _partitioned(
    shards: _Shards, head: Mapping[str, Any], path: Path, files: _Files
) -> dict[str, LazyTensor]:
    """ZeRO-3: each parameter is cut into equal parts, the last one padded; a rank's parts lie in a row."""
    world_size, offset = len(shards.parts), 0
    tensors: dict[str, LazyTensor] = {}
    for group in _shapes(head, path):
        for name, shape in group.items():
            count = math.ceil(math.prod(shape) / world_size)
            tensors[name] = LazyTensor(
                shape, shards.parts[0][0].dtype, partial(_gather, shards.parts, offset, count, shape)
            )
            offset += count
    for rank, parts in enumerate(shards.parts):
        held = sum(map(_numel, parts))
        if held != offset:
            raise CheckpointError(
                f"{files.shards[rank]} holds {held} values, its parameters need {offset}: the files are of "
                "different saves"
            )
    return tensors


def _frozen(head: Mapping[str, Any], path: Path, files: _Files, is_3: bool) -> dict[str, LazyTensor]:
    """Parameters that no optimizer has: whole in ZeRO-2's model states, in parts in ZeRO-3's."""
    shapes = head.get("frozen_param_shapes") or {}
    if not shapes:
        return {}
    if not is_3:
        fragments = tensors_of(head.get("frozen_param_fragments"), path, "frozen_param_fragments")
        return {name: fragments[name] for name in shapes}
    ranks = []
    for rank in sorted(files.shards):
        if rank not in files.model3:
            raise CheckpointError(f"{path.parent}: zero_pp_rank_{rank}_{MODEL} is missing; copy it too")
        content = read_torch_file(files.model3[rank], _ACCEPTED)
        ranks.append(tensors_of(content.get("frozen_param_fragments"), files.model3[rank], "frozen"))
    tensors: dict[str, LazyTensor] = {}
    for name, size in shapes.items():
        shape = tuple(size)
        parts = [[rank[name]] for rank in ranks]
        count = math.ceil(math.prod(shape) / len(parts))
        tensors[name] = LazyTensor(shape, parts[0][0].dtype, partial(_gather, parts, 0, count, shape))
    return tensors


def _universal(folder: Path, groups: Sequence[Mapping[str, tuple[int, ...]]]) -> dict[str, LazyTensor]:
    shapes = {name: shape for group in groups for name, shape in group.items()}
    tensors: dict[str, LazyTensor] = {}
    for path in sorted((folder / UNIVERSAL).glob(f"*/{WEIGHTS}")):
        content = read_torch_value(path, _ACCEPTED)
        stored = content.get("param") if isinstance(content, dict) else content
        if not isinstance(stored, StoredTensor):
            raise CheckpointError(f"{path} holds no tensor")
        name = path.parent.name
        shape = shapes.get(name, stored.shape)
        if _numel(stored) != math.prod(shape):
            shape = stored.shape
        # Of ZeRO-3 they are flat.
        tensors[name] = LazyTensor(shape, stored.dtype, partial(_slice, [stored], 0, _numel(stored), shape))
    return tensors


def _numel(tensor: LazyTensor) -> int:
    return math.prod(tensor.shape)


def _slice(parts: Sequence[StoredTensor], start: int, count: int, shape: tuple[int, ...]) -> Tensor:
    return _values(parts, start, count).view(shape)


def _gather(
    ranks: Sequence[Sequence[StoredTensor]], start: int, count: int, shape: tuple[int, ...]
) -> Tensor:
    padded = torch.cat([_values(parts, start, count) for parts in ranks])
    return padded[: math.prod(shape)].view(shape)


def _values(parts: Sequence[StoredTensor], start: int, count: int) -> Tensor:
    """So many values from `start` on of flat tensors that follow each other."""
    found, begin = [], 0
    for part in parts:
        first, last = max(start, begin), min(start + count, begin + _numel(part))
        if first < last:
            found.append(part.read(first - begin, last - first))
        begin += _numel(part)
    return found[0] if len(found) == 1 else torch.cat([torch.empty(0, dtype=parts[0].dtype), *found])
