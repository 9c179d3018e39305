"""Documents to token ids, in this process or in several; the order never changes.

Apart from `preprocess.py` because worker processes import it: it must not drag torch along.
"""

from __future__ import annotations

import itertools
import multiprocessing
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from chiar_megatron.data.tokenizer import Tokenizer, load_tokenizer
from chiar_megatron.errors import DataError

_BATCH_CHARACTERS = 1 << 18  # of text that travel to a worker at a time
_BATCHES_IN_FLIGHT_PER_WORKER = 4
_CHUNK_CHARACTERS = 1 << 20  # a longer document is encoded in pieces, to bound a tokenizer's memory


@dataclass(frozen=True)
class EncodedBatch:
    """Tokens and sizes of a few whole documents."""

    ids: npt.NDArray[np.int32]
    """Token ids of all documents, one after the other, `[tokens]`."""

    lengths: list[int]
    """Tokens of each document."""

    bytes: int
    """UTF-8 bytes of their text."""

    words: int
    """Words of their text: what whitespace separates."""


def encode_documents(
    documents: Iterable[str],
    tokenizer_path: str | Path,
    eod: int | None,
    workers: int,
    part: tuple[int, int] = (0, 1),
) -> Iterator[EncodedBatch]:
    """Encode `documents` in order, each followed by `eod` unless that is None. part (i, n): every n-th batch
    from the i-th on; which documents share a batch depends on the text alone.

    `workers` > 1 uses so many processes; only a few batches for each are held in memory at a time.
    Raises `DataError` if a worker dies.
    """
    batches = itertools.islice(_batches(documents), part[0], None, part[1])
    if workers <= 1:
        tokenizer = load_tokenizer(tokenizer_path)
        yield from (_encode_batch(batch, tokenizer, eod) for batch in batches)
        return
    # spawn: a fork of a process in which torch runs threads may hang
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(
        workers, context, initializer=_load_worker_tokenizer, initargs=(tokenizer_path,)
    )
    waiting: deque[Future[EncodedBatch]] = deque()
    try:
        for batch in batches:
            waiting.append(pool.submit(_encode_in_worker, batch, eod))
            if len(waiting) >= workers * _BATCHES_IN_FLIGHT_PER_WORKER:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise DataError("a worker died, most likely out of memory; use fewer --workers") from error
    finally:
        pool.shutdown(cancel_futures=True)


def _batches(documents: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document)
        if characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


_worker_tokenizer: Tokenizer | None = None  # set once in each worker process


def _load_worker_tokenizer(path: str | Path) -> None:
    global _worker_tokenizer
    _worker_tokenizer = load_tokenizer(path)


def _encode_in_worker(batch: list[str], eod: int | None) -> EncodedBatch:
    assert _worker_tokenizer is not None
    return _encode_batch(batch, _worker_tokenizer, eod)


def _encode_batch(batch: list[str], tokenizer: Tokenizer, eod: int | None) -> EncodedBatch:
    ids: list[int] = []
    lengths: list[int] = []
    for document in batch:
        start = len(ids)
        for chunk in _chunks(document):
            ids += tokenizer.encode(chunk)
        if eod is not None:
            ids.append(eod)
        lengths.append(len(ids) - start)
    return EncodedBatch(
        ids=np.array(ids, dtype=np.int32),
        lengths=lengths,
        bytes=sum(len(document.encode()) for document in batch),
        words=sum(len(document.split()) for document in batch),
    )


def _chunks(document: str) -> Iterator[str]:
    """The document, cut after a newline wherever it grows beyond `_CHUNK_CHARACTERS`."""
    start = 0
    while len(document) - start > _CHUNK_CHARACTERS:
        end = document.rfind("\n", start, start + _CHUNK_CHARACTERS) + 1
        end = end or start + _CHUNK_CHARACTERS  # one endless line
        yield document[start:end]
        start = end
    yield document[start:]
