"""Tokenizers: SentencePiece (trained here, lossless), GPT-2's files, and Hugging Face's `tokenizer.json`.

All are read from disk; nothing here ever touches the network.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import sentencepiece
import tokenizers

from chiar_megatron.data.text import read_documents
from chiar_megatron.errors import DataError

_END_OF_DOCUMENT_NAMES = ("<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>", "[EOS]", "<|eos|>")
_SPACE_MARK = "\u2581"  # what SentencePiece writes for a space inside its pieces
_LONGEST_SENTENCE_BYTES = 4000  # SentencePiece drops longer ones (its limit is 4192)
_TRAINING_SEED = 0


class Tokenizer(ABC):
    """Text to token ids and back."""

    name: str
    """Kind and file, for people."""

    vocab_size: int
    """Largest id + 1."""

    eod: int | None
    """Id of the end-of-document token, if there is one."""

    files: tuple[Path, ...]
    """What it was read from."""

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without any begin or end token."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`."""

    def sha256(self) -> str:
        """Fingerprint of the tokenizer's files."""
        digest = hashlib.sha256()
        for file in self.files:
            digest.update(file.read_bytes())
        return digest.hexdigest()


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece `.model`. One trained by `train_tokenizer` gives every text back exactly."""

    def __init__(self, path: Path) -> None:
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (OSError, RuntimeError) as error:
            raise DataError(f"{path} is not a SentencePiece model: {error}") from error
        self.name = f"sentencepiece {path.name}"
        self.files = (path,)
        self.vocab_size = int(self._model.get_piece_size())
        self.eod = self._model.eos_id() if self._model.eos_id() >= 0 else None
        mark_bytes = [f"<0x{byte:02X}>" for byte in _SPACE_MARK.encode()]
        self._mark_ids = [self._model.piece_to_id(piece) for piece in mark_bytes]
        self._has_bytes = all(map(self._model.is_byte, self._mark_ids))

    def encode(self, text: str) -> list[int]:
        if not self._has_bytes or _SPACE_MARK not in text:
            return list(self._model.encode(text))
        # SentencePiece would read the mark as a space: spell it in bytes instead
        first, *others = text.split(_SPACE_MARK)
        ids = list(self._model.encode(first))
        for part in others:
            ids += self._mark_ids + self._model.encode(part)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._model.decode(list(ids)))


class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer of the `tokenizers` library."""

    def __init__(
        self, name: str, files: tuple[Path, ...], model: tokenizers.Tokenizer, eod: int | None
    ) -> None:
        self.name = name
        self.files = files
        self.vocab_size = max(model.get_vocab(with_added_tokens=True).values()) + 1
        self.eod = eod
        self._model = model

    def encode(self, text: str) -> list[int]:
        return list(self._model.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._model.decode(list(ids), skip_special_tokens=False))


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer at `path`: a SentencePiece `.model`, a Hugging Face `tokenizer.json`, or a folder
    that holds `tokenizer.json`, GPT-2's `vocab.json` + `merges.txt`, or one `.model` (looked for in
    this order).

    Raises `DataError` if there is none or it cannot be read.
    """
    path = Path(path)
    if path.is_dir():
        if (path / "tokenizer.json").is_file():
            return _load_hugging_face(path / "tokenizer.json")
        if (path / "vocab.json").is_file() and (path / "merges.txt").is_file():
            return _load_gpt2(path)
        models = sorted(path.glob("*.model"))
        if len(models) == 1:
            return SentencePieceTokenizer(models[0])
        raise DataError(f"{path} holds neither tokenizer.json, nor vocab.json and merges.txt, nor one .model")
    if not path.is_file():
        raise DataError(f"tokenizer {path} does not exist; make one by `chiar tokenizer train`")
    if path.suffix == ".model":
        return SentencePieceTokenizer(path)
    if path.suffix == ".json":
        return _load_hugging_face(path)
    raise DataError(
        f"tokenizer {path} is of no known kind; give a SentencePiece .model, a Hugging Face tokenizer.json, "
        "or a folder with vocab.json and merges.txt"
    )


def _load_hugging_face(path: Path) -> Tokenizer:
    try:
        model = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exceptions
        raise DataError(f"{path} is not a Hugging Face tokenizer: {error}") from error
    eod = None
    for name in (_configured_eos(path.parent / "tokenizer_config.json"), *_END_OF_DOCUMENT_NAMES):
        if name is not None and eod is None:
            eod = model.token_to_id(name)
    return HuggingFaceTokenizer(f"huggingface {path.parent.name}/{path.name}", (path,), model, eod)


def _configured_eos(path: Path) -> str | None:
    """`eos_token` of a `tokenizer_config.json` beside the tokenizer, where it is written either way."""
    if not path.is_file():
        return None
    try:
        token = json.loads(path.read_text(encoding="utf-8")).get("eos_token")
    except (ValueError, AttributeError) as error:
        raise DataError(f"{path} is not a JSON object: {error}") from error
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _load_gpt2(folder: Path) -> Tokenizer:
    """GPT-2's byte-level BPE. `<|endoftext|>` spelled out in a text stays text: no eod is smuggled in."""
    files = (folder / "vocab.json", folder / "merges.txt")
    try:
        model = tokenizers.Tokenizer(tokenizers.models.BPE.from_file(*map(str, files)))
    except Exception as error:  # the library raises bare Exceptions
        raise DataError(f"{folder}: vocab.json and merges.txt are not GPT-2's: {error}") from error
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    eod = model.token_to_id("<|endoftext|>")
    return HuggingFaceTokenizer(f"gpt2 {folder.name}", files, model, eod)


def train_tokenizer(
    inputs: Sequence[str | Path],
    vocab_size: int,
    output_prefix: str | Path,
    model_type: Literal["unigram", "bpe"] = "unigram",
    byte_fallback: bool = True,
    sample_sentences: int = 1_000_000,
    num_threads: int = 4,
    json_key: str = "text",
) -> Path:
    """Train a SentencePiece model on text files and write `PREFIX.model` and `PREFIX.vocab`.

    Nothing is normalised and no space is put in front, so with `byte_fallback` every text comes back
    exactly from its tokens. Ids: 0 unknown, 1 end of document (`</s>`), then bytes, then pieces.
    A "sentence" is a line; of more than `sample_sentences` lines so many are drawn (fixed seed).
    The same inputs and `num_threads` give the same file, byte for byte.

    Returns the path of the model. Raises `DataError` if a file cannot be read, the text is empty, or
    `vocab_size` is too small or too large for it; the limit is named.
    """
    failures: list[DataError] = []
    sentences = _sentences(read_documents(inputs, json_key), failures)
    first = next(sentences, None)
    if first is None:
        raise DataError(f"no text in {', '.join(map(str, inputs))}: a tokenizer cannot be trained on nothing")
    model = io.BytesIO()
    sentencepiece.set_random_generator_seed(_TRAINING_SEED)
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=itertools.chain([first], sentences),
            model_writer=model,
            vocab_size=vocab_size,
            model_type=model_type,
            byte_fallback=byte_fallback,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            input_sentence_size=sample_sentences,
            shuffle_input_sentence=True,
            unk_id=0,
            eos_id=1,
            bos_id=-1,
            pad_id=-1,
            num_threads=num_threads,
            minloglevel=2,
        )
    except RuntimeError as error:
        if failures:
            raise failures[0] from None
        raise DataError(_explain_training_failure(str(error), vocab_size)) from error
    return _write_model(Path(output_prefix), model.getvalue())


def _sentences(documents: Iterator[str], failures: list[DataError]) -> Iterator[str]:
    """Lines, the longest cut where SentencePiece would otherwise drop them.

    SentencePiece turns an error of its iterator into a RuntimeError: `failures` keeps the real one.
    """
    longest = _LONGEST_SENTENCE_BYTES // 4  # characters; none is longer than 4 bytes
    try:
        for line in itertools.chain.from_iterable(document.splitlines() for document in documents):
            if not line or line.isspace():
                continue
            if len(line.encode()) <= _LONGEST_SENTENCE_BYTES:
                yield line
            else:
                yield from (line[start : start + longest] for start in range(0, len(line), longest))
    except DataError as error:
        failures.append(error)
        raise


def _explain_training_failure(message: str, vocab_size: int) -> str:
    too_large = re.search(r"Vocabulary size too high.*<= (\d+)", message)
    if too_large:
        return (
            f"--vocab-size {vocab_size} is too large for this text: the largest possible is "
            f"{too_large.group(1)}; ask for at most that, or give more text"
        )
    too_small = re.search(r"smaller than required_chars\. \d+ vs (\d+)", message)
    if too_small:
        return (
            f"--vocab-size {vocab_size} is too small for this text: the smallest possible is "
            f"{too_small.group(1)}; ask for at least that"
        )
    return f"SentencePiece could not train on this text: {message}"


def _write_model(prefix: Path, model: bytes) -> Path:
    """Write `PREFIX.model` and `PREFIX.vocab` (id, piece and score a line), the model last."""
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    pieces = (f"{processor.id_to_piece(i)}\t{processor.get_score(i):g}" for i in range(len(processor)))
    path = prefix.with_name(prefix.name + ".model")
    try:
        prefix.parent.mkdir(parents=True, exist_ok=True)
        prefix.with_name(prefix.name + ".vocab").write_text("\n".join(pieces) + "\n", encoding="utf-8")
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_bytes(model)
        temporary.replace(path)
    except OSError as error:
        raise DataError(f"tokenizer {path} cannot be written: {error.strerror or error}") from error
    return path
