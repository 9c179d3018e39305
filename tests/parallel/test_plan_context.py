"""Activations that `chiar plan` counts where ranks share a sequence, against what autograd keeps there."""

from __future__ import annotations

from typing import Any

import pytest

from chiar_megatron.config.load import config_from_dict, resolve_config
from chiar_megatron.config.schedule import parse_schedule
from chiar_megatron.config.schema import RunConfig
from chiar_megatron.planning.activations import ActivationModel
from tests.parallel.harness import run_ranks

RANKS = 2
CP, TP = "parallel.context_parallel_size", "parallel.tensor_model_parallel_size"
LAYOUTS: dict[str, dict[str, Any]] = {
    "CP=2": {CP: 2},
    "TP=2": {TP: 2},
    "TP=2+SP": {TP: 2, "parallel.sequence_parallel": True},
}
# Full attention (A), and with it routed layers that compute densely (R) or skip.
MODELS: dict[str, dict[str, Any]] = {
    "dense": {"model.router.kind": "random", "model.router.dispatch": "dense"},
    "keys of all, 1/4": {"model.router.kind": "random", "model.router.target": 0.25},
    "keys of all, 1/2, pre": {
        "model.router.kind": "learned", "model.router.target": 0.5, "model.norm": "pre",
    },
    "routed keys, 1/8": {
        "model.router.kind": "entropy", "model.router.target": 0.125, "model.router.keys_values": "routed",
    },
    "one key-value group": {"model.router.kind": "random", "model.router.target": 0.5, "groups": 1},
}  # fmt: skip
# One group cannot be parted over tensor-parallel ranks.
RUNS = [(layout, model) for layout in LAYOUTS for model in MODELS if "group" not in model or "CP" in layout]


def config_of(layout: str, model: str) -> RunConfig:
    fields = dict(MODELS[model])
    fields |= LAYOUTS[layout] | {"model.num_query_groups": fields.pop("groups", 4)}
    fields |= {
        "model.schedule": "R A",
        "model.hidden_size": 256,
        "model.num_attention_heads": 8,
        "model.vocab_size": 64,
        "model.seq_length": 256,
        "model.meta_router.enabled": False,
        "training.precision": "bf16",
        "training.micro_batch_size": 4,
    }
    return resolve_config(config_from_dict(fields), vocab_size=None, eod_token=None)


@pytest.fixture(scope="module")
def kept() -> list[dict[str, list[float]]]:
    """By rank, by run, by layer."""
    configs = {f"{layout}: {model}": config_of(layout, model) for layout, model in RUNS}
    return run_ranks("tests.parallel.workers_plan:kept_by_layers", RANKS, {"configs": configs}, 180)


@pytest.mark.parametrize(("layout", "model"), RUNS)
def test_activations_are_those_that_autograd_keeps(kept, layout, model):
    config = config_of(layout, model)
    planned = ActivationModel(config, compiled=False)
    for layers in kept:
        for kind, found in zip(
            parse_schedule(config.model.schedule), layers[f"{layout}: {model}"], strict=True
        ):
            layer = planned.layer(kind)
            assert layer.kept * planned.tokens + layer.constant == pytest.approx(found, rel=0.02), kind
