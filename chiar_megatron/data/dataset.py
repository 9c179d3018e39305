"""Streams of training and validation samples over preprocessed files.

A stream is a row of samples; what stands at a position depends on the data, its weights, the sequence
length and the seed alone, never on the number of steps, of processes, or on what was read before.
Suffixes: B samples, S sequence.
"""

from __future__ import annotations

import functools
import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from megatron.core.datasets.blended_megatron_dataset_config import (
    convert_split_vector_to_split_matrix,
    parse_and_normalize_split,
)
from torch import Tensor

from chiar_megatron.config.schema import RunConfig
from chiar_megatron.data.components import Component, IndexSettings, cached_folder
from chiar_megatron.data.tokenizer import load_tokenizer
from chiar_megatron.errors import ConfigError

PADDING = -1
"""Position of a sample that counts for nothing; fills up the last batch of a validation."""

_HELD_OUT_SEED = 0  # fixed, so that runs of different seeds are validated on the same samples


@dataclass(frozen=True)
class TokenBatch:
    """Some samples of a stream."""

    tokens_BS: Tensor
    """Token ids, int64."""

    labels_BS: Tensor
    """The token after each of them, int64. One after an end of document is the next document's first."""

    loss_mask_BS: Tensor
    """1 where the label counts, float32: everywhere, except in padding samples."""

    document_ids_BS: Tensor | None
    """Number of the token's document within the sample, from 0, int64; an end-of-document token belongs
    to the document that it ends. Only if documents are masked from each other, else None."""

    sample_ids_B: Tensor
    """Position of each sample in the stream before any skipping, int64; -1 for padding."""


class TokenStream:
    """A row of samples; `len()` says how many may be read."""

    def __init__(
        self,
        components: Sequence[Component],
        order: tuple[np.ndarray, np.ndarray] | None,
        length: int,
        skipped: Sequence[tuple[int, int]] = (),
        document_end: int | None = None,
    ) -> None:
        """`order`: component and index within it of every sample; None: the first component's own row.
        `skipped`: sorted disjoint ranges of positions to leave out. `document_end`: the token that ends
        a document, if documents are to be numbered."""
        self._components = components
        self._order = order
        self._length = length
        self._skipped = skipped
        self._document_end = document_end

    def __len__(self) -> int:
        return self._length

    def read(self, positions: Sequence[int]) -> TokenBatch:
        """The samples at `positions` (after skipping), in their order; `PADDING` gives a padding sample.

        Raises `IndexError` beyond the stream's end.
        """
        for position in positions:
            if not (position == PADDING or 0 <= position < self._length):
                raise IndexError(f"sample {position} of a stream of {self._length}")
        sample_ids = [self._sample_id(position) for position in positions]
        samples = [self._sample(sample_id) for sample_id in sample_ids]
        tokens_BS = torch.stack([sample["tokens"] for sample in samples])
        sample_ids_B = torch.tensor(sample_ids, dtype=torch.int64)
        counts_B1 = (sample_ids_B != PADDING).float().unsqueeze(1)
        return TokenBatch(
            tokens_BS=tokens_BS,
            labels_BS=torch.stack([sample["labels"] for sample in samples]),
            loss_mask_BS=counts_B1.repeat(1, tokens_BS.shape[1]),
            document_ids_BS=self._document_ids(tokens_BS),
            sample_ids_B=sample_ids_B,
        )

    def _sample_id(self, position: int) -> int:
        """Position before skipping."""
        for first, last in self._skipped:
            if position >= first:
                position += last - first
        return position

    def _sample(self, sample_id: int) -> dict[str, Tensor]:
        if sample_id == PADDING:
            sample_id = 0  # any text will do
        if self._order is None:
            return self._components[0].sample(sample_id)
        component_P, index_P = self._order
        return self._components[int(component_P[sample_id])].sample(int(index_P[sample_id]))

    def _document_ids(self, tokens_BS: Tensor) -> Tensor | None:
        if self._document_end is None:
            return None
        ends_BS = (tokens_BS == self._document_end).long()
        return ends_BS.cumsum(dim=1) - ends_BS


@dataclass(frozen=True)
class Streams:
    """All streams of a run."""

    train: TokenStream | None
    """The blend, as long as the run; None if the recipe names no training data."""

    validation: dict[str, TokenStream]
    """One epoch of each component, by name."""

    test: dict[str, TokenStream]
    """The same."""


def build_streams(config: RunConfig) -> Streams:
    """The streams of a run, whose index cache is written where it lacks something: by one process.

    Raises `DataError` or `ConfigError` if data is missing, torn, too small or of another vocabulary, or its
    fields are malformed.
    """
    return _open_streams(config, build=True)


def read_streams(config: RunConfig) -> Streams:
    """The same in every other process, once the cache is there. Raises as `build_streams` does."""
    return _open_streams(config, build=False)


def _open_streams(config: RunConfig, *, build: bool) -> Streams:
    data = config.data
    tokenizer = load_tokenizer(data.tokenizer) if data.tokenizer is not None else None
    vocab_size = config.model.vocab_size or (tokenizer.vocab_size if tokenizer else None)
    if vocab_size is None:
        raise ConfigError("model.vocab_size is null and data.tokenizer too; give one of them")
    document_end = None
    if config.model.mask_documents:
        document_end = data.eod_token
        if document_end is None and tokenizer is not None:
            document_end = tokenizer.eod
        if document_end is None:
            raise ConfigError(
                "model.mask_documents needs an end-of-document token: give data.eod_token, or a "
                "data.tokenizer that has one"
            )
    settings = IndexSettings(
        seq_length=config.model.seq_length,
        vocab_size=vocab_size,
        seed=config.training.seed,
        cache_dir=Path(config.data.cache_dir or Path(config.run_dir) / "index_cache"),
        build=build,
        tokenizer_sha256=tokenizer.sha256() if tokenizer else None,
    )
    shares = _split_shares(config)
    held_out = functools.partial(
        _held_out_streams, config, replace(settings, seed=_HELD_OUT_SEED), document_end
    )
    return Streams(
        train=_training_stream(config, settings, shares[0], document_end) if data.train else None,
        validation=held_out("data.validation", data.validation, shares[1]),
        test=held_out("data.test", data.test, shares[2]),
    )


def _training_stream(
    config: RunConfig, settings: IndexSettings, share: tuple[float, float] | None, document_end: int | None
) -> TokenStream:
    prefixes, weights = parse_blend(config.data.train, "data.train")
    if share is None:
        raise ConfigError(f"data.split {config.data.split!r} leaves no documents for training")
    components = [Component(prefix, settings, "data.train", share) for prefix in prefixes]
    skipped = parse_skipped(config.data.skip_samples)
    wanted = config.training.steps * config.training.global_batch_size
    with_skipped = wanted + sum(last - first for first, last in skipped)
    order = None
    samples_of = [with_skipped]
    if len(components) > 1:
        sizes = np.array(weights or [component.tokens for component in components], dtype=np.float64)
        order = _blend(sizes / sizes.sum(), with_skipped, settings)
        samples_of = np.bincount(order[0], minlength=len(components)).tolist()
    for component, samples in zip(components, samples_of, strict=True):
        component.prepare(samples)
    return TokenStream(components, order, wanted, skipped, document_end)


def _held_out_streams(
    config: RunConfig,
    settings: IndexSettings,
    document_end: int | None,
    field: str,
    entries: Sequence[str],
    share: tuple[float, float] | None,
) -> dict[str, TokenStream]:
    """One stream a component: of the files that `entries` name, else of the training files' share."""
    if entries:
        share = (0.0, 1.0)
    elif share is not None:
        entries, field = config.data.train, "data.train"
    if share is None or not entries:
        return {}
    prefixes, _ = parse_blend(entries, field)
    components = [Component(prefix, settings, field, share) for prefix in prefixes]
    for component in components:
        component.prepare(component.samples_per_epoch)
    return {
        name: TokenStream([component], None, component.samples_per_epoch, (), document_end)
        for name, component in zip(_names(prefixes), components, strict=True)
    }


def _names(prefixes: Sequence[str]) -> list[str]:
    """The last part of each path, or the whole path where those coincide."""
    occurrences = Counter(Path(prefix).name for prefix in prefixes)
    return [prefix if occurrences[Path(prefix).name] > 1 else Path(prefix).name for prefix in prefixes]


def _blend(shares: np.ndarray, length: int, settings: IndexSettings) -> tuple[np.ndarray, np.ndarray]:
    """Component (int16) and index within it (int64) of each of `length` samples, mapped from the cache.

    megatron-core's greedy order: each sample comes from the component that lags most behind its share,
    so a longer blend begins with the shorter one.
    """
    digest = hashlib.sha256(shares.tobytes() + str(length).encode()).hexdigest()[:16]
    folder = settings.cache_dir / f"blend-{digest}"
    cached_folder(folder, functools.partial(_write_blend, shares, length), build=settings.build)
    return (
        np.load(folder / "component.npy", mmap_mode="r"),
        np.load(folder / "index.npy", mmap_mode="r"),
    )


def _write_blend(shares: np.ndarray, length: int, folder: Path) -> None:
    from megatron.core.datasets import helpers  # compiled; a missing build should fail here, by name

    component_P = np.zeros(length, dtype=np.int16)
    index_P = np.zeros(length, dtype=np.int64)
    helpers.build_blending_indices(component_P, index_P, shares, len(shares), length, False)
    np.save(folder / "component.npy", component_P)
    np.save(folder / "index.npy", index_P)


def parse_blend(entries: Sequence[str], field: str) -> tuple[list[str], list[float] | None]:
    """Prefixes and their weights: `["0.7", "a", "0.3", "b"]`, or without weights `["a", "b"]`.

    Raises `ConfigError` naming `field` if only some have a weight, one is not above 0, or a file occurs
    twice.
    """
    weights = [_number(entry) for entry in entries[0::2]]
    if entries and weights[0] is None:
        prefixes, given = list(entries), None
    else:
        prefixes = list(entries[1::2])
        given = [weight for weight in weights if weight is not None and 0 < weight < float("inf")]
        if len(given) != len(weights) or len(prefixes) != len(weights):
            raise ConfigError(
                f"{field} {list(entries)} mixes weights and files; write a weight above 0 before every "
                'file, ["0.7", "a", "0.3", "b"], or before none'
            )
    if len(set(prefixes)) != len(prefixes):
        raise ConfigError(f"{field} {list(entries)} names a file twice; give it once, with a larger weight")
    return prefixes, given


def _number(entry: str) -> float | None:
    try:
        return float(entry)
    except ValueError:
        return None


def parse_skipped(ranges: Sequence[str]) -> list[tuple[int, int]]:
    """`data.skip_samples` as sorted disjoint half-open ranges; raises `ConfigError` if one is malformed."""
    parsed = []
    for text in ranges:
        first, colon, last = text.partition(":")
        if not (colon and first.isdecimal() and last.isdecimal() and int(first) < int(last)):
            raise ConfigError(
                f'data.skip_samples {text!r} is no range; write "first:last", first below last: "4096:8192"'
            )
        parsed.append((int(first), int(last)))
    merged: list[tuple[int, int]] = []
    for start, end in sorted(parsed):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def _split_shares(config: RunConfig) -> list[tuple[float, float] | None]:
    """From where to where, of the training files' documents, each of train, validation and test lies."""
    data = config.data
    parts = [_number(part) for part in data.split.split(",")]
    sizes = [part for part in parts if part is not None and 0 <= part < float("inf")]
    if len(parts) != 3 or len(sizes) != 3 or sum(sizes) == 0:
        raise ConfigError(
            f"data.split {data.split!r} must be three shares, train, validation and test, e.g. 98,1,1"
        )
    for name, entries, size in (("validation", data.validation, sizes[1]), ("test", data.test, sizes[2])):
        if entries and size:
            raise ConfigError(
                f"data.split {data.split!r} sets documents aside for {name}, but data.{name} names files "
                "of its own; make that share 0, or leave the files out"
            )
    return convert_split_vector_to_split_matrix(parse_and_normalize_split(data.split))  # type: ignore[no-any-return]
