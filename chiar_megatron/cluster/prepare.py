"""What a recipe's data still needs before GPUs are held: tokenised files and index caches.

Text is taken from beside the prefix: `data/wiki.jsonl` (or .txt, .json, .ndjson, each also .gz or .zst)
becomes `data/wiki.bin` and `.idx`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from chiar_megatron.config.load import resolve_config
from chiar_megatron.config.schema import RunConfig
from chiar_megatron.config.validate import check_paths, data_prefixes
from chiar_megatron.errors import ConfigError

_SUFFIXES = [a + b for a in (".jsonl", ".txt", ".json", ".ndjson") for b in ("", ".zst", ".gz")]


@dataclass(frozen=True)
class Unprepared:
    """What is to be made."""

    texts: dict[str, Path]
    """The text of each prefix that has no tokenised files yet."""

    index: bool
    """Whether the index cache is empty."""

    def __bool__(self) -> bool:
        return bool(self.texts) or self.index


def find_unprepared(config: RunConfig) -> Unprepared:
    """What a preparation job would make, by a look at which files are there."""
    data = config.data
    texts: dict[str, Path] = {}
    fields = (data.train, data.validation, data.test)
    for prefix in (prefix for entries in fields for prefix in data_prefixes(entries)):
        if Path(f"{prefix}.bin").is_file() and Path(f"{prefix}.idx").is_file():
            continue
        found = [path for suffix in _SUFFIXES if (path := Path(prefix + suffix)).is_file()]
        if found and data.tokenizer is not None:
            texts[prefix] = found[0]
    cache = Path(data.cache_dir or Path(config.run_dir) / "index_cache")
    return Unprepared(texts, not any(path.is_dir() for path in cache.glob("*")))


def prepare(config: RunConfig, workers: int, say: Callable[[str], None]) -> None:
    """Tokenise what is missing and build the index caches, as the training job would.

    Raises DataError or ConfigError as `preprocess` and `build_streams` do.
    """
    from chiar_megatron.data.dataset import build_streams
    from chiar_megatron.data.preprocess import preprocess
    from chiar_megatron.data.tokenizer import load_tokenizer

    for prefix, text in find_unprepared(config).texts.items():
        summary = preprocess([text], str(config.data.tokenizer), prefix, workers=workers)
        say(f"{prefix}.bin from {text}: {summary.documents:,} documents, {summary.tokens:,} tokens")
    check_paths(config)
    if config.data.tokenizer is None:
        config = resolve_config(config, vocab_size=None, eod_token=None)
    else:
        tokenizer = load_tokenizer(config.data.tokenizer)
        config = resolve_config(config, vocab_size=tokenizer.vocab_size, eod_token=tokenizer.eod)
    streams = build_streams(config)
    if streams.train is None:
        raise ConfigError(
            "data.train: is empty; give prefixes of .bin/.idx files, made by `chiar preprocess`"
        )
    say(f"index cache in {config.data.cache_dir}: {len(streams.train):,} training samples")
