"""Preprocessing reads every format, writes what Megatron reads, whole or not at all."""

from __future__ import annotations

import gzip
import json
import os
import random
import resource
from pathlib import Path

import pytest
import tokenizers
import zstandard
from megatron.core.datasets.indexed_dataset import IndexedDataset

from chiar_megatron.data.preprocess import Summary, load_summary, preprocess
from chiar_megatron.data.text import read_documents
from chiar_megatron.data.tokenizer import load_tokenizer, train_tokenizer
from chiar_megatron.errors import DataError

DOCUMENTS = ["One  document,\n\nwith an empty line.\n", "\tA second: naïve 漢字.\n", "A third one.\n"]


def jsonl(documents: list[str], key: str = "text") -> bytes:
    return "".join(json.dumps({key: text, "id": 1}) + "\n" for text in documents).encode()


TEXT = "<|endoftext|>\n".join(DOCUMENTS).encode()
FORMATS = {
    "a.txt": TEXT,
    "a.tokens": TEXT,
    "a.txt.gz": gzip.compress(TEXT[:40], mtime=0) + gzip.compress(TEXT[40:]),
    "a.txt.zst": zstandard.compress(TEXT[:40]) + zstandard.compress(TEXT[40:]),
    "a.jsonl": jsonl(DOCUMENTS),
    "a.jsonl.gz": gzip.compress(jsonl(DOCUMENTS)),
    "a.jsonl.zst": zstandard.compress(jsonl(DOCUMENTS)),
    "bom.txt": b"\xef\xbb\xbf" + TEXT,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghij", k=rng.randint(2, 6))) for _ in range(300)]
    (folder / "text.txt").write_text("\n".join(" ".join(rng.choices(words, k=10)) for _ in range(500)))
    return train_tokenizer([folder / "text.txt"], 400, folder / "tokenizer")


def read_back(prefix: Path, model: Path) -> list[str]:
    """Documents by megatron's own reader; each must end in the end-of-document token."""
    tokenizer = load_tokenizer(model)
    dataset = IndexedDataset(str(prefix))
    assert list(dataset.document_indices) == list(range(len(dataset) + 1))
    texts = []
    for i in range(len(dataset)):
        *ids, last = dataset[i].tolist()
        assert last == tokenizer.eod
        texts.append(tokenizer.decode(ids))
    return texts


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_round_trips(name: str, model: Path, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(FORMATS[name])
    summary = preprocess([tmp_path / name], model, tmp_path / "out" / "data")
    assert read_back(tmp_path / "out" / "data", model) == DOCUMENTS
    assert sorted(os.listdir(tmp_path / "out")) == ["data.bin", "data.idx", "data.json"]
    dataset = IndexedDataset(str(tmp_path / "out" / "data"))
    tokenizer = load_tokenizer(model)
    assert summary == Summary(
        documents=3,
        tokens=int(dataset.sequence_lengths.sum()),
        end_of_document_tokens=3,
        max_token_id=max(int(dataset[i].max()) for i in range(3)),
        bytes=len("".join(DOCUMENTS).encode()),
        words=6 + 4 + 3,
        dtype="uint16",
        tokenizer_name="sentencepiece tokenizer.model",
        tokenizer_vocab_size=400,
        tokenizer_sha256=tokenizer.sha256(),
    )
    assert load_summary(tmp_path / "out" / "data") == summary


def test_document_borders_of_text(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\r\n\r\ntwo <|endoftext|> inside\n<|endoftext|>\r\n\n<|endoftext|>\nthree")
    assert list(read_documents([path])) == ["one\r\n\r\ntwo <|endoftext|> inside\n", "three"]
    by_blank_line = list(read_documents([path], document_separator=""))
    assert by_blank_line[0] == "one\r\n"
    assert list(read_documents([path, path])) == list(read_documents([path])) * 2


def test_half_a_character_in_json_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a\\ud83d b \\ud83d\\ude00"}\n')
    assert list(read_documents([path])) == ["a\ufffd b 😀"]


def test_workers_do_not_change_a_byte(model: Path, tmp_path: Path) -> None:
    rng = random.Random(3)
    # more batches than are in flight at a time; one document is longer than what is encoded in one piece
    texts = [" ".join(rng.choices(["abc", "defg\n", "hij é"], k=rng.randint(1, 12_000))) for _ in range(150)]
    texts.insert(7, "abc de\n" * 200_000)
    (tmp_path / "a.jsonl").write_bytes(jsonl(texts))
    for workers in (1, 2):
        preprocess([tmp_path / "a.jsonl"], model, tmp_path / str(workers), workers=workers)
    for suffix in (".bin", ".idx", ".json"):
        assert (tmp_path / f"1{suffix}").read_bytes() == (tmp_path / f"2{suffix}").read_bytes()
    assert read_back(tmp_path / "2", model) == texts


def test_dtype_follows_the_vocabulary(model: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("abc")
    assert preprocess([tmp_path / "a.txt"], model, tmp_path / "b", dtype="int32").dtype == "int32"
    vocab = {f"w{i}": i for i in range(65_537)} | {"[UNK]": 65_537, "</s>": 65_538}
    large = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, "[UNK]"))
    large.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    large.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "a.txt").write_text("w7 w65536")
    with pytest.raises(DataError, match=r"--dtype uint16 holds at most 65536 token ids, but .* has 65539"):
        preprocess([tmp_path / "a.txt"], tmp_path, tmp_path / "c", dtype="uint16")
    summary = preprocess([tmp_path / "a.txt"], tmp_path, tmp_path / "c")
    assert (summary.dtype, summary.max_token_id) == ("int32", 65_538)
    dataset = IndexedDataset(str(tmp_path / "c"))  # held: its arrays die with it
    assert dataset[0].tolist() == [7, 65_536, 65_538]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b" \n<|endoftext|>\n\n", r"no text in .*a\.txt"),
        ("a.jsonl", b"", r"no text in .*a\.jsonl"),
        ("a.jsonl", b'{"text": "x"}\n\n{"text": "y"\n', r"a\.jsonl:3: not valid JSON"),
        ("a.jsonl", b'["x"]\n', r"a\.jsonl:1: a JSON object is wanted"),
        ("a.jsonl", b'{"body": "x", "id": 1}\n', r"a\.jsonl:1: no key 'text' \(keys here: 'body', 'id'\)"),
        ("a.jsonl", b'{"text": null}\n', r"a\.jsonl:1: 'text' holds a NoneType"),
        ("a.txt", b"caf\xe9", r"a\.txt is not UTF-8"),
        ("a.txt.gz", gzip.compress(TEXT * 9, mtime=0)[:-9], r"a\.txt\.gz cannot be decompressed"),
        ("a.txt.gz", b"plain", r"a\.txt\.gz cannot be decompressed"),
        ("a.txt.zst", b"plain", r"a\.txt\.zst cannot be decompressed"),
    ],
)
@pytest.mark.parametrize("workers", [1, 2])
def test_bad_input_is_named_and_leaves_nothing(
    name: str, content: bytes, message: str, workers: int, model: Path, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        preprocess([tmp_path / name], model, tmp_path / "data", workers=workers)
    assert os.listdir(tmp_path) == [name]


def test_missing_files_are_named_before_anything_is_done(model: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(DataError, match=r"b\.txt does not exist"):
        preprocess([tmp_path / "a.txt", tmp_path / "b.txt"], model, tmp_path / "data")
    with pytest.raises(DataError, match="is a folder"):
        preprocess([tmp_path], model, tmp_path / "data")
    with pytest.raises(DataError, match=r"no\.model does not exist"):
        preprocess([tmp_path / "a.txt"], tmp_path / "no.model", tmp_path / "data")


def test_a_failed_run_keeps_the_files_of_the_one_before(model: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("abc")
    preprocess([tmp_path / "a.txt"], model, tmp_path / "data")
    before = {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)}
    (tmp_path / "b.txt").write_bytes(b"abc \xff")
    with pytest.raises(DataError):
        preprocess([tmp_path / "b.txt"], model, tmp_path / "data")
    os.remove(tmp_path / "b.txt")
    assert {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)} == before


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
@pytest.mark.parametrize("suffix", [".bin", ".idx", ".json"])
def test_full_disk(suffix: str, model: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("abc " * 50_000)
    (tmp_path / f"data{suffix}.tmp").symlink_to("/dev/full")
    with pytest.raises(DataError, match=r"data\.bin cannot be written: No space left on device; free"):
        preprocess([tmp_path / "a.txt"], model, tmp_path / "data")
    assert os.listdir(tmp_path) == ["a.txt"]


def test_other_write_errors(model: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("abc " * 50_000)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(DataError, match="File too large"):
            preprocess([tmp_path / "a.txt"], model, tmp_path / "data")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert os.listdir(tmp_path) == ["a.txt"]


def test_a_json_file_of_the_users_is_not_overwritten(model: Path, tmp_path: Path) -> None:
    (tmp_path / "data.json").write_bytes(jsonl(DOCUMENTS))
    with pytest.raises(DataError, match=r"data\.json exists and is no summary"):
        preprocess([tmp_path / "data.json"], model, tmp_path / "data")
    assert (tmp_path / "data.json").read_bytes() == jsonl(DOCUMENTS)


def test_a_tokenizer_without_an_end_of_document(tmp_path: Path) -> None:
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"x": 0, "[UNK]": 1}, "[UNK]"))
    words.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(DataError, match="has no end-of-document token"):
        preprocess([tmp_path / "a.txt"], tmp_path, tmp_path / "data")
    assert preprocess([tmp_path / "a.txt"], tmp_path, tmp_path / "data", append_eod=False).tokens == 1
