"""Streams: every sample is the text it should be, and where it stands depends on nothing it should not.

Most files here hold the numbers 0, 1, 2, … as tokens, so that a sample shows where it was cut from.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from chiar_megatron.config.schema import DataConfig, ModelConfig, RunConfig, TrainingConfig
from chiar_megatron.data.components import cached_folder
from chiar_megatron.data.dataset import (
    PADDING,
    Streams,
    TokenStream,
    build_streams,
    parse_blend,
    parse_skipped,
    read_streams,
)
from chiar_megatron.data.preprocess import preprocess
from chiar_megatron.data.tokenizer import load_tokenizer, train_tokenizer
from chiar_megatron.errors import ConfigError, DataError

SEQ = 8


def write_numbers(prefix: Path, documents: int, length: int = 10, first: int = 0) -> str:
    """`documents` documents of `length` tokens, counting on from `first`."""
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.int32)
    for i in range(documents):
        tokens = np.arange(first + i * length, first + (i + 1) * length)
        builder.add_document(tokens, [length])
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


def config_for(folder: Path, data: DataConfig, steps: int = 5, seed: int = 1, **model: object) -> RunConfig:
    return RunConfig(
        run_dir=str(folder / "run"),
        model=ModelConfig(**{"seq_length": SEQ, "vocab_size": 1_000_000, **model}),  # type: ignore[arg-type]
        data=data,
        training=TrainingConfig(steps=steps, global_batch_size=4, seed=seed),
    )


def build(config: RunConfig) -> Streams:
    return build_streams(config)


def training_tokens(config: RunConfig) -> torch.Tensor:
    stream = build(config).train
    assert stream is not None
    return stream.read(range(len(stream))).tokens_BS


def all_tokens(stream: TokenStream) -> set[int]:
    return set(stream.read(range(len(stream))).tokens_BS.flatten().tolist())


def test_one_epoch_holds_each_token_once(tmp_path: Path) -> None:
    config = config_for(tmp_path, DataConfig(train=(write_numbers(tmp_path / "a", 40),)), steps=12)
    stream = build(config).train
    assert stream is not None and len(stream) == 48
    batch = stream.read(range(48))  # 400 tokens make 49 samples: (400 - 1) // 8
    tokens = batch.tokens_BS.flatten().tolist()
    assert len(set(tokens)) == 48 * SEQ, "no token occurs twice within an epoch"
    follows = batch.labels_BS == batch.tokens_BS + 1
    ends = batch.tokens_BS % 10 == 9  # after a document's last token comes another document's first
    assert torch.equal(follows | ends, torch.ones_like(follows))
    assert (batch.labels_BS[ends] % 10 == 0).all()
    assert torch.equal(batch.labels_BS[:, :-1], batch.tokens_BS[:, 1:])
    assert batch.tokens_BS.dtype == batch.labels_BS.dtype == torch.int64
    assert batch.loss_mask_BS.dtype == torch.float32 and batch.loss_mask_BS.sum() == 48 * SEQ
    assert batch.sample_ids_B.tolist() == list(range(48))
    assert batch.document_ids_BS is None
    assert tokens != sorted(tokens), "samples are shuffled"


def test_a_longer_run_begins_with_the_shorter_one(tmp_path: Path) -> None:
    data = DataConfig(
        train=("0.7", write_numbers(tmp_path / "a", 9), "0.3", write_numbers(tmp_path / "b", 7))
    )
    short = training_tokens(config_for(tmp_path / "1", data, steps=3))
    long = training_tokens(config_for(tmp_path / "2", data, steps=40))
    assert torch.equal(long[: len(short)], short)
    again = training_tokens(config_for(tmp_path / "1", data, steps=40))  # the same folder, extended
    assert torch.equal(long, again)


def test_epochs_and_seeds_are_shuffled_differently(tmp_path: Path) -> None:
    data = DataConfig(train=(write_numbers(tmp_path / "a", 40),))
    tokens = training_tokens(config_for(tmp_path, data, steps=40))
    first, second = tokens[:49], tokens[49:98]
    assert not torch.equal(first, second)
    assert len(set(second.flatten().tolist())) == 49 * SEQ
    other_seed = training_tokens(config_for(tmp_path, data, steps=40, seed=2))[:49]
    assert not torch.equal(other_seed, first) and not torch.equal(other_seed, second)


def test_order_of_reading_does_not_matter(tmp_path: Path) -> None:
    config = config_for(tmp_path, DataConfig(train=(write_numbers(tmp_path / "a", 9),)), steps=30)
    stream = build(config).train
    assert stream is not None
    forward = stream.read(range(120))
    backward = stream.read(range(119, -1, -1))
    assert torch.equal(backward.tokens_BS.flip(0), forward.tokens_BS)
    assert torch.equal(stream.read([7, 100, 7]).tokens_BS, forward.tokens_BS[[7, 100, 7]])
    for outside in (120, -2):
        with pytest.raises(IndexError):
            stream.read([outside])


@pytest.mark.parametrize(
    ("weights", "expected"), [(("7", "3"), 0.7), (("0.02", "0.98"), 0.02), (None, 30 / (30 + 90))]
)
def test_blend_shares(tmp_path: Path, weights: tuple[str, str] | None, expected: float) -> None:
    a, b = write_numbers(tmp_path / "a", 30), write_numbers(tmp_path / "b", 90, first=10_000)
    train = (a, b) if weights is None else (weights[0], a, weights[1], b)
    tokens = training_tokens(config_for(tmp_path, DataConfig(train=train), steps=250))
    from_a = (tokens[:, 0] < 10_000).double()
    running = from_a.cumsum(0)
    wanted = expected * torch.arange(1, len(tokens) + 1)
    assert (running - wanted).abs().max() <= 1.01, (
        "the blend keeps its shares at every point, not only at last"
    )


def test_skipped_ranges_close_up(tmp_path: Path) -> None:
    prefix = write_numbers(tmp_path / "a", 9)
    whole = training_tokens(config_for(tmp_path, DataConfig(train=(prefix,)), steps=20))
    skip = DataConfig(train=(prefix,), skip_samples=("30:40", "3:5", "4:9", "0:1"))
    stream = build(config_for(tmp_path, skip, steps=12)).train
    assert stream is not None and len(stream) == 48
    batch = stream.read(range(48))
    left = [p for p in range(80) if not (p == 0 or 3 <= p < 9 or 30 <= p < 40)][:48]
    assert batch.sample_ids_B.tolist() == left
    assert torch.equal(batch.tokens_BS, whole[left])


def test_blends_reach_beyond_what_is_skipped(tmp_path: Path) -> None:
    prefixes = (write_numbers(tmp_path / "a", 9), write_numbers(tmp_path / "b", 9))
    whole = training_tokens(config_for(tmp_path / "1", DataConfig(train=prefixes), steps=20))
    skip = DataConfig(train=prefixes, skip_samples=("0:60",))
    assert torch.equal(training_tokens(config_for(tmp_path / "2", skip, steps=5)), whole[60:])


def test_splits_are_disjoint_and_by_document(tmp_path: Path) -> None:
    data = DataConfig(train=(write_numbers(tmp_path / "a", 100),), split="80,15,5")
    streams = build(config_for(tmp_path, data, steps=100))
    assert streams.train is not None
    train = all_tokens(streams.train)
    validation, test = all_tokens(streams.validation["a"]), all_tokens(streams.test["a"])
    assert train <= set(range(800)) and len(train) >= 790
    assert validation <= set(range(800, 950)) and len(validation) == 149 // SEQ * SEQ
    assert test <= set(range(950, 1000)) and test


def test_validation_files_are_streams_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    files = [write_numbers(tmp_path / name, 20, first=first) for name, first in (("a", 0), ("b", 500))]
    same_name = write_numbers(tmp_path / "x" / "b", 30)
    data = DataConfig(
        train=(files[0],), validation=("1", files[0], "2", files[1]), test=(files[1], same_name)
    )
    streams = build(config_for(tmp_path, data))
    assert sorted(streams.validation) == ["a", "b"]
    assert sorted(streams.test) == sorted([files[1], same_name])
    assert len(streams.validation["b"]) == 199 // SEQ
    assert all_tokens(streams.validation["b"]) <= set(range(500, 700))
    # what runs are compared on does not depend on their seed
    other = build(config_for(tmp_path, data, seed=9)).validation["b"]
    assert torch.equal(other.read(range(24)).tokens_BS, streams.validation["b"].read(range(24)).tokens_BS)


def test_padding_counts_for_nothing(tmp_path: Path) -> None:
    stream = build(config_for(tmp_path, DataConfig(train=(write_numbers(tmp_path / "a", 9),)))).train
    assert stream is not None
    batch = stream.read([2, PADDING])
    assert batch.loss_mask_BS.sum(dim=1).tolist() == [SEQ, 0]
    assert batch.sample_ids_B.tolist() == [2, PADDING]


def test_documents_are_numbered_within_a_sample(tmp_path: Path) -> None:
    builder = IndexedDatasetBuilder(f"{tmp_path}/a.bin", dtype=np.int32)
    for length in (3, 1, 5, 2, 9, 4):
        builder.add_document(np.array([5] * (length - 1) + [1]), [length])
    builder.finalize(f"{tmp_path}/a.idx")
    data = DataConfig(train=(f"{tmp_path}/a",), eod_token=1)
    stream = build(config_for(tmp_path, data, mask_documents=True)).train
    assert stream is not None
    batch = stream.read(range(20))
    assert batch.document_ids_BS is not None and batch.document_ids_BS.dtype == torch.int64
    for tokens, documents in zip(batch.tokens_BS.tolist(), batch.document_ids_BS.tolist(), strict=True):
        assert documents == [tokens[:i].count(1) for i in range(SEQ)]
    assert batch.loss_mask_BS.min() == 1
    with pytest.raises(ConfigError, match="mask_documents needs an end-of-document token"):
        build(config_for(tmp_path, DataConfig(train=(f"{tmp_path}/a",)), mask_documents=True))


def test_other_ranks_read_what_the_builder_wrote(tmp_path: Path) -> None:
    data = DataConfig(train=("1", write_numbers(tmp_path / "a", 9), "2", write_numbers(tmp_path / "b", 20)))
    config = config_for(tmp_path, data)
    with pytest.raises(DataError, match="rank 0 writes it"):
        read_streams(config)
    built, late = build(config), read_streams(config)
    assert late.train is not None and built.train is not None
    assert torch.equal(late.train.read(range(20)).tokens_BS, built.train.read(range(20)).tokens_BS)


def test_the_cache_is_whole_or_absent(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "half").touch()
        raise OSError(28, "No space left on device")

    target = tmp_path / "cache" / "epoch"
    with pytest.raises(DataError, match=r"cache/epoch cannot be written: No space left"):
        cached_folder(target, fail, build=True)
    assert list(target.parent.iterdir()) == []

    def build(folder: Path) -> None:
        (folder / "whole").touch()
        # Another run builds it meanwhile.
        cached_folder(target, lambda other: (other / "whole").touch(), build=True)

    cached_folder(target, build, build=True)
    assert list(target.parent.rglob("*")) == [target, target / "whole"]
    cached_folder(target, fail, build=True)


def test_new_data_under_an_old_name_is_noticed(tmp_path: Path) -> None:
    config = config_for(tmp_path, DataConfig(train=(write_numbers(tmp_path / "a", 9),)))
    assert training_tokens(config).max() < 100
    write_numbers(tmp_path / "a", 9, length=12, first=5000)
    assert training_tokens(config).min() >= 5000


def test_data_that_does_not_fit_is_named(tmp_path: Path) -> None:
    prefix = write_numbers(tmp_path / "a", 9)

    def message(**fields: object) -> str:
        model = {key: fields.pop(key) for key in ("seq_length", "vocab_size") if key in fields}
        data = DataConfig(**{"train": (prefix,), **fields})  # type: ignore[arg-type]
        with pytest.raises((DataError, ConfigError)) as caught:
            build(config_for(tmp_path, data, **model))
        return str(caught.value)

    assert "gives 90 tokens (9 of 9 documents), too few" in message(seq_length=90)
    assert "model.seq_length 90" in message(seq_length=90)
    assert "data.train" in message(split="90,10,0", seq_length=20) and "1 of 9" in message(
        split="90,10,0", seq_length=20
    )
    assert "holds token id 89, but model.vocab_size is 89" in message(vocab_size=89)
    assert message(train=("no",)).startswith(
        "data.train: no.bin does not exist; make it by `chiar preprocess"
    )
    assert "a.bin.bin does not exist; leave .bin off" in message(train=(prefix + ".bin",))
    assert "names files of its own" in message(validation=(prefix,), split="9,1,0")
    assert "three shares" in message(split="9,1")
    assert "leaves no documents" in message(split="0,1,0")
    with open(prefix + ".bin", "ab") as file:
        file.write(b"xx")
    assert "a.bin has 362 bytes where" in message()
    index = Path(prefix + ".idx").read_bytes()
    Path(prefix + ".idx").write_bytes(index[:-1])
    assert f"a.idx is torn: it has {len(index) - 1} bytes of {len(index)}" in message()
    Path(prefix + ".idx").write_bytes(b"nonsense")
    assert "a.idx is not a Megatron index" in message()
    write_numbers(Path(prefix), 0)
    assert "a.idx lists no tokens" in message()


def test_the_summary_tells_the_largest_token_and_the_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("".join(f"word{i} and another word {i}\n" for i in range(300)))
    models = [train_tokenizer([tmp_path / "a.txt"], size, tmp_path / f"t{size}") for size in (290, 300)]
    summary = preprocess([tmp_path / "a.txt"], models[1], tmp_path / "a")
    data = DataConfig(train=(f"{tmp_path}/a",), tokenizer=str(models[1]))
    config = config_for(tmp_path, data, vocab_size=None, mask_documents=True)
    assert build(config).train is not None
    with pytest.raises(
        DataError, match=f"holds token id {summary.max_token_id}, but model.vocab_size is 270"
    ):
        build(config_for(tmp_path, data, vocab_size=270))
    with pytest.raises(DataError, match="was made with another tokenizer"):
        build(config_for(tmp_path, DataConfig(train=data.train, tokenizer=str(models[0]))))
    assert json.loads((tmp_path / "a.json").read_text())["tokenizer_vocab_size"] == 300
    assert load_tokenizer(models[1]).eod == 1


@pytest.mark.parametrize("entries", [("1", "a", "b"), ("1", "a", "-1", "b"), ("0", "a"), ("1",), ("a", "a")])
def test_malformed_blends(entries: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match=r"data\.train"):
        parse_blend(entries, "data.train")


def test_blends_are_read() -> None:
    assert parse_blend(("0.7", "a", "3e-1", "b"), "f") == (["a", "b"], [0.7, 0.3])
    assert parse_blend(("a", "b", "7"), "f") == (["a", "b", "7"], None)


@pytest.mark.parametrize("text", ["5", "5:5", "9:5", "-1:5", "a:b", "1:2:3"])
def test_malformed_ranges(text: str) -> None:
    with pytest.raises(ConfigError, match=r"data\.skip_samples .* is no range"):
        parse_skipped((text,))


def test_ranges_are_merged() -> None:
    assert parse_skipped(("7:9", "0:2", "1:3", "9:10")) == [(0, 3), (7, 10)]


@pytest.fixture
def in_new_process(tmp_path: Path) -> Callable[[str], str]:
    def run(code: str) -> str:
        return subprocess.run(
            [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True
        ).stdout

    return run


def test_workers_need_neither_torch_nor_megatron(in_new_process: Callable[[str], str]) -> None:
    """Every preprocessing worker imports this; torch and megatron-core would cost it seconds."""
    code = (
        "import sys, chiar_megatron.data.preprocess; print('torch' in sys.modules, 'megatron' in sys.modules)"
    )
    assert in_new_process(code) == "False False\n"
