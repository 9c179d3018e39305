"""The recipe's sections of what lies on disk: text and checkpoints. `schema.py` has the rest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional


@dataclass(frozen=True)
class DataConfig:
    """Tokenised text and its tokenizer."""

    train: tuple[str, ...] = ()
    """Prefixes of `.bin/.idx` files, each optionally preceded by its weight: `["0.7", "a", "0.3", "b"]`
    or `["a", "b"]` (by size)."""

    validation: tuple[str, ...] = ()
    """The same for validation; each component is evaluated apart. Empty: taken from `split`."""

    test: tuple[str, ...] = ()
    """The same for the test set."""

    split: str = "100,0,0"
    """Shares of train, validation and test by documents when `validation` or `test` is empty."""

    tokenizer: Optional[str] = None
    """Path of a SentencePiece `.model`, of a folder with GPT-2's `vocab.json` and `merges.txt`, or of
    Hugging Face's `tokenizer.json`. null: only `model.vocab_size` and `data.eod_token` are used."""

    eod_token: Optional[int] = None
    """Id of the end-of-document token. null: the tokenizer's."""

    cache_dir: Optional[str] = None
    """Folder of the index cache. null: `<run folder>/index_cache`."""

    skip_samples: tuple[str, ...] = ()
    """Ranges `"first:last"` of sample positions in the training stream to leave out, e.g. after a spike."""

    num_workers: int = 0
    """Threads that read batches ahead, per rank; 0 reads when asked."""


@dataclass(frozen=True)
class CheckpointConfig:
    """When checkpoints are written and which are kept."""

    save_interval_steps: int = 0
    """Save every so many steps; 0 only at the end (and on a signal)."""

    save_interval_minutes: float = 0.0
    """Save also every so many minutes; 0 never."""

    keep_last: int = 3
    """Newest checkpoints kept; 0 keeps all."""

    keep_every_minutes: float = 0.0
    """Of the older ones keep one for every so many minutes; 0 keeps none."""

    async_save: bool = False
    """Write in the background while training goes on."""

    load_step: Optional[int] = None
    """Go back to the checkpoint of this step instead of the newest; newer ones are set aside."""
