"""DeepSpeed's checkpoints of our `transformers` model (`chiar_megatron.huggingface`), read and written.

They hold no config: it is `config.json`, beside them or named by `--config`. What is written is one folder
that DeepSpeed takes in two ways: plain model states (`load_checkpoint(..., load_module_only=True)`, ZeRO-0
to 2) and, in the same tag's folder, a universal checkpoint (`"checkpoint": {"load_universal": true}`, any
stage and number of ranks) with moments of 0.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from chiar_megatron.conversion.canonical import Canonical
from chiar_megatron.conversion.deepspeed_files import (
    LATEST,
    LATEST_UNIVERSAL,
    MODEL,
    UNIVERSAL,
    WEIGHTS,
    DeepSpeedCheckpoint,
    read_deepspeed,
    tag_folder,
)
from chiar_megatron.conversion.formats import Answer, ConvertOptions, Format
from chiar_megatron.conversion.hf_tokenizers import find_tokenizer, write_tokenizer
from chiar_megatron.conversion.huggingface_format import chiar_answer
from chiar_megatron.conversion.journal import Journal
from chiar_megatron.conversion.keymap import unwrapped_names
from chiar_megatron.conversion.torch_files import save_small, write_torch_file
from chiar_megatron.errors import ConfigError
from chiar_megatron.huggingface.configuration import ChiarConfig
from chiar_megatron.huggingface.folder import (
    CONFIG,
    foreign_config,
    native_config,
    native_tensors,
    read_chiar_config,
)
from chiar_megatron.huggingface.names import Group, groups
from chiar_megatron.model.tensors import LazyTensor

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
_VERSION = "0.19.8"  # of DeepSpeed whose files these are
_MAX_GROUPS = 64  # of an optimizer that a universal checkpoint is loaded into


class DeepSpeed(Format):
    """A folder with `latest` and a tag's folder, or the tag's folder."""

    name = "deepspeed"

    def recognises(self, path: Path) -> bool:
        """By model states, ZeRO shards or a universal checkpoint."""
        return path.is_dir() and tag_folder(path) is not None

    def read(self, path: Path, options: ConvertOptions) -> Canonical:
        """Of shards the float32 weights, whatever precision the module had."""
        source = _Source.of(path, options)
        config = native_config(source.config, path)
        stored = source.found.tensors
        tensors = native_tensors(config.model, _widened(stored) if source.found.stage else stored, path)
        tokenizer, missing = find_tokenizer(source.config_folder, options.tokenizer)
        return Canonical(
            config,
            tensors,
            step=source.found.step,
            tokens_seen=source.found.tokens_seen,
            notes=(*source.found.notes, *_notes(source), *missing),
            tokenizer=tokenizer,
            facts={"form": source.found.form, "zero_stage": source.found.stage},
        )

    def describe(self, path: Path) -> dict[str, Any]:
        """What the model states tell."""
        found = read_deepspeed(path)
        return {
            "tag": found.folder.name,
            "data_parallel_size": found.world_size,
            "has_optimizer": found.has_optimizer,
            "version": found.version,
        }

    def inspect(self, path: Path, options: ConvertOptions) -> dict[str, Any]:
        """Without a config what the files alone tell."""
        found = read_deepspeed(path)
        if _config_place(path, found.folder, options) is not None:
            return super().inspect(path, options)
        dtypes = {str(tensor.dtype).removeprefix("torch.") for tensor in found.tensors.values()}
        return {
            "form": found.form,
            "zero_stage": found.stage,
            "step": found.step,
            "dtype": ", ".join(sorted(dtypes)),
            "tensors": len(found.tensors),
            **self.describe(path),
            "notes": [*found.notes, "no config.json beside it: what model it is must be told by --config"],
        }

    def losses(self, model: Canonical, options: ConvertOptions) -> list[str]:
        """The optimizer's state."""
        return [
            "optimizer state and the recipe are not carried; moments are 0",
            "load_module_only=True restores buffers (routers' thresholds); a universal checkpoint does not",
        ]

    def write(self, model: Canonical, journal: Journal, options: ConvertOptions) -> None:
        """Model states, a file for every parameter, the pointers, `config.json` and the tokenizer."""
        tag = f"global_step{model.step}"
        own = groups(model.config.model)
        foreign = {name: part for group in own for name, part in _parts(group, model).items()}
        buffers = [name for group in own if group.spec.is_buffer for name in group.foreign]
        weights = {name: tensor for name, tensor in foreign.items() if name not in buffers}
        module = dict(foreign)
        if model.config.model.tie_embeddings:
            module[HEAD] = module[EMBEDDING]
        states = _states(model, module, buffers)
        write = partial(write_torch_file, content=states, advance=journal.advance)
        journal.file(f"{tag}/{MODEL}", write, model.bytes)
        # ZeRO-3 looks for a file of each rank's; of a universal checkpoint it reads counts from rank 0's.
        states = {**states, "module": {name: foreign[name] for name in buffers}}
        journal.file(f"{tag}/zero_pp_rank_0_{MODEL}", partial(write_torch_file, content=states), 0)
        for name, tensor in weights.items():
            folder = f"{tag}/{UNIVERSAL}/{name}"
            content = {"param": _float(tensor), "cat_dim": 0}
            write = partial(write_torch_file, content=content)
            journal.file(f"{folder}/{WEIGHTS}", write, 0)
            for moment in ("exp_avg", "exp_avg_sq"):  # one zero, seen as many
                zeros = {"param": torch.zeros(1).expand(tensor.shape), "cat_dim": 0}
                save_small(journal.content / folder / f"{moment}.pt", zeros)
            save_small(journal.content / folder / "step.pt", torch.zeros(()))
        save_small(journal.content / tag / UNIVERSAL / "optimizer_state.pt", _optimizer())
        for pointer in (LATEST, LATEST_UNIVERSAL):
            (journal.content / pointer).write_text(tag)
        progress = {"step": model.step, "tokens_seen": model.tokens_seen}
        config = json.loads(foreign_config(model.config, model.dtypes[0], progress).to_json_string())
        (journal.content / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        write_tokenizer(model.tokenizer, journal.content)

    def answer(
        self,
        path: Path,
        options: ConvertOptions,
        ids_BS: Tensor,
        forced_BS: Mapping[int, Tensor] | None = None,
        noisy: bool = False,
    ) -> Answer:
        """By the `transformers` model's layers; where the module's weights are as exact as a universal
        checkpoint's, with those, so that both are compared."""
        source = _Source.of(path, options)
        exact = {name: t for name, t in source.found.module.items() if t.dtype == torch.float32}
        tensors = source.found.tensors
        whole = exact if exact.keys() >= tensors.keys() else tensors
        return chiar_answer(source.config, whole, ids_BS, forced_BS, noisy)


@dataclass(frozen=True)
class _Source:
    found: DeepSpeedCheckpoint
    config: ChiarConfig
    config_folder: Path
    prefix: str
    """What wrapping modules put before the model's names."""

    @staticmethod
    def of(path: Path, options: ConvertOptions) -> _Source:
        found = read_deepspeed(path)
        config_folder = _config_folder(path, found.folder, options)
        config = read_chiar_config(config_folder)
        names = unwrapped_names(found.tensors, EMBEDDING)
        own = {names[name]: tensor for name, tensor in found.tensors.items()}
        module = {names.get(name, name): tensor for name, tensor in found.module.items()}
        prefix = next((n.removesuffix(EMBEDDING) for n in names if names[n] == EMBEDDING), "")
        found = DeepSpeedCheckpoint(**{**vars(found), "tensors": own, "module": module})
        return _Source(found, config, config_folder, prefix)


def _config_place(path: Path, folder: Path, options: ConvertOptions) -> Path | None:
    """Where `config.json` lies: as told, beside `latest` (where transformers' Trainer puts it), or beside the
    model states. Raises ConfigError for one that is told and not there."""
    if options.config is not None:
        told = Path(options.config)
        place = told if told.is_dir() else told.parent
        if not (place / CONFIG).is_file() or (told.is_file() and told.name != CONFIG):
            raise ConfigError(
                f"--config {told}: no {CONFIG} of a CHIAR model there (save_pretrained writes it)"
            )
        return place
    places = (path, folder, folder.parent)
    return next((place for place in places if (place / CONFIG).is_file()), None)


def _config_folder(path: Path, folder: Path, options: ConvertOptions) -> Path:
    place = _config_place(path, folder, options)
    if place is None:
        raise ConfigError(
            f"{path} has no {CONFIG}, and DeepSpeed's files do not tell the model's sizes; give the "
            "config.json that save_pretrained writes by --config"
        )
    return place


def _notes(source: _Source) -> list[str]:
    notes = []
    if source.found.has_optimizer:
        notes.append("the optimizer's state is left out: weights only")
    if source.prefix:
        notes.append(f"names are read without their prefix {source.prefix!r}, a wrapping module's")
    narrow = {str(t.dtype).removeprefix("torch.") for t in source.found.tensors.values()} - {"float32"}
    if source.found.stage and narrow:
        notes.append(
            f"frozen weights and buffers, which DeepSpeed keeps in {', '.join(sorted(narrow))}, are widened "
            "to float32"
        )
    return notes


def _widened(stored: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    made = {id(tensor): _float(tensor) for tensor in stored.values()}  # what is shared stays shared
    return {name: made[id(tensor)] for name, tensor in stored.items()}


def _float(tensor: LazyTensor) -> LazyTensor:
    if tensor.dtype == torch.float32 or not tensor.dtype.is_floating_point:
        return tensor
    return LazyTensor(tensor.shape, torch.float32, lambda: tensor.load().float())


def _parts(group: Group, model: Canonical) -> dict[str, LazyTensor]:
    """The tensors that a native one is cut into."""
    whole = model.tensors[group.native]
    return {
        name: LazyTensor(shape, whole.dtype, partial(_part, group, whole, number))
        for number, (name, shape) in enumerate(zip(group.foreign, group.shapes, strict=True))
    }


def _part(group: Group, whole: LazyTensor, number: int) -> Tensor:
    return group.split(whole.load())[number].contiguous()


def _states(model: Canonical, module: Mapping[str, LazyTensor], buffers: list[str]) -> dict[str, Any]:
    """What DeepSpeed expects in model states."""
    trained = {n: torch.Size(t.shape) for n, t in module.items() if n not in buffers and n != HEAD}
    shared = {}
    if model.config.model.tie_embeddings:
        shared[HEAD] = EMBEDDING
    elif HEAD in module:
        trained[HEAD] = torch.Size(module[HEAD].shape)
    return {
        "module": dict(module),
        "buffer_names": buffers,
        "param_shapes": [trained],
        "shared_params": shared,
        "frozen_param_shapes": None,
        "frozen_param_fragments": None,
        "optimizer": None,
        "lr_scheduler": None,
        "data_sampler": None,
        "random_ltd": None,
        "sparse_tensor_module_names": [],
        "skipped_steps": 0,
        "global_steps": model.step,
        "global_samples": 0,
        "dp_world_size": 1,
        "mp_world_size": 1,
        "ds_config": {},
        "ds_version": _VERSION,
        "universal_checkpoint_info": {},
        "tokens_seen": model.tokens_seen,
    }


def _optimizer() -> dict[str, Any]:
    """A universal checkpoint's `optimizer_state.pt`: nothing that overrules what the optimizer has."""
    state = {"state": {0: {"step": torch.zeros(())}}, "param_groups": [{}]}
    return {"optimizer_state_dict": state, "param_groups": [{}] * _MAX_GROUPS, "ds_version": _VERSION}
