"""One `.bin/.idx` file, or a share of its documents, cut into samples: megatron-core's GPTDataset, once
an epoch, with its index on disk.

Every epoch is a dataset of its own, shuffled by its own seed, so that the order of samples never
depends on how many there will be: a run that is extended goes on where it would have gone.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import struct
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.utils import Split

from chiar_megatron.data.preprocess import load_summary
from chiar_megatron.errors import DataError

_INDEX_MAGIC = b"MMIDIDX\x00\x00"
_INDEX_HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype, sequences, documents
_CHECKED_DOCUMENTS = 256  # looked at for token ids out of range where no summary tells
_CHECKED_TOKENS_PER_DOCUMENT = 4096


@dataclass(frozen=True)
class IndexSettings:
    """What every component of a stream has in common."""

    seq_length: int
    """Tokens in one sample."""

    vocab_size: int
    """Token ids are below it."""

    seed: int
    """Of the order of documents and samples."""

    cache_dir: Path
    """Folder of the index cache."""

    build: bool
    """Write what the cache lacks; else its absence is an error."""

    tokenizer_sha256: str | None = None
    """Fingerprint of the tokenizer in use, to be compared with the data's."""


class Component:
    """The documents `share` (from, to; 0 to 1) of the file `prefix`, as an endless row of samples."""

    def __init__(
        self, prefix: str, settings: IndexSettings, field: str, share: tuple[float, float] = (0.0, 1.0)
    ) -> None:
        """`field`: where the recipe names the file, for messages. Raises `DataError` if the file is
        missing or torn, does not fit the vocabulary, or is too small for one sample."""
        self.prefix = prefix
        self._settings = settings
        self._indexed = open_tokens(prefix, field, settings.vocab_size, settings.tokenizer_sha256)
        documents = len(self._indexed)
        # the same rounding as megatron-core's BlendedMegatronDatasetBuilder
        first, last = (round(bound * documents) for bound in share)
        self._documents = np.arange(first, last, dtype=np.int32)
        self.tokens = int(self._indexed.sequence_lengths[self._documents].sum(dtype=np.int64))
        """Tokens in one epoch."""
        self.samples_per_epoch = (self.tokens - 1) // settings.seq_length
        """Samples in one epoch; the tokens left over fall away."""
        if self.samples_per_epoch < 1:
            raise DataError(
                f"{field}: {prefix} gives {self.tokens} tokens ({len(self._documents)} of {documents} "
                f"documents), too few for one sequence of model.seq_length {settings.seq_length} + 1; "
                "give more text, a larger share in data.split, or a smaller model.seq_length"
            )
        self._folder = settings.cache_dir / f"{Path(prefix).name}-{self._digest(first, last)}"
        self._epoch = functools.lru_cache(maxsize=2)(self._open_epoch)

    def prepare(self, samples: int) -> None:
        """Make sure that the cache holds every epoch that the first `samples` samples need."""
        for epoch in range(-(-samples // self.samples_per_epoch)):
            cached_folder(
                self._epoch_folder(epoch),
                functools.partial(self._dataset, epoch),
                build=self._settings.build,
            )

    def sample(self, index: int) -> dict[str, Any]:
        """Sample `index` of the endless row: `tokens` and `labels`, int64 `[seq_length]` each."""
        epoch, position = divmod(index, self.samples_per_epoch)
        return self._epoch(epoch)[position]  # type: ignore[no-any-return]

    def _open_epoch(self, epoch: int) -> GPTDataset:
        return self._dataset(epoch, self._epoch_folder(epoch))

    def _epoch_folder(self, epoch: int) -> Path:
        return self._folder / f"epoch-{epoch:05d}"

    def _dataset(self, epoch: int, folder: Path) -> GPTDataset:
        """The epoch's dataset; its index is read from `folder`, or written there."""
        tokenizer = SimpleNamespace(vocab_size=self._settings.vocab_size, eod=None, unique_identifiers={})
        config = GPTDatasetConfig(
            random_seed=epoch_seed(self._settings.seed, epoch),
            sequence_length=self._settings.seq_length,
            blend=([self.prefix], None),
            split="1,0,0",
            path_to_cache=str(folder),
            tokenizer=tokenizer,
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
            create_attention_mask=False,
        )
        return GPTDataset(self._indexed, self.prefix, self._documents, None, Split.train, config)

    def _digest(self, first: int, last: int) -> str:
        """Name of the cache: another file, share, length or seed must never meet an old index."""
        files = [os.stat(self.prefix + suffix) for suffix in (".bin", ".idx")]
        identity = {
            "path": os.path.abspath(self.prefix),
            "files": [(file.st_size, file.st_mtime_ns) for file in files],
            "documents": (first, last),
            "seq_length": self._settings.seq_length,
            "seed": self._settings.seed,
        }
        return hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]


def epoch_seed(seed: int, epoch: int) -> int:
    """Seed of one epoch's order; hashed, lest seed 1's second epoch be seed 2's first."""
    return int(np.random.SeedSequence([seed, epoch]).generate_state(1)[0])


def cached_folder(folder: Path, build_into: Callable[[Path], object], *, build: bool) -> None:
    """Make sure `folder` is there, whole: built beside and renamed, so a killed run leaves no torn one, and
    of several runs that build it at once the first counts.

    Raises `DataError` if it is missing and `build` is false.
    """
    if folder.is_dir():
        return
    if not build:
        raise DataError(
            f"data.cache_dir: {folder} is missing; rank 0 writes it, so the folder must lie on a file "
            "system that all hosts share"
        )
    unfinished = folder.with_name(f"{folder.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        unfinished.mkdir(parents=True)
        build_into(unfinished)
        unfinished.rename(folder)
    except OSError as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        if not folder.is_dir():
            reason = error.strerror or error
            raise DataError(f"data.cache_dir: {folder} cannot be written: {reason}") from error


def open_tokens(
    prefix: str, field: str, vocab_size: int, tokenizer_sha256: str | None = None
) -> IndexedDataset:
    """The tokenised documents of `PREFIX.bin/.idx`, a row of token ids each.

    `field`: where the user names the file, for messages. `tokenizer_sha256`: of the tokenizer in use.
    Raises `DataError` if a file is missing or torn, holds ids from `vocab_size` on, or was made with
    another tokenizer.
    """
    indexed = _open_indexed(prefix, field)
    _check_tokens(prefix, indexed, field, vocab_size, tokenizer_sha256)
    return indexed


def _open_indexed(prefix: str, field: str) -> IndexedDataset:
    for suffix in (".bin", ".idx"):
        if not os.path.isfile(prefix + suffix):
            hint = f"; leave {suffix} off" if prefix.endswith(suffix) else ""
            raise DataError(
                f"{field}: {prefix}{suffix} does not exist{hint}; "
                f"make it by `chiar preprocess --input FILE --tokenizer MODEL --output {prefix}`"
            )
    _check_index_file(prefix, field)
    indexed = IndexedDataset(prefix)
    expected = int(indexed.sequence_lengths.sum(dtype=np.int64)) * indexed.index.dtype_size
    found = os.path.getsize(prefix + ".bin")
    if found != expected:
        raise DataError(
            f"{field}: {prefix}.bin has {found} bytes where {prefix}.idx promises {expected}; "
            "one of them is torn or belongs to another run: preprocess again"
        )
    return indexed


def _check_index_file(prefix: str, field: str) -> None:
    """Refuse what IndexedDataset would stumble over half-way, with a traceback from its destructor."""
    with open(f"{prefix}.idx", "rb") as file:
        header = file.read(_INDEX_HEADER.size)
    size = os.path.getsize(f"{prefix}.idx")
    problem = None
    if len(header) < _INDEX_HEADER.size or not header.startswith(_INDEX_MAGIC):
        problem = "is not a Megatron index"
    else:
        _, _, _, sequences, documents = _INDEX_HEADER.unpack(header)
        expected = _INDEX_HEADER.size + sequences * (4 + 8) + documents * 8  # lengths, pointers, documents
        if size < expected:
            problem = f"is torn: it has {size} bytes of {expected}"
        elif not sequences or not os.path.getsize(f"{prefix}.bin"):
            problem = "lists no tokens"
    if problem:
        raise DataError(f"{field}: {prefix}.idx {problem}; preprocess the text again")


def _check_tokens(
    prefix: str, indexed: IndexedDataset, field: str, vocab_size: int, wanted: str | None
) -> None:
    """Refuse token ids that the model has no embedding for, and data of another tokenizer."""
    summary = load_summary(prefix)
    if summary is not None and summary.tokens == indexed.sequence_lengths.sum(dtype=np.int64):
        largest = summary.max_token_id
        if wanted is not None and summary.tokenizer_sha256 != wanted:
            raise DataError(
                f"{field}: {prefix} was made with another tokenizer ({summary.tokenizer_name}, sha256 "
                f"{summary.tokenizer_sha256[:12]}…) than data.tokenizer ({wanted[:12]}…); preprocess again"
            )
    else:  # made by another tool: look at some documents, evenly spread
        step = max(1, len(indexed) // _CHECKED_DOCUMENTS)
        lengths = indexed.sequence_lengths
        samples = (
            indexed.get(i, length=min(int(lengths[i]), _CHECKED_TOKENS_PER_DOCUMENT))
            for i in range(0, len(indexed), step)
        )
        largest = max((int(tokens.max()) for tokens in samples if len(tokens)), default=0)
    if largest >= vocab_size:
        raise DataError(
            f"{field}: {prefix} holds token id {largest}, but model.vocab_size is {vocab_size}; "
            "raise it, or preprocess with this model's tokenizer"
        )
