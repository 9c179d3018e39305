"""Tokenizers give every text back, are trained alike every time, and say what is wrong with their input."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import tokenizers

from chiar_megatron.data.tokenizer import load_tokenizer, train_tokenizer
from chiar_megatron.errors import DataError

AWKWARD = [
    "",
    " ",
    "\n",
    "  two  spaces and a trailing one ",
    "tabs\tand\n\n\nnewlines\r\nof both kinds\n",
    "naïve café — 漢字かな 한국어 עברית 😀👩‍👩‍👧",
    "the mark ▁ of SentencePiece ▁▁ itself▁",
    "</s> <s> <unk> <0x0A> <|endoftext|> ⁇",
    "e\u0301 is not \u00e9; \u00a0 \u3000 \u200b \ufeff \x00 \x7f",
    "ﬁ ² Å Ⅳ",  # what NFKC would rewrite
]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sentences of invented words: enough for a vocabulary of several hundred, the same every time."""
    rng = random.Random(0)
    syllables = ["ka", "lo", "mi", "ren", "tas", "vo", "shu", "pel", "dor", "qui"]
    words = ["".join(rng.choices(syllables, k=rng.randint(1, 4))) for _ in range(400)]
    lines = [" ".join(rng.choices(words, k=12)) + "." for _ in range(1500)]
    path = tmp_path_factory.mktemp("corpus") / "corpus.txt"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


@pytest.mark.parametrize("model_type", ["unigram", "bpe"])
def test_trained_tokenizer_gives_back_any_text(corpus: Path, tmp_path: Path, model_type: str) -> None:
    tokenizer = load_tokenizer(train_tokenizer([corpus], 500, tmp_path / "t", model_type))  # type: ignore[arg-type]
    assert tokenizer.vocab_size == 500
    assert tokenizer.eod == 1
    rng = random.Random(1)
    alphabet = list("ab \t\n▁é漢😀\x00\r\u00a0\u0301") + ["  ", "kalo", "</s>", "<0x0A>"]
    texts = AWKWARD + ["".join(rng.choices(alphabet, k=20)) for _ in range(500)]
    for text in texts:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.eod not in ids, "an end of document must not be smuggled in by text"


def test_training_is_deterministic(corpus: Path, tmp_path: Path) -> None:
    models = [train_tokenizer([corpus], 400, tmp_path / name, sample_sentences=500) for name in "ab"]
    assert models[0].read_bytes() == models[1].read_bytes()
    assert load_tokenizer(models[0]).sha256() == load_tokenizer(models[1]).sha256()


def test_training_learns_from_long_lines(tmp_path: Path) -> None:
    """SentencePiece alone would silently drop a line beyond 4192 bytes."""
    text = tmp_path / "one_line.txt"
    text.write_text("wonderful " * 2000, encoding="utf-8")
    tokenizer = load_tokenizer(train_tokenizer([text], 275, tmp_path / "t", "bpe"))
    assert len(tokenizer.encode(" wonderful" * 10)) < 50


@pytest.mark.parametrize("model_type", ["unigram", "bpe"])
def test_too_large_a_vocabulary_names_the_largest(corpus: Path, tmp_path: Path, model_type: str) -> None:
    with pytest.raises(
        DataError, match=r"--vocab-size 50000 is too large .* largest possible is \d+"
    ) as caught:
        train_tokenizer([corpus], 50_000, tmp_path / "t", model_type)  # type: ignore[arg-type]
    largest = int(str(caught.value).split("possible is ")[1].split(";")[0])
    assert not list(tmp_path.iterdir())
    model = train_tokenizer([corpus], largest, tmp_path / "t", model_type)  # type: ignore[arg-type]
    assert load_tokenizer(model).vocab_size == largest


def test_too_small_a_vocabulary_names_the_smallest(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"--vocab-size 100 is too small .* smallest possible is \d+"):
        train_tokenizer([corpus], 100, tmp_path / "t")


def test_training_on_nothing_or_on_a_bad_line_says_so(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text(" \n\n")
    with pytest.raises(DataError, match=r"no text in .*empty\.txt"):
        train_tokenizer([tmp_path / "empty.txt"], 300, tmp_path / "t")
    (tmp_path / "bad.jsonl").write_text('{"text": "good"}\n{"text": bad}\n')
    with pytest.raises(DataError, match=r"bad\.jsonl:2: not valid JSON"):
        train_tokenizer([tmp_path / "bad.jsonl"], 300, tmp_path / "t")


@pytest.fixture(scope="module")
def gpt2_folder(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    trainer = tokenizers.ByteLevelBPETokenizer()
    trainer.train([str(corpus)], vocab_size=500, special_tokens=["<|endoftext|>"], show_progress=False)
    folder = tmp_path_factory.mktemp("gpt2")
    trainer.save_model(str(folder))
    trainer.save(str(tmp_path_factory.mktemp("json") / "tokenizer.json"))
    return folder


def test_gpt2_files(gpt2_folder: Path) -> None:
    tokenizer = load_tokenizer(gpt2_folder)
    assert tokenizer.vocab_size == 500
    assert tokenizer.eod == json.loads((gpt2_folder / "vocab.json").read_text())["<|endoftext|>"]
    for text in AWKWARD:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.eod not in ids
    independent = tokenizers.ByteLevelBPETokenizer(
        str(gpt2_folder / "vocab.json"), str(gpt2_folder / "merges.txt")
    )
    assert tokenizer.encode("kalo ren  mi\n") == independent.encode("kalo ren  mi\n").ids


@pytest.mark.parametrize("as_folder", [True, False])
def test_hugging_face_file(gpt2_folder: Path, tmp_path: Path, as_folder: bool) -> None:
    bpe = tokenizers.ByteLevelBPETokenizer(str(gpt2_folder / "vocab.json"), str(gpt2_folder / "merges.txt"))
    bpe.add_special_tokens(["<|stop|>"])
    bpe.save(str(tmp_path / "tokenizer.json"))
    path = tmp_path if as_folder else tmp_path / "tokenizer.json"
    tokenizer = load_tokenizer(path)
    assert (tokenizer.vocab_size, tokenizer.eod) == (501, bpe.token_to_id("<|endoftext|>"))
    for text in ("kalo ren  mi\n", "naïve\t漢"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": {"content": "<|stop|>"}}')
    assert load_tokenizer(path).eod == 500


def test_what_is_no_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.model does not exist"):
        load_tokenizer(tmp_path / "none.model")
    with pytest.raises(DataError, match="holds neither tokenizer.json"):
        load_tokenizer(tmp_path)
    for name, kind in (
        ("x.model", "SentencePiece"),
        ("tokenizer.json", "Hugging Face"),
        ("x.txt", "known kind"),
    ):
        (tmp_path / name).write_text("nonsense")
        with pytest.raises(DataError, match=kind):
            load_tokenizer(tmp_path / name)
