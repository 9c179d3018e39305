"""Every layout trains on the same samples in the same step, read ahead or not."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from chiar_megatron.config.schema import DataConfig, ModelConfig, RunConfig, TrainingConfig
from chiar_megatron.data.dataset import TokenBatch, TokenStream, build_streams
from chiar_megatron.data.loader import (
    BatchLayout,
    evaluation_batches,
    micro_batches,
    num_evaluation_batches,
    read_ahead,
)
from chiar_megatron.errors import ConfigError

SEQ, GLOBAL_BATCH, STEPS = 4, 8, 6


@pytest.fixture(scope="module")
def streams(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TokenStream]:
    folder = tmp_path_factory.mktemp("data")
    for name, documents in (("train", 20), ("validation", 11)):
        builder = IndexedDatasetBuilder(f"{folder}/{name}.bin", dtype=np.int32)
        for i in range(documents):
            builder.add_document(np.arange(i * 7, i * 7 + 7), [7])
        builder.finalize(f"{folder}/{name}.idx")
    config = RunConfig(
        run_dir=str(folder / "run"),
        model=ModelConfig(seq_length=SEQ, vocab_size=1000),
        data=DataConfig(train=(f"{folder}/train",), validation=(f"{folder}/validation",)),
        training=TrainingConfig(steps=STEPS, global_batch_size=GLOBAL_BATCH),
    )
    built = build_streams(config)
    assert built.train is not None
    return {"train": built.train, "validation": built.validation["validation"]}


def layouts(micro_batch_size: int, replicas: int) -> list[BatchLayout]:
    return [BatchLayout(GLOBAL_BATCH, micro_batch_size, rank, replicas) for rank in range(replicas)]


def assert_same(left: TokenBatch, right: TokenBatch) -> None:
    assert torch.equal(left.tokens_BS, right.tokens_BS)
    assert torch.equal(left.labels_BS, right.labels_BS)
    assert torch.equal(left.loss_mask_BS, right.loss_mask_BS)
    assert torch.equal(left.sample_ids_B, right.sample_ids_B)


@pytest.mark.parametrize("replicas", [1, 2, 4])
@pytest.mark.parametrize("micro_batch_size", [1, 2])
def test_every_layout_gives_the_same_global_batch(
    streams: dict[str, TokenStream], micro_batch_size: int, replicas: int
) -> None:
    (whole_layout,) = layouts(GLOBAL_BATCH, 1)
    for step in range(STEPS):
        (whole,) = micro_batches(streams["train"], step, whole_layout)
        assert whole.sample_ids_B.tolist() == list(range(step * GLOBAL_BATCH, (step + 1) * GLOBAL_BATCH))
        parts = [
            list(micro_batches(streams["train"], step, one)) for one in layouts(micro_batch_size, replicas)
        ]
        # micro-batch by micro-batch, and within it replica by replica
        in_order = [part for micro_batch in zip(*parts, strict=True) for part in micro_batch]
        assert torch.equal(torch.cat([part.tokens_BS for part in in_order]), whole.tokens_BS)
        assert torch.equal(torch.cat([part.sample_ids_B for part in in_order]), whole.sample_ids_B)


@pytest.mark.parametrize("num_workers", [0, 1, 3])
def test_reading_ahead_changes_nothing(streams: dict[str, TokenStream], num_workers: int) -> None:
    layout = layouts(2, 2)[1]
    ahead = list(read_ahead(streams["train"], layout, 2, STEPS, num_workers))
    assert len(ahead) == STEPS - 2
    for step, batches in enumerate(ahead, start=2):
        for left, right in zip(batches, micro_batches(streams["train"], step, layout), strict=True):
            assert_same(left, right)


def test_reading_ahead_may_be_left_early_and_reports_errors(streams: dict[str, TokenStream]) -> None:
    layout = layouts(2, 2)[0]
    started = read_ahead(streams["train"], layout, 0, STEPS, 2)
    next(started)
    started.close()  # type: ignore[attr-defined]
    with pytest.raises(IndexError, match="sample 48 of a stream of 48"):
        list(read_ahead(streams["train"], layout, 0, STEPS + 1, 2))


@pytest.mark.parametrize("replicas", [1, 2, 4])
def test_evaluation_sees_each_sample_once(streams: dict[str, TokenStream], replicas: int) -> None:
    stream = streams["validation"]
    assert len(stream) == 19  # (77 - 1) // 4: two whole batches and three samples
    assert num_evaluation_batches(stream, 10, layouts(2, replicas)[0]) == 3
    assert num_evaluation_batches(stream, 2, layouts(2, replicas)[0]) == 2
    ids: list[int] = []
    counted = 0.0
    for layout in layouts(2, replicas):
        batches = list(evaluation_batches(stream, 10, layout))
        assert len(batches) == 3 * layout.num_micro_batches, "every replica does as many passes"
        ids += [i for batch in batches for i in batch.sample_ids_B.tolist()]
        counted += sum(float(batch.loss_mask_BS.sum()) for batch in batches)
    assert sorted(ids) == [-1] * 5 + list(range(19))
    assert counted == 19 * SEQ


def test_a_layout_that_does_not_divide_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"training\.global_batch_size 8 is not a multiple of .* 3 × 2 replicas"
    ):
        BatchLayout(8, 3, 0, 2)
