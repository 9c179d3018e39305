"""Tokenizer files in a folder of `transformers`, such that `AutoTokenizer` cuts text as the training did."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import sentencepiece
import tokenizers
from tokenizers import decoders, models, normalizers

from chiar_megatron.data.tokenizer import SentencePieceTokenizer, Tokenizer, load_tokenizer
from chiar_megatron.errors import DataError

_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
_SAMPLES = (
    "The quick brown fox jumps over the lazy dog.",
    " leading and trailing ",
    "two  spaces,\ttabs\nand lines\n\n",
    "Größe naïve 東京 😀 é",
    "x = [i**2 for i in range(10)]  # 1,234.5",
    "",
)


def find_tokenizer(folder: Path, given: str | None) -> tuple[Path | None, list[str]]:
    """The folder, if it holds a tokenizer that we read; a note if it holds another. given: used instead."""
    if given is not None:
        return Path(given), []
    try:
        load_tokenizer(folder)
    except DataError as error:
        there = [name for name in _FILES if (folder / name).is_file()]
        reason = str(error).splitlines()[0]
        return None, [f"its {there[0]} is left out (--tokenizer): {reason}"] if there else []
    return folder, []


def write_tokenizer(source: Path | None, folder: Path) -> None:
    """Write the tokenizer at `source` (none: nothing) into a model's folder. Raises DataError, OSError."""
    if source is None:
        return
    tokenizer = load_tokenizer(source)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    first = tokenizer.files[0]
    beside = first.parent / "tokenizer_config.json"
    if isinstance(tokenizer, SentencePieceTokenizer):
        shutil.copyfile(first, folder / "tokenizer.model")
        converted = _from_sentencepiece(first)
        if any(converted.encode(text).ids != tokenizer.encode(text) for text in _SAMPLES):
            # One with a normalisation of its own: transformers reads the .model itself.
            config["tokenizer_class"] = "LlamaTokenizer"
        else:
            converted.save(str(folder / "tokenizer.json"))
    else:
        for file in tokenizer.files:
            shutil.copyfile(file, folder / file.name)
        if first.name == "vocab.json":
            config["tokenizer_class"] = "GPT2Tokenizer"
        if beside.is_file():
            config = json.loads(beside.read_text(encoding="utf-8"))
    end = _end_token(tokenizer)
    if end is not None and "eos_token" not in config:
        config |= {"eos_token": end, "bos_token": end, "add_bos_token": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _end_token(tokenizer: Tokenizer) -> str | None:
    if tokenizer.eod is None:
        return None
    if isinstance(tokenizer, SentencePieceTokenizer):
        processor = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer.files[0]))
        return str(processor.id_to_piece(tokenizer.eod))
    return tokenizer.decode([tokenizer.eod])


def _from_sentencepiece(path: Path) -> tokenizers.Tokenizer:
    """The same unigram pieces in the `tokenizers` library; spaces as SentencePiece marks them."""
    processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
    pieces = [(processor.id_to_piece(i), processor.get_score(i)) for i in range(len(processor))]
    fallback = any(processor.is_byte(i) for i in range(len(processor)))
    made = tokenizers.Tokenizer(models.Unigram(pieces, processor.unk_id(), byte_fallback=fallback))
    made.normalizer = normalizers.Replace(" ", "\u2581")
    made.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    special = [processor.id_to_piece(i) for i in (processor.unk_id(), processor.eos_id()) if i >= 0]
    made.add_special_tokens(
        [tokenizers.AddedToken(piece, special=True, normalized=False) for piece in special]
    )
    return made
