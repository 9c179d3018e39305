"""Hugging Face's format: a folder that `transformers` loads, with or without this package."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch
import torch.nn.functional as F
from torch import Tensor

from chiar_megatron.conversion.canonical import Canonical, size_of
from chiar_megatron.conversion.deepspeed_files import LATEST, tag_folder
from chiar_megatron.conversion.formats import Answer, ConvertOptions, Format
from chiar_megatron.conversion.hf_tokenizers import find_tokenizer, write_tokenizer
from chiar_megatron.conversion.journal import Journal
from chiar_megatron.conversion.native_forward import with_rounding_noise
from chiar_megatron.conversion.remote_code import AUTO_MAP, write_remote_code
from chiar_megatron.conversion.upcycle import dense_answer, is_dense, read_dense
from chiar_megatron.errors import CheckpointError, ConfigError
from chiar_megatron.huggingface.configuration import ChiarConfig
from chiar_megatron.huggingface.folder import (
    CONFIG,
    INDEX,
    KINDS,
    SINGLE,
    foreign_config,
    is_folder,
    native_config,
    native_tensors,
    read_chiar_config,
    stored_tensors,
)
from chiar_megatron.huggingface.modeling import ChiarDecoderLayer, recall, token_context
from chiar_megatron.huggingface.names import Group, groups
from chiar_megatron.huggingface.parts import make_norm
from chiar_megatron.huggingface.routers import Routing
from chiar_megatron.model.tensors import LazyTensor


class HuggingFace(Format):
    """A folder with `config.json` and safetensors files of a CHIAR model."""

    name = "huggingface"

    def recognises(self, path: Path) -> bool:
        """By `config.json`, which may also lie beside a DeepSpeed checkpoint."""
        if not path.is_dir() or not is_folder(path):
            return False
        is_deepspeeds = (path / LATEST).is_file() or tag_folder(path) is not None
        return any(path.glob("*.safetensors")) or not is_deepspeeds

    def read(self, path: Path, options: ConvertOptions) -> Canonical:
        """Of a CHIAR model, or of a dense one with what makes it CHIAR."""
        if is_dense(path):
            return read_dense(path, options)
        foreign = read_chiar_config(path)
        if options.schedule is not None:
            raise ConfigError(f"--schedule {options.schedule}: {path} is a CHIAR-Former already")
        config = native_config(foreign, path)
        progress: dict[str, Any] = getattr(foreign, "pretraining", None) or {}
        tokenizer, notes = find_tokenizer(path, options.tokenizer)
        return Canonical(
            config,
            native_tensors(config.model, stored_tensors(path), path),
            step=int(progress.get("step", 0)),
            tokens_seen=int(progress.get("tokens_seen", 0)),
            notes=tuple(notes),
            tokenizer=tokenizer,
        )

    def describe(self, path: Path) -> dict[str, Any]:
        """The safetensors files."""
        return {"files": sorted(p.name for p in path.glob("*.safetensors")), "has_optimizer": False}

    def losses(self, model: Canonical, options: ConvertOptions) -> list[str]:
        """The recipe's training part stays behind."""
        if len(model.dtypes) > 1:
            raise CheckpointError(
                f"weights are of several kinds ({', '.join(model.dtypes)}); give one by --dtype"
            )
        if model.config.model.mask_documents and model.config.data.eod_token is None:
            raise CheckpointError(
                "model.mask_documents: data.eod_token, the token that ends documents, is not known; give the "
                "tokenizer by --tokenizer"
            )
        return ["optimizer state and the recipe's data and training sections are not carried"]

    def write(self, model: Canonical, journal: Journal, options: ConvertOptions) -> None:
        """Sharded safetensors with their index, config, tokenizer, and the model's own code."""
        shards = _shards(model, options.shard_bytes)
        names: dict[str, str] = {}
        for number, shard in enumerate(shards, start=1):
            file = SINGLE if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
            size = sum(size_of(model.tensors[group.native]) for group in shard)
            journal.file(file, partial(_save, shard, model, journal), size)
            names |= {name: file for group in shard for name in group.foreign}
        if len(shards) > 1:
            index = {"metadata": {"total_size": model.bytes}, "weight_map": dict(sorted(names.items()))}
            (journal.content / INDEX).write_text(json.dumps(index, indent=2) + "\n")
        progress = {"step": model.step, "tokens_seen": model.tokens_seen}
        config = foreign_config(model.config, model.dtypes[0], progress)
        content = {**json.loads(config.to_json_string()), "auto_map": AUTO_MAP}
        (journal.content / CONFIG).write_text(json.dumps(content, indent=2) + "\n")
        generation = {"eos_token_id": config.eos_token_id, "bos_token_id": config.bos_token_id}
        generation = {name: value for name, value in generation.items() if value is not None}
        generation |= {} if config.use_cache else {"use_cache": False}
        (journal.content / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
        write_tokenizer(model.tokenizer, journal.content)
        write_remote_code(journal.content)

    def answer(
        self,
        path: Path,
        options: ConvertOptions,
        ids_BS: Tensor,
        forced_BS: Mapping[int, Tensor] | None = None,
        noisy: bool = False,
    ) -> Answer:
        """By the `transformers` model's layers."""
        if is_dense(path):
            return dense_answer(path, ids_BS, noisy)
        return chiar_answer(read_chiar_config(path), stored_tensors(path), ids_BS, forced_BS, noisy)


@torch.no_grad()
def chiar_answer(
    config: ChiarConfig,
    stored: Mapping[str, LazyTensor],
    ids_BS: Tensor,
    forced_BS: Mapping[int, Tensor] | None,
    noisy: bool,
) -> Answer:
    """Of the `transformers` model with these tensors, layer after layer; see `Format.answer`."""
    routing = Routing(forced=dict(forced_BS or {}))
    x = F.embedding(ids_BS, stored["model.embed_tokens.weight"].load().float())
    x = with_rounding_noise(x) if noisy else x
    context = token_context(config, x, ids_BS, None, None, None, routing)
    sums_BSH, counts_BS1 = recall(config, x, context)
    border: dict[int, float] = {}
    for index in range(config.num_hidden_layers):
        layer = ChiarDecoderLayer(config, index).eval()
        _fill(layer, stored, f"model.layers.{index}.")
        x = layer(x, context, sums_BSH, counts_BS1)
        if layer.kind == "R" and config.router["kind"] not in ("soft", "hard"):
            border[index + 1] = float(layer.router.threshold)
    norm = make_norm(config)
    _fill(norm, stored, "model.norm.")
    head = stored["model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"]
    logits_BSV = norm(x) @ head.load().float().T
    gate = None if routing.meta_gate is None else float(routing.meta_gate.mean())
    return Answer(logits_BSV, routing.light_BS, routing.score_BS, border, routing.entropy_BS, gate)


def _fill(module: torch.nn.Module, stored: Mapping[str, LazyTensor], prefix: str) -> None:
    for name, tensor in module.state_dict().items():
        tensor.copy_(stored[prefix + name].load())


def _shards(model: Canonical, shard_bytes: int) -> list[list[Group]]:
    """Which tensors go into which file; what a native tensor is cut into stays together."""
    shards: list[list[Group]] = [[]]
    size = 0
    for group in groups(model.config.model):
        own = size_of(model.tensors[group.native])
        if shards[-1] and size + own > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(group)
        size += own
    return shards


def _save(shard: list[Group], model: Canonical, journal: Journal, path: Path) -> None:
    """A safetensors file, with no more than one native tensor in memory."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for group in shard:
        dtype = model.tensors[group.native].dtype
        for name, shape in zip(group.foreign, group.shapes, strict=True):
            begin, end = end, end + torch.Size(shape).numel() * dtype.itemsize
            header[name] = {"dtype": KINDS[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # numbers begin at a multiple of 8
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for group in shard:
            write_group(file, group, model.tensors[group.native])
            journal.advance(size_of(model.tensors[group.native]))


def write_group(file: BinaryIO, group: Group, tensor: LazyTensor) -> None:
    """Write the parts that a native tensor is cut into. Raises OSError."""
    for part in group.split(tensor.load()):
        file.write(part.contiguous().reshape(-1).view(torch.uint8).numpy().data)
