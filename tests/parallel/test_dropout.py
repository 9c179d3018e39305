"""Dropout under tensor and context parallelism: copies drop alike, all else is dropped independently."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from chiar_megatron.config.schema import ParallelConfig
from tests.parallel.harness import run_ranks
from tests.parallel.parity_cases import CASES

LAYOUTS = {
    "TP=2": ParallelConfig(tensor_model_parallel_size=2),
    "TP=2+SP": ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True),
    "CP=2": ParallelConfig(context_parallel_size=2),
    "DP=2": ParallelConfig(),
}


@pytest.fixture(scope="module")
def probes():
    config = CASES["learned, pre, SwiGLU, untied"]
    # Densely, so that every sequence's first token has its heads in every layer.
    router = replace(config.model.router, dispatch="dense")
    config = replace(config, model=replace(config.model, dropout=0.3, router=router))
    return run_ranks("tests.parallel.workers_dropout:probe", 2, {"config": config, "layouts": LAYOUTS})


def places(probe, *kinds: str) -> list[str]:
    found = [place for place in probe if place.split()[0] in kinds]
    assert found
    return found


def dropped(tensor: torch.Tensor) -> torch.Tensor:
    return tensor == 0


@pytest.mark.parametrize("layout", LAYOUTS)
def test_masks_are_a_function_of_the_step(probes, layout):
    for rank in probes:
        first, again, next_step = rank[layout]
        for place, tensor in first.items():
            assert torch.equal(tensor, again[place]), place
        for place in places(first, "embedding", "inner", "output"):
            assert 0.2 < dropped(first[place]).float().mean() < 0.4, place
            assert not torch.equal(dropped(first[place]), dropped(next_step[place])), place
        for place in places(first, "heads", "layer"):
            assert not torch.equal(first[place], next_step[place]), place


def test_replicated_values_stay_equal_without_sequence_parallelism(probes):
    (first, *_), (other, *_) = (rank["TP=2"] for rank in probes)
    for place in places(first, "embedding", "output", "layer"):
        assert torch.equal(first[place], other[place]), place


def test_columns_and_heads_have_masks_of_their_own(probes):
    """Equal masks on both ranks would drop the two halves of a layer together."""
    for layout in ("TP=2", "TP=2+SP", "CP=2"):
        (first, *_), (other, *_) = (rank[layout] for rank in probes)
        for place in places(first, "inner"):
            agree = (dropped(first[place]) == dropped(other[place])).float().mean()
            assert 0.5 < agree < 0.66, place  # of independent masks: 0.7² + 0.3² = 0.58
        one_key = [torch.cat([rank[p][0, :, ::8] for p in places(rank, "heads")]) for rank in (first, other)]
        assert one_key[0].shape == (48, 2)  # 3 layers with 16 sequences, by 2 heads of size 8
        agree = (dropped(one_key[0]) == dropped(one_key[1])).float().mean()
        assert 0.3 < agree < 0.85


@pytest.mark.parametrize("layout", ["TP=2+SP", "CP=2", "DP=2"])
def test_parts_of_the_sequence_and_replicas_have_masks_of_their_own(probes, layout):
    (first, *_), (other, *_) = (rank[layout] for rank in probes)
    for place in places(first, "embedding", "output"):
        agree = (dropped(first[place]) == dropped(other[place])).float().mean()
        assert 0.5 < agree < 0.66, place
