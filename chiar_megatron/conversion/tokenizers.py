"""Tokenizer files that go along with a model."""

from __future__ import annotations

import shutil
from pathlib import Path

from chiar_megatron.data.tokenizer import load_tokenizer

FOLDER = "tokenizer"


def copy_tokenizer(source: Path | None, destination: Path) -> str | None:
    """Copy a tokenizer's files into `destination/tokenizer`; returns the tokenizer's path relative to the
    destination, or None where there is none. Raises DataError if it cannot be read."""
    if source is None:
        return None
    tokenizer = load_tokenizer(source)
    folder = destination / FOLDER
    folder.mkdir(exist_ok=True)
    beside = [source.parent if source.is_file() else source]
    config = beside[0] / "tokenizer_config.json"
    files = list(tokenizer.files)
    if files[0].suffix == ".json" and config.is_file():
        files.append(config)  # names the end-of-document token
    for file in files:
        shutil.copyfile(file, folder / file.name)
    return f"{FOLDER}/{files[0].name}" if files[0].suffix == ".model" else FOLDER
