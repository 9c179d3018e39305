"""Random streams as a function of seed, step and place, also where a CUDA graph holds them."""

from __future__ import annotations

import pytest
import torch
from megatron.core.tensor_parallel import random

from chiar_megatron.runtime.distributed import (
    MODEL_PARALLEL_STREAM,
    seed_random_streams,
    single_process_world,
)


def test_a_stream_that_a_graph_holds_is_seeded_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    world = single_process_world("cpu")
    held = torch.Generator()
    monkeypatch.setattr(random.get_cuda_rng_tracker(), "states_", {MODEL_PARALLEL_STREAM: held})
    drawn = []
    for step in (3, 4, 3):
        seed_random_streams(1, step, world)
        assert random.get_cuda_rng_tracker().get_states()[MODEL_PARALLEL_STREAM] is held
        drawn.append((torch.rand(1, generator=held).item(), torch.rand(1).item()))
    first, second, again = drawn
    assert first == again and first[0] != second[0] and first[0] != first[1]
