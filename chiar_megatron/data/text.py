"""Documents out of `.txt` and `.jsonl` files, plain or compressed with gzip (`.gz`) or zstd (`.zst`).

A file whose name (less `.gz`/`.zst`) ends in `.jsonl`, `.ndjson` or `.json` holds one JSON object a
line, each a document. Every other file is UTF-8 text, in which a line holding only the document
separator ends a document; without such a line the file is one document. Nothing else about the text
is changed: a document's newlines, tabs and double spaces stay as they are.
"""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import zstandard

from chiar_megatron.errors import DataError

DOCUMENT_SEPARATOR = "<|endoftext|>"
JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")


def read_documents(
    paths: Sequence[str | Path], json_key: str = "text", document_separator: str = DOCUMENT_SEPARATOR
) -> Iterator[str]:
    """The documents of all files, in order, as they are read (nothing is held back in memory).

    `document_separator`: the line that ends a document of a text file; "" means an empty line.
    Documents of whitespace alone are left out.

    Raises `DataError` naming the file (and line) if one is missing, unreadable, torn, not UTF-8, or
    holds a line that is not a JSON object with a text under `json_key`.
    """
    for path in map(Path, paths):
        require_file(path)
        with _utf8_lines(path) as lines:
            if _inner_suffix(path) in JSON_SUFFIXES:
                documents = _json_documents(path, lines, json_key)
            else:
                documents = _text_documents(lines, document_separator)
            for document in documents:
                if document and not document.isspace():
                    yield document


def require_file(path: Path) -> None:
    """Raise `DataError` unless `path` is a file."""
    if path.is_dir():
        raise DataError(f"{path} is a folder; name the text files in it, e.g. {path}/*.txt")
    if not path.is_file():
        raise DataError(f"{path} does not exist; give the path of a .txt or .jsonl file (also .gz, .zst)")


def _inner_suffix(path: Path) -> str:
    if path.suffix in (".gz", ".zst"):
        path = path.with_suffix("")
    return path.suffix.lower()


@contextmanager
def _utf8_lines(path: Path) -> Iterator[Iterator[str]]:
    """The file's lines with their newlines; whatever goes wrong while they are read is a `DataError`."""
    try:
        with open(path, "rb") as file, _decompressed(path, file) as raw:
            # newline="\n": no translation, so that "\r\n" survives; utf-8-sig drops a byte order mark
            yield io.TextIOWrapper(raw, encoding="utf-8-sig", newline="\n")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8 text ({error.reason}); convert it, e.g. `iconv -f latin1 -t utf-8`"
        ) from error
    except (gzip.BadGzipFile, zlib.error, EOFError, zstandard.ZstdError) as error:
        raise DataError(f"{path} cannot be decompressed ({error}); it is torn or not of its kind") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error


@contextmanager
def _decompressed(path: Path, file: BinaryIO) -> Iterator[BinaryIO]:
    if path.suffix == ".gz":
        with gzip.GzipFile(fileobj=file) as raw:
            yield raw  # type: ignore[misc]  # GzipFile is a BinaryIO in all but name
    elif path.suffix == ".zst":
        # long windows (`zstd --long=27`) need the higher memory limit
        with zstandard.ZstdDecompressor(max_window_size=2**31).stream_reader(
            file, read_across_frames=True
        ) as raw:
            yield raw
    else:
        yield file


def _json_documents(path: Path, lines: Iterator[str], json_key: str) -> Iterator[str]:
    for number, line in enumerate(lines, start=1):
        if line.isspace():
            continue
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{path}:{number}: not valid JSON ({error.msg} at column {error.colno}); "
                "each line must hold one whole JSON object"
            ) from error
        if not isinstance(entry, dict):
            raise DataError(f'{path}:{number}: a JSON object is wanted, e.g. {{"{json_key}": "…"}}')
        if json_key not in entry:
            keys = ", ".join(map(repr, list(entry)[:8])) or "none"
            raise DataError(
                f"{path}:{number}: no key {json_key!r} (keys here: {keys}); choose one by --json-key"
            )
        text = entry[json_key]
        if not isinstance(text, str):
            raise DataError(f"{path}:{number}: {json_key!r} holds a {type(text).__name__}, not a text")
        yield _without_lone_surrogates(text)


def _without_lone_surrogates(text: str) -> str:
    r"""JSON can spell half a character ("\ud83d"), which no UTF-8 can: it becomes U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _text_documents(lines: Iterator[str], separator: str) -> Iterator[str]:
    document: list[str] = []
    for line in lines:
        if line.rstrip("\r\n") == separator:
            yield "".join(document)
            document.clear()
        else:
            document.append(line)
    yield "".join(document)
