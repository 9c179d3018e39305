"""Megatron-LM's checkpoints: `torch_dist`, and the older `mp_rank_XX[_YYY]/model_optim_rng.pt`.

A full-attention model with `norm: pre` is a plain GPT there. Other models are the same files with our own
tensors beside Megatron-LM's, and our config among the arguments; our spec (`model/block.py`) loads them.
"""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from torch import Tensor

from chiar_megatron.checkpoint.torch_dist import (
    METADATA,
    Chunk,
    TorchDistWriter,
    check_files,
    lazy_slice,
    read_metadata,
    stored_tensors,
)
from chiar_megatron.config.schedule import parse_schedule
from chiar_megatron.conversion.canonical import (
    Canonical,
    check_tensors,
    size_of,
    with_padding,
    without_padding,
)
from chiar_megatron.conversion.formats import Answer, ConvertOptions, Format
from chiar_megatron.conversion.journal import Journal
from chiar_megatron.conversion.megatron_args import (
    CHIAR_KEY,
    FP8_NOTE,
    args_of,
    config_of,
    count_of,
    is_plain_gpt,
)
from chiar_megatron.conversion.megatron_forward import megatron_answer
from chiar_megatron.conversion.megatron_shards import (
    FILE,
    cut,
    fused,
    joined,
    read_megatron_file,
    read_shards,
    stage_names,
    transformer_engine_states,
    unfused,
)
from chiar_megatron.conversion.native import write_files
from chiar_megatron.conversion.native_forward import native_answer
from chiar_megatron.conversion.torch_files import save_small, write_torch_file
from chiar_megatron.errors import CheckpointError
from chiar_megatron.model.tensors import EMBEDDING, HEAD, LazyTensor, extra_states, tensor_specs

TRACKER = "latest_checkpointed_iteration.txt"
COMMON = "common.pt"
_VOCAB_UNIT = 128  # Megatron-LM's --make-vocab-size-divisible-by
_VERSION = 3.0
_LAYOUT = ("tensor_model_parallel_size", "pipeline_model_parallel_size")


class Megatron(Format):
    """A folder with `iter_…` folders, or one of these."""

    name = "megatron"

    def recognises(self, path: Path) -> bool:
        """By the tracker file, or by what an iteration's folder holds."""
        return path.is_dir() and (
            (path / TRACKER).is_file() or any(path.glob("mp_rank_*")) or (path / COMMON).is_file()
        )

    def read(self, path: Path, options: ConvertOptions) -> Canonical:
        """The newest iteration, whatever layout wrote it."""
        folder = iteration_folder(path)
        if (folder / METADATA).is_file():
            return _read_torch_dist(folder)
        if any(folder.glob("mp_rank_*")):
            return _read_shards(folder)
        raise CheckpointError(f"{folder} holds neither {METADATA} nor mp_rank_… folders of Megatron-LM")

    def describe(self, path: Path) -> dict[str, Any]:
        """The form, and how many shards."""
        folder = iteration_folder(path)
        if (folder / METADATA).is_file():
            args = read_megatron_file(folder / COMMON).get("args")
            layout = {name: size for name in _LAYOUT if (size := getattr(args, name, None)) is not None}
            has_optimizer = any(key.startswith(("optimizer.", "chained_")) for key in stored_tensors(folder))
            return {"form": "torch_dist", "layout": layout, "has_optimizer": has_optimizer}
        shards = read_shards(folder)
        layout = dict(zip(_LAYOUT, (shards.tensor_parallel, shards.pipeline_parallel), strict=True))
        return {"form": "torch (mp_rank)", "layout": layout, "has_optimizer": shards.has_optimizer}

    def losses(self, model: Canonical, options: ConvertOptions) -> list[str]:
        """A post-norm GPT does not exist there; other models are our own layers in their files."""
        config = model.config.model
        layers, wanted = parse_schedule(config.schedule), options.megatron
        is_gpt = set(layers) == {"A"} and not config.meta_router.enabled
        if is_gpt and config.norm == "post":
            raise CheckpointError(
                "model.norm: post; Megatron-LM's GPT has no such layer, so a full-attention model is "
                "converted only with norm: pre"
            )
        if wanted.checkpoint_format == "torch":
            _check_cuts(model, wanted.tensor_parallel, wanted.pipeline_parallel)
        notes = ["optimizer state, tokens seen and the tokenizer are not carried"]
        if not is_plain_gpt(config):
            notes.append(
                "not a plain GPT: loaded by our spec (chiar_megatron/model/block.py), not by Megatron-LM's"
            )
        return notes

    def write(self, model: Canonical, journal: Journal, options: ConvertOptions) -> None:
        """`iter_…` and the tracker file."""
        folder = f"iter_{model.step:07}"
        (journal.content / folder).mkdir(exist_ok=True)
        if options.megatron.checkpoint_format == "torch":
            _write_shards(model, folder, journal, options)
        else:
            _write_torch_dist(model, folder, journal, options)
        (journal.content / TRACKER).write_text(str(model.step))

    def answer(
        self,
        path: Path,
        options: ConvertOptions,
        ids_BS: Tensor,
        forced_BS: Mapping[int, Tensor] | None = None,
        noisy: bool = False,
    ) -> Answer:
        """A plain GPT by megatron-core's own layers, other models by ours."""
        model = self.read(path, options)
        if is_plain_gpt(model.config.model):
            return megatron_answer(model, ids_BS, noisy)
        return native_answer(model, ids_BS, forced_BS, noisy)


def iteration_folder(path: Path) -> Path:
    """The folder that the tracker file names, or `path` itself."""
    tracker = path / TRACKER
    if not tracker.is_file():
        return path
    text = tracker.read_bytes().decode(errors="replace").strip()
    if text != "release" and not text.isdigit():
        raise CheckpointError(f"{tracker} is torn: it says {text[:40]!r}, not an iteration")
    folder = path / ("release" if text == "release" else f"iter_{int(text):07}")
    if not folder.is_dir():
        raise CheckpointError(f"{tracker} names {folder.name}, which is not there; copy it too")
    return folder


def padded_rows(vocab_size: int, tensor_parallel: int) -> int:
    """Rows of the token table as Megatron-LM pads it."""
    unit = _VOCAB_UNIT * tensor_parallel
    return math.ceil(vocab_size / unit) * unit


def _read_torch_dist(folder: Path) -> Canonical:
    common = read_megatron_file(folder / COMMON)
    args = common.get("args")
    if not isinstance(args, Namespace):
        raise CheckpointError(f"{folder / COMMON} has no 'args', Megatron-LM's arguments")
    metadata = read_metadata(folder)
    check_files(folder, metadata)
    stored = {name: t for name, t in stored_tensors(folder, metadata).items() if not _is_optimizers(name)}
    if EMBEDDING not in stored:
        raise CheckpointError(f"{folder} has no {EMBEDDING}: it is no GPT of Megatron-LM's")
    tied = not getattr(args, "untie_embeddings_and_output_weights", False)
    config, notes = config_of(args, folder, stored[EMBEDDING].shape[0], tied)
    tensors: dict[str, LazyTensor] = {}
    for key, tensor in stored.items():
        rest = key.removeprefix("decoder.layers.")
        if rest == key or rest.split(".")[0].isdigit():
            prefix = f"decoder.layers.{rest.split('.')[0]}." if rest != key else ""
            tensors[prefix + unfused(key.removeprefix(prefix))] = tensor
            continue
        for layer in range(tensor.shape[0]):  # all layers in one tensor
            part = lazy_slice(
                folder, metadata, key, (layer, *[0] * (len(tensor.shape) - 1)), (1, *tensor.shape[1:])
            )
            whole = LazyTensor(part.shape[1:], part.dtype, partial(_first, part))
            tensors[f"decoder.layers.{layer}.{unfused(rest)}"] = whole
    step = count_of(common.get("iteration"), "iteration", folder / COMMON)
    return _canonical(config, tensors, notes, step, args, folder)


def _is_optimizers(key: str) -> bool:
    return key.startswith(("optimizer.", "chained_", "rng_state", "rerun_"))


def _first(part: LazyTensor) -> Tensor:
    return part.load()[0]


def _read_shards(folder: Path) -> Canonical:
    shards = read_shards(folder)
    if EMBEDDING not in shards.parts:
        raise CheckpointError(f"{folder} has no {EMBEDDING}: it is no GPT of Megatron-LM's")
    rows = sum(part.shape[0] for part in shards.parts[EMBEDDING])
    tied = not getattr(shards.args, "untie_embeddings_and_output_weights", False)
    config, notes = config_of(shards.args, folder, rows, tied)
    if shards.has_extra_states and FP8_NOTE not in notes:
        notes.append(FP8_NOTE)
    specs = tensor_specs(config.model)
    whole = {
        name: joined(parts, specs[name])
        if name in specs
        else LazyTensor(tuple(parts[0].shape), parts[0].dtype, _none)
        for name, parts in shards.parts.items()
    }
    return _canonical(config, whole, notes, shards.iteration, shards.args, folder)


def _none() -> Tensor:
    raise AssertionError("a tensor that fits no config is never loaded")


def _canonical(
    config: Any, tensors: Mapping[str, LazyTensor], notes: list[str], step: int, args: Namespace, folder: Path
) -> Canonical:
    vocab_size = config.model.vocab_size
    own = {name: without_padding(name, tensor, vocab_size) for name, tensor in tensors.items()}
    order = [name for name in tensor_specs(config.model) if name in own]
    ordered = {name: own[name] for name in (*order, *(own.keys() - set(order)))}
    samples = getattr(args, "consumed_train_samples", 0)
    tokens = samples * config.model.seq_length if isinstance(samples, int) else 0
    model = Canonical(config, ordered, step=step, tokens_seen=tokens, notes=tuple(notes))
    check_tensors(model, folder)
    return model


def _write_torch_dist(model: Canonical, folder: str, journal: Journal, options: ConvertOptions) -> None:
    config = model.config.model
    rows, layers = padded_rows(config.vocab_size or 0, 1), len(parse_schedule(config.schedule))
    stacks = is_plain_gpt(config)
    chunks = []
    for name, tensor in model.tensors.items():
        stored = with_padding(tensor, rows) if name in (EMBEDDING, HEAD) else tensor
        rest = name.removeprefix("decoder.layers.")
        if not stacks or rest == name:
            chunks.append(Chunk(name, stored.shape, (0,) * len(stored.shape), stored))
            continue
        number, _, own = rest.partition(".")
        offsets = (int(number), *[0] * len(stored.shape))
        chunks.append(Chunk(f"decoder.layers.{fused(own)}", (layers, *stored.shape), offsets, stored))
    target = journal.content / folder
    writer = TorchDistWriter(target, chunks, _object_keys(model, layers, stacks), options.shard_bytes)
    write_files(writer, folder, journal)
    common = {
        "args": args_of(model.config, 1, 1, rows),
        "checkpoint_version": _VERSION,
        "iteration": model.step,
        "content_metadata": {"non_homogeneous_layers": not stacks},
    }
    save_small(target / COMMON, common)
    save_config(CheckpointingConfig("torch_dist", 1), str(target))


def _object_keys(model: Canonical, layers: int, stacks: bool) -> list[str]:
    """The empty objects of modules, as megatron-core names them, with what TransformerEngine's expect."""
    if not stacks:
        return [f"{name}/shard_0_1" for name in extra_states(model.config.model)]
    keys = []
    for name in transformer_engine_states(model.tensors):
        number, _, own = name.removeprefix("decoder.layers.").partition(".")
        stacked = f"decoder.layers.{own}/shard_{number}_{layers}"
        keys.append(stacked if number.isdigit() else f"{name}/shard_0_1")
    return keys


def _write_shards(model: Canonical, folder: str, journal: Journal, options: ConvertOptions) -> None:
    wanted, config = options.megatron, model.config.model
    size, stages = wanted.tensor_parallel, wanted.pipeline_parallel
    rows, layers = padded_rows(config.vocab_size or 0, size), len(parse_schedule(config.schedule))
    args = args_of(model.config, size, stages, rows)
    args.transformer_impl = wanted.transformer_impl
    fuses = wanted.transformer_impl == "transformer_engine" and not hasattr(args, CHIAR_KEY)
    specs = tensor_specs(config)

    def save(path: Path, rank: int, stage: int, names: Mapping[str, str]) -> None:
        state: dict[str, LazyTensor] = {}
        for native, own in names.items():
            stored = model.tensors[native]
            stored = with_padding(stored, rows) if native in (EMBEDDING, HEAD) else stored
            state[fused(own) if fuses else own] = cut(stored, specs[native], rank, size)
        if config.tie_embeddings and stages > 1 and stage == stages - 1:
            state[HEAD] = cut(with_padding(model.tensors[EMBEDDING], rows), specs[EMBEDDING], rank, size)
        whole = {**state, **dict.fromkeys(transformer_engine_states(state) if fuses else ())}
        content = {"args": args, "checkpoint_version": _VERSION, "iteration": model.step, "model": whole}
        write_torch_file(path, content, journal.advance)

    for stage in range(stages):
        names = stage_names(model, stage, stages, layers)
        bytes_ = sum(size_of(model.tensors[name]) for name in names) // size
        for rank in range(size):
            name = f"mp_rank_{rank:02}" if stages == 1 else f"mp_rank_{rank:02}_{stage:03}"
            journal.file(
                f"{folder}/{name}/{FILE}", partial(save, rank=rank, stage=stage, names=names), bytes_
            )


def _check_cuts(model: Canonical, size: int, stages: int) -> None:
    """Raise CheckpointError naming what does not divide."""
    config = model.config.model
    for field, value, name, by in (
        ("model.schedule's layers", len(parse_schedule(config.schedule)), "--pipeline-parallel", stages),
        ("model.num_attention_heads", config.num_attention_heads, "--tensor-parallel", size),
        ("model.num_query_groups", config.num_query_groups or 1, "--tensor-parallel", size),
        ("model.ffn_hidden_size", config.ffn_hidden_size or 1, "--tensor-parallel", size),
    ):
        if value % by:
            raise CheckpointError(f"{field}: {value} is not divisible by {name} {by}; cut it otherwise")
