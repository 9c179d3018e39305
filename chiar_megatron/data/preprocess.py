"""Text to `PREFIX.bin` and `PREFIX.idx` in Megatron's IndexedDataset format, and a summary in `PREFIX.json`.

Worker processes encode batches of documents; their answers are taken in order, so the files are the
same, byte for byte, for any number of workers.

megatron-core is imported only where the files are written: it takes seconds, and every worker process
imports this module again when the calling script does.
"""

from __future__ import annotations

import errno
import json
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal

import numpy as np
from tqdm import tqdm

from chiar_megatron.data.encoding import EncodedBatch, encode_documents
from chiar_megatron.data.text import DOCUMENT_SEPARATOR, read_documents, require_file
from chiar_megatron.data.tokenizer import Tokenizer, load_tokenizer
from chiar_megatron.errors import DataError


@dataclass(frozen=True)
class Summary:
    """What a preprocessed file holds; `PREFIX.json` has the same keys."""

    documents: int
    """Documents with any text."""

    tokens: int
    """Tokens, with those that end documents."""

    end_of_document_tokens: int
    """How many of them end documents."""

    max_token_id: int
    """The largest token id that occurs."""

    bytes: int
    """UTF-8 bytes of the text."""

    words: int
    """Words of the text: what whitespace separates."""

    dtype: str
    """Type of a token in the `.bin` file: "uint16" or "int32"."""

    tokenizer_name: str
    """Kind and file of the tokenizer."""

    tokenizer_vocab_size: int
    """Its vocabulary."""

    tokenizer_sha256: str
    """Fingerprint of its files."""


@dataclass(frozen=True)
class Request:
    """What `preprocess` is asked for."""

    inputs: Sequence[str | Path]
    tokenizer_path: str | Path
    output_prefix: str | Path
    workers: int = 1
    json_key: str = "text"
    append_eod: bool = True
    document_separator: str = DOCUMENT_SEPARATOR
    dtype: Literal["auto", "uint16", "int32"] = "auto"

    def check(self) -> Tokenizer:
        """The tokenizer. Raises DataError for what can be seen before any text is read."""
        tokenizer = load_tokenizer(self.tokenizer_path)
        _choose_dtype(tokenizer, self.dtype)
        if self.append_eod and tokenizer.eod is None:
            raise DataError(
                f"{self.tokenizer_path} has no end-of-document token; use another or append_eod=False"
            )
        for path in map(Path, self.inputs):
            require_file(path)
        return tokenizer

    def encode(self, tokenizer: Tokenizer, part: tuple[int, int] = (0, 1)) -> Iterable[EncodedBatch]:
        """The text's batches, or every n-th of them from the i-th on (part (i, n))."""
        documents = read_documents(self.inputs, self.json_key, self.document_separator)
        eod = tokenizer.eod if self.append_eod else None
        return encode_documents(documents, self.tokenizer_path, eod, self.workers, part)


def preprocess(
    inputs: Sequence[str | Path],
    tokenizer_path: str | Path,
    output_prefix: str | Path,
    workers: int = 1,
    json_key: str = "text",
    append_eod: bool = True,
    document_separator: str = DOCUMENT_SEPARATOR,
    dtype: Literal["auto", "uint16", "int32"] = "auto",
) -> Summary:
    """Tokenise `inputs` (see `data.text` for the formats) into `PREFIX.bin`, `PREFIX.idx`, `PREFIX.json`.

    `append_eod` ends every document with the tokenizer's end-of-document token. `dtype` "auto" is
    megatron-core's choice: uint16 for vocabularies under 65,500, else int32. `workers` 1 stays in this
    process. A progress bar is drawn on a terminal. Files appear whole or not at all: they are written
    under temporary names, and `.idx` is renamed last.

    Raises `DataError` for text that is missing, empty or malformed, a tokenizer without an
    end-of-document token or too large for `dtype`, and a full disk.
    """
    return preprocess_request(
        Request(
            inputs, tokenizer_path, output_prefix, workers, json_key, append_eod, document_separator, dtype
        )
    )


def preprocess_request(request: Request) -> Summary:
    """`preprocess`, asked by one object."""
    tokenizer = request.check()
    return write(request, tokenizer, request.encode(tokenizer))


def write(request: Request, tokenizer: Tokenizer, batches: Iterable[EncodedBatch]) -> Summary:
    """The three files from all batches of a request, in order. Raises DataError as `preprocess` does."""
    with _Writer(str(request.output_prefix), _choose_dtype(tokenizer, request.dtype)) as writer:
        with tqdm(unit="B", unit_scale=True, desc="preprocess", disable=not sys.stderr.isatty()) as bar:
            for batch in batches:
                writer.add(batch)
                bar.update(batch.bytes)
        if not writer.documents:
            raise DataError(f"no text in {', '.join(map(str, request.inputs))}: nothing to preprocess")
        return writer.commit(tokenizer, request.append_eod)


def load_summary(prefix: str | Path) -> Summary | None:
    """`PREFIX.json` as `preprocess` wrote it; None if there is none (the data comes from another tool)."""
    try:
        return Summary(**json.loads(Path(f"{prefix}.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _choose_dtype(tokenizer: Tokenizer, wanted: Literal["auto", "uint16", "int32"]) -> type[np.integer]:
    if wanted == "auto":
        from megatron.core.datasets.indexed_dataset import DType

        return DType.optimal_dtype(tokenizer.vocab_size)  # type: ignore[no-any-return]
    dtype: type[np.integer] = np.uint16 if wanted == "uint16" else np.int32
    limit = int(np.iinfo(dtype).max) + 1
    if tokenizer.vocab_size > limit:
        raise DataError(
            f"--dtype {wanted} holds at most {limit} token ids, but {tokenizer.name} has "
            f"{tokenizer.vocab_size}; use --dtype int32"
        )
    return dtype


class _Writer:
    """Writes the three files beside their names and renames them on `commit`; otherwise removes them."""

    def __init__(self, prefix: str, dtype: type[np.integer]) -> None:
        self.documents = 0
        self._tokens = self._max_token_id = self._bytes = self._words = 0
        self._prefix = prefix
        self._dtype = dtype
        self._temporary = {suffix: f"{prefix}{suffix}.tmp" for suffix in (".bin", ".json", ".idx")}
        if os.path.exists(f"{prefix}.json") and load_summary(prefix) is None:
            raise DataError(f"{prefix}.json exists and is no summary of ours; choose another --output prefix")

    def __enter__(self) -> _Writer:
        from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

        try:
            os.makedirs(os.path.dirname(self._prefix) or ".", exist_ok=True)
            self._builder = IndexedDatasetBuilder(self._temporary[".bin"], dtype=self._dtype)
        except OSError as error:
            raise DataError(f"{self._prefix}.bin cannot be written: {error.strerror}") from error
        return self

    def add(self, batch: EncodedBatch) -> None:
        ends = np.cumsum(batch.lengths)[:-1]
        for document in np.split(batch.ids, ends):
            self._builder.add_document(document, [len(document)])
        self.documents += len(batch.lengths)
        self._tokens += len(batch.ids)
        self._max_token_id = max(self._max_token_id, int(batch.ids.max()))
        self._bytes += batch.bytes
        self._words += batch.words

    def commit(self, tokenizer: Tokenizer, append_eod: bool) -> Summary:
        summary = Summary(
            documents=self.documents,
            tokens=self._tokens,
            end_of_document_tokens=self.documents if append_eod else 0,
            max_token_id=self._max_token_id,
            bytes=self._bytes,
            words=self._words,
            dtype=self._dtype.__name__,
            tokenizer_name=tokenizer.name,
            tokenizer_vocab_size=tokenizer.vocab_size,
            tokenizer_sha256=tokenizer.sha256(),
        )
        self._builder.finalize(self._temporary[".idx"])
        with open(self._temporary[".json"], "w", encoding="utf-8") as file:
            file.write(json.dumps(asdict(summary), indent=2) + "\n")
        for temporary in self._temporary.values():
            with open(temporary, "rb+") as file_to_sync:
                os.fsync(file_to_sync.fileno())  # some file systems report a full disk only here
        # an old index must never stand beside new tokens, not even for a moment
        if os.path.exists(f"{self._prefix}.idx"):
            os.remove(f"{self._prefix}.idx")
        for suffix, temporary in self._temporary.items():
            os.replace(temporary, self._prefix + suffix)
        return summary

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._builder.data_file.close()
        except OSError:
            pass  # the disk is full, which `error` already says
        for temporary in self._temporary.values():
            if os.path.lexists(temporary):
                os.remove(temporary)
        if isinstance(error, OSError):
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            remedy = "; free some space and run again (nothing was kept)" if full else ""
            raise DataError(f"{self._prefix}.bin cannot be written: {error.strerror}{remedy}") from error
