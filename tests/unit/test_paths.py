"""Which recipes' steps would be replayed as CUDA graphs, and what is said of the others."""

from __future__ import annotations

from typing import Any

import pytest

from chiar_megatron.config.load import config_from_dict, resolve_config
from chiar_megatron.model import build
from chiar_megatron.runtime.distributed import single_process_world
from chiar_megatron.runtime.paths import why_launched, would_replay

TP, CP, PP = (f"parallel.{kind}_parallel_size" for kind in ("tensor_model", "context", "pipeline_model"))
OVERLAPPED = {"parallel.distributed_optimizer": True, "parallel.overlap_grad_reduce": True}
FULL = {"training.recompute": "full"}


def reason(fields: dict[str, Any]) -> str | None:
    given = {"model.preset": "tiny", "model.router.target": 0.5, "model.dropout": 0.0, **fields}
    config = resolve_config(config_from_dict(given, "test"), vocab_size=100, eod_token=0)
    assert would_replay(config) == (why_launched(config) is None)
    return why_launched(config)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {TP: 2, "parallel.sequence_parallel": True, "model.dropout": 0.1},
        {CP: 2},
        {PP: 2},
        {PP: 2, "parallel.virtual_pipeline_model_parallel_size": 2},
        OVERLAPPED | {"parallel.overlap_param_gather": True},
        {TP: 2, **OVERLAPPED},
        {PP: 2, **OVERLAPPED},
        FULL,
        {"model.router.target": None, "model.schedule": "A*4"},
        {"model.router.target": None, "model.router.dispatch": "dense"},
    ],
)
def test_replayed(fields: dict[str, Any]) -> None:
    assert reason(fields) is None


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"runtime.cuda_graph": False}, "cuda_graph"),
        ({"model.router.target": None}, "rows vary"),
        ({"model.router.capacity": "none"}, "rows vary"),
        ({"runtime.record_decisions": "somewhere"}, "recorded"),
        (FULL | {"model.dropout": 0.1}, "dropout"),
        ({"training.deterministic": True}, "deterministic"),
    ],
)
def test_launched_by_the_host(fields: dict[str, Any], word: str) -> None:
    assert word in (reason(fields) or "")


@pytest.mark.parametrize("replayed", [False, True])
def test_stages_wait_for_the_device_only_outside_a_graph(
    replayed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """megatron-core would, after every exchange; a graph cannot hold that. What decides needs a GPU."""
    monkeypatch.setattr(build, "replays_steps", lambda *_: replayed)
    config = resolve_config(config_from_dict({"model.preset": "tiny"}, "test"), vocab_size=100, eod_token=0)
    model = build.build_model(config, single_process_world("cpu"))
    assert model.config.batch_p2p_sync is not replayed
