"""Text that makes ranks unequal, from what any machine has: easy number tables, hard prose, a kind a rank.

The prose is the language reference that Python carries for `help()`; the tables are made up by rule. Tokens
are bytes. A stream's order gives every data-parallel replica one kind alone: the first half tables, the
rest prose.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch.distributed as dist
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from chiar_megatron.config.schema import RunConfig
from chiar_megatron.data.components import Component, IndexSettings
from chiar_megatron.data.dataset import Streams, TokenStream
from chiar_megatron.runtime.distributed import World
from chiar_megatron.training.loop import shared_streams

KINDS = ("easy", "hard")
END = 256
VOCAB_SIZE = 257
DOCUMENT_BYTES = 4000
VALIDATION_EVERY = 10  # documents


def write_text(folder: Path) -> None:
    """`{easy,hard}_{train,validation}.bin/.idx` in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for kind, text in zip(KINDS, (number_tables(), prose()), strict=True):
        data = text.encode()
        documents = [data[i : i + DOCUMENT_BYTES] for i in range(0, len(data), DOCUMENT_BYTES)]
        for part in ("train", "validation"):
            prefix = prefix_of(folder, kind, part)
            builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
            for number, document in enumerate(documents):
                if (number % VALIDATION_EVERY == 0) == (part == "validation"):
                    tokens = np.append(np.frombuffer(document, dtype=np.uint8).astype(np.uint16), END)
                    builder.add_document(tokens.astype(np.uint16), [len(tokens)])
            builder.finalize(f"{prefix}.idx")


def prefix_of(folder: Path, kind: str, part: str) -> str:
    """Where a kind's train or validation text lies."""
    return os.fspath(folder / f"{kind}_{part}")


def prose() -> str:
    """English about Python, some 700 kB."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def number_tables(lines: int = 12_000) -> str:
    """Multiples and counts, line after line; each follows from its first numbers."""
    return "\n".join(_table_line(line) for line in range(lines)) + "\n"


def _table_line(line: int) -> str:
    step = 1 + line * 37 % 97
    first = line * 53 % 1000
    return f"{step:2d}: " + " ".join(f"{first + step * i:4d}" for i in range(10))


def kind_of_replica(replica: int, replicas: int) -> int:
    """Place in `KINDS` of the text that a replica trains on."""
    return int(replica >= replicas // 2)


def skewed_streams(config: RunConfig, world: World, folder: Path) -> Streams:
    """Validation of each kind apart, and a training stream whose order gives each replica its own kind."""
    streams = shared_streams(config)
    training, micro = config.training, config.training.micro_batch_size
    samples = training.steps * training.global_batch_size
    replica_P = np.arange(samples) // micro % world.data_parallel_size
    kind_P = (replica_P >= world.data_parallel_size // 2).astype(np.int64)
    index_P = np.where(kind_P == 1, np.cumsum(kind_P), np.cumsum(1 - kind_P)) - 1

    def components() -> Iterator[Component]:
        for number, kind in enumerate(KINDS):
            cache = Path(config.run_dir) / "index_cache"
            settings = IndexSettings(
                config.model.seq_length, VOCAB_SIZE, training.seed, cache, build=world.is_main
            )
            component = Component(prefix_of(folder, kind, "train"), settings, "data.train")
            component.prepare(int((kind_P == number).sum()))
            yield component

    if world.is_main:
        list(components())
    dist.barrier()
    train = TokenStream(list(components()), (kind_P, index_P), samples)
    return replace(streams, train=train)
