"""What `chiar evaluate` reads: a text as one row of tokens, and the windows that slide over it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from chiar_megatron.config.schema import RunConfig
from chiar_megatron.data.components import open_tokens
from chiar_megatron.data.dataset import TokenBatch
from chiar_megatron.data.encoding import encode_documents
from chiar_megatron.data.preprocess import load_summary
from chiar_megatron.data.text import read_documents
from chiar_megatron.errors import DataError
from chiar_megatron.inference.load import checkpoint_tokenizer

_MIN_TOKENS = 2

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EvaluationText:
    """A text as tokens, and its size in units that no tokenizer decides."""

    ids_N: npt.NDArray[np.int64]
    """An eod, then all documents, each followed by an eod. Every token but the first is predicted."""

    eod: int
    """The end-of-document token: context that is not scored."""

    words: int | None
    """Words of the raw text; None if not known."""

    bytes: int | None
    """UTF-8 bytes of the raw text; None if not known."""


@dataclass(frozen=True)
class Window:
    """The model reads tokens `first` to `last - 1` of the row and predicts `first + 1` to `last`; of those
    the ones from `scored` on count."""

    first: int
    last: int
    scored: int


def read_text(paths: Sequence[str], tokenizer_path: str | None, config: RunConfig) -> EvaluationText:
    """Text files in the formats of `chiar preprocess`, by the checkpoint's tokenizer or the one given.

    Raises DataError for text that is missing, empty or shorter than 2 tokens, and for a tokenizer that
    is missing, lacks an end-of-document token or is not the model's.
    """
    tokenizer = checkpoint_tokenizer(config, tokenizer_path)
    eod = _end_of_document(config, tokenizer.eod)
    path = tokenizer_path or config.data.tokenizer
    assert path is not None
    batches = list(encode_documents(read_documents(paths), path, eod, workers=1))
    return _text(
        [batch.ids for batch in batches],
        eod,
        sum(batch.words for batch in batches),
        sum(batch.bytes for batch in batches),
        ", ".join(paths),
    )


def read_preprocessed(prefix: str, tokenizer_path: str | None, config: RunConfig) -> EvaluationText:
    """`PREFIX.bin/.idx`; words and bytes from the summary `PREFIX.json`, where there is one.

    The tokenizer only tells that the data is its own, and the end-of-document token of a checkpoint that
    names none. Raises DataError as `read_text` does.
    """
    tokenizer = None
    if tokenizer_path is not None or (config.data.tokenizer and Path(config.data.tokenizer).exists()):
        tokenizer = checkpoint_tokenizer(config, tokenizer_path)
    assert config.model.vocab_size is not None
    fingerprint = None if tokenizer is None else tokenizer.sha256()
    documents = open_tokens(prefix, "--data", config.model.vocab_size, fingerprint)
    eod = _end_of_document(config, None if tokenizer is None else tokenizer.eod)
    summary = load_summary(prefix)
    if summary is not None and summary.tokens != documents.sequence_lengths.sum(dtype=np.int64):
        _log.warning("%s.json belongs to other data; words and bytes of the text are not known", prefix)
        summary = None
    words, size = (None, None) if summary is None else (summary.words, summary.bytes)
    return _text([documents[i] for i in range(len(documents))], eod, words, size, prefix)


def _end_of_document(config: RunConfig, of_tokenizer: int | None) -> int:
    eod = of_tokenizer if config.data.eod_token is None else config.data.eod_token
    if eod is None:
        raise DataError(
            "data.eod_token: the checkpoint names no end-of-document token, from which evaluation starts; "
            "give a tokenizer that has one by --tokenizer"
        )
    return eod


def _text(
    documents: Sequence[npt.NDArray[np.integer]], eod: int, words: int | None, size: int | None, source: str
) -> EvaluationText:
    ids_N = np.concatenate([np.array([eod]), *documents], dtype=np.int64)
    found = int((ids_N != eod).sum())
    if found < _MIN_TOKENS:
        raise DataError(
            f"{source}: {f'only {found} token' if found else 'no text'}; evaluation needs at least "
            f"{_MIN_TOKENS} tokens"
        )
    return EvaluationText(ids_N, eod, words, size)


def slide(predicted: int, window: int, stride: int) -> list[Window]:
    """Windows over a row of `predicted` + 1 tokens, all of one length (at most `window`): each token but
    the first is scored once, with as much before it as its window has."""
    length = min(window, predicted)
    windows = [Window(0, length, 1)]
    while windows[-1].last < predicted:
        last = min(windows[-1].last + stride, predicted)
        windows.append(Window(last - length, last, windows[-1].last + 1))
    return windows


def window_batch(
    text: EvaluationText, windows: Sequence[Window], rows: int, mask_documents: bool
) -> TokenBatch:
    """Windows as a batch of `rows` rows; rows beyond the windows repeat the last one and do not count."""
    tokens, labels, masks = [], [], []
    for window in windows:
        tokens.append(text.ids_N[window.first : window.last])
        labels.append(text.ids_N[window.first + 1 : window.last + 1])
        places = np.arange(window.first + 1, window.last + 1)
        masks.append((places >= window.scored) & (labels[-1] != text.eod))
    missing = rows - len(windows)
    tokens_BS = torch.from_numpy(np.stack(tokens + tokens[-1:] * missing))
    ends_BS = (tokens_BS == text.eod).long()
    return TokenBatch(
        tokens_BS=tokens_BS,
        labels_BS=torch.from_numpy(np.stack(labels + labels[-1:] * missing)),
        loss_mask_BS=torch.from_numpy(np.stack(masks + [np.zeros_like(masks[-1])] * missing)).float(),
        document_ids_BS=ends_BS.cumsum(dim=1) - ends_BS if mask_documents else None,
        sample_ids_B=torch.tensor([window.first for window in windows] + [-1] * missing),
    )
