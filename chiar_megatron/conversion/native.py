"""The native format: our distributed checkpoints, of any layout, read and written tensor by tensor."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from torch import Tensor

from chiar_megatron.checkpoint.files import (
    INFO,
    LATEST,
    MANIFEST,
    CheckpointInfo,
    file_digest,
    find_damage,
    read_manifest,
    resolve_checkpoint,
    step_folder,
)
from chiar_megatron.checkpoint.store import make_info
from chiar_megatron.checkpoint.torch_dist import METADATA, Chunk, TorchDistWriter, stored_tensors
from chiar_megatron.config.load import config_from_dict, dump_config, to_dict
from chiar_megatron.config.mcore import padded_vocab_size
from chiar_megatron.config.schema import ParallelConfig, RunConfig
from chiar_megatron.conversion.canonical import (
    Canonical,
    check_tensors,
    describe,
    with_padding,
    without_padding,
)
from chiar_megatron.conversion.formats import Answer, ConvertOptions, Format
from chiar_megatron.conversion.journal import Journal
from chiar_megatron.conversion.native_forward import native_answer
from chiar_megatron.conversion.tokenizers import copy_tokenizer
from chiar_megatron.conversion.torch_files import save_small
from chiar_megatron.errors import CheckpointError
from chiar_megatron.model.tensors import EMBEDDING, HEAD, extra_states, tensor_specs

RECIPE = "config.yaml"
_LAYOUT = {
    "tensor_model_parallel_size": 1,
    "pipeline_model_parallel_size": 1,
    "data_parallel_size": 1,
}


class Native(Format):
    """`step_…` folders of a run."""

    name = "native"

    def recognises(self, path: Path) -> bool:
        """By our own `checkpoint.json`."""
        try:
            return (resolve_checkpoint(path) / INFO).is_file()
        except CheckpointError:
            return False

    def read(self, path: Path, options: ConvertOptions) -> Canonical:
        """Of a run folder the newest checkpoint, whatever layout wrote it; every file's digest is checked."""
        return self._read(path, options, sizes_only=False)

    def inspect(self, path: Path, options: ConvertOptions) -> dict[str, Any]:
        """By the files' sizes, without reading them."""
        return {**describe(self._read(path, options, sizes_only=True)), **self.describe(path)}

    def _read(self, path: Path, options: ConvertOptions, sizes_only: bool) -> Canonical:
        folder = resolve_checkpoint(path)
        manifest = read_manifest(folder)
        damage = find_damage(folder, sorted(manifest), manifest, sizes_only)
        if damage is not None:
            raise CheckpointError(f"{folder} is damaged: {damage}")
        info = CheckpointInfo.read(folder)
        config = config_from_dict(info.config, str(folder))
        config = replace(config, parallel=ParallelConfig())
        if config.model.vocab_size is None:
            raise CheckpointError(f"{folder}: {INFO} is torn: its config is not resolved (model.vocab_size)")
        stored = stored_tensors(folder)
        names = tensor_specs(config.model)
        # The optimizer's state lies in the same files.
        own = {name: stored[name] for name in names if name in stored}
        tensors = {n: without_padding(n, t, config.model.vocab_size) for n, t in own.items()}
        tokenizer = config.data.tokenizer if options.tokenizer is None else options.tokenizer
        notes = ["the optimizer's state is left out: weights only"] if info.has_optimizer else []
        if tokenizer is not None and not Path(tokenizer).exists():
            notes.append(f"its tokenizer {tokenizer} is not there and is left out (--tokenizer)")
        model = Canonical(
            config,
            tensors,
            step=info.step,
            tokens_seen=info.tokens_seen,
            notes=tuple(notes),
            tokenizer=Path(tokenizer) if tokenizer is not None and Path(tokenizer).exists() else None,
            facts={"run": info.config["run_dir"]},
        )
        check_tensors(model, folder)
        return model

    def describe(self, path: Path) -> dict[str, Any]:
        """What `checkpoint.json` tells."""
        info = CheckpointInfo.read(resolve_checkpoint(path))
        return {"layout": info.layout, "has_optimizer": info.has_optimizer, "version": info.version}

    def write(self, model: Canonical, journal: Journal, options: ConvertOptions) -> None:
        """A weights-only checkpoint, `step_…`, that a run continues or starts from in any layout."""
        folder = step_folder(Path(), model.step).name
        target = journal.content / folder
        target.mkdir(exist_ok=True)
        config = self._config(model, journal)
        chunks, rows = [], padded_vocab_size(config.model.vocab_size or 0, 1)
        for name, tensor in model.tensors.items():
            stored = with_padding(tensor, rows) if name in (EMBEDDING, HEAD) else tensor
            chunks.append(Chunk(name, stored.shape, (0,) * len(stored.shape), stored))
        objects = [f"{name}/shard_0_1" for name in extra_states(config.model)]
        writer = TorchDistWriter(target, chunks, objects, options.shard_bytes)
        write_files(writer, folder, journal)
        save_small(target / "common.pt", {"content_metadata": {"non_homogeneous_layers": True}})
        save_config(CheckpointingConfig("torch_dist", 1), str(target))
        info = make_info(model.step, model.tokens_seen, False, dict(_LAYOUT), to_dict(config))
        (target / INFO).write_text(json.dumps(asdict(info), indent=1))
        files = sorted(path.name for path in target.iterdir() if path.name != MANIFEST)
        assert METADATA in files
        (target / MANIFEST).write_text(json.dumps({name: file_digest(target / name) for name in files}))
        (journal.content / LATEST).write_text(folder + "\n")
        (journal.content / RECIPE).write_text(dump_config(config))  # for `chiar pretrain --init-from`

    def _config(self, model: Canonical, journal: Journal) -> RunConfig:
        """As the model's, with the run folder and tokenizer that it will have."""
        config = replace(model.config, run_dir=str(journal.destination))
        copied = copy_tokenizer(model.tokenizer, journal.content)
        if copied is not None:
            path = journal.destination.absolute() / copied
            config = replace(config, data=replace(config.data, tokenizer=str(path)))
        return config

    def answer(
        self,
        path: Path,
        options: ConvertOptions,
        ids_BS: Tensor,
        forced_BS: Mapping[int, Tensor] | None = None,
        noisy: bool = False,
    ) -> Answer:
        """By our own layers; `read` has checked the digests before."""
        return native_answer(self._read(path, options, sizes_only=True), ids_BS, forced_BS, noisy)


def write_files(writer: TorchDistWriter, folder: str, journal: Journal) -> None:
    """All files of a distributed checkpoint, those that are finished already left as they are."""
    for number, size in enumerate(writer.file_sizes):
        name = f"{folder}/{writer.file_name(number)}"
        write = partial(writer.write_file, number, journal.advance)
        writer.add_written(journal.file(name, write, size))
    writer.finish()
