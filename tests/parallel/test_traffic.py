"""The ledger of bytes against what the collectives of single layers were given, and against the twin."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from chiar_megatron.config.schema import ParallelConfig, RouterConfig, RunConfig
from chiar_megatron.model.accounting import full_attention_twin
from chiar_megatron.model.traffic import traffic_per_micro_batch
from tests.parallel.harness import run_ranks
from tests.parallel.parity_cases import OFF, RBF, make_case, pooling

FLOAT32 = 4
LAYOUTS = {
    "TP=4": ParallelConfig(tensor_model_parallel_size=4),
    "TP=4+SP": ParallelConfig(tensor_model_parallel_size=4, sequence_parallel=True),
    "CP=4": ParallelConfig(context_parallel_size=4),
    "TP=2 CP=2": ParallelConfig(tensor_model_parallel_size=2, context_parallel_size=2),
    "TP=2+SP CP=2": ParallelConfig(
        tensor_model_parallel_size=2, sequence_parallel=True, context_parallel_size=2
    ),
}
# 1,024 tokens in a micro-batch; ρ = 1/8 takes 192 rows, 1/2 takes 576.
_SIZES: dict[str, Any] = dict(seq_length=512, num_query_groups=4, schedule="D R A")
MODELS = {
    "keys of all, 1/2": make_case(RouterConfig(kind="entropy", target=0.5), OFF, **_SIZES),
    "keys of all, 1/8": make_case(RouterConfig(kind="learned", target=0.125), pooling("batch"), **_SIZES),
    "routed keys, 1/2": make_case(
        RouterConfig(kind="random", target=0.5, keys_values="routed"), pooling("causal"), **_SIZES
    ),
    "routed keys, 1/8": make_case(
        RouterConfig(kind="entropy_gated", target=0.125, keys_values="routed"), OFF, norm="pre", **_SIZES
    ),
    "dense, routed keys": make_case(
        RouterConfig(kind="learned", dispatch="dense", keys_values="routed"), OFF, **_SIZES
    ),
    "soft, RBF": make_case(RouterConfig(kind="soft", operators=RBF, collapse_weight=0.5), OFF, **_SIZES),
}
RUNS = [(layout, model) for layout in LAYOUTS for model in MODELS]


def config_of(layout: str, model: str) -> RunConfig:
    return replace(MODELS[model], parallel=LAYOUTS[layout])


@pytest.fixture(scope="module")
def counted() -> list[dict[str, list[dict[str, Any]]]]:
    """By rank, by run, by layer."""
    configs = {f"{layout}: {model}": config_of(layout, model) for layout, model in RUNS}
    return run_ranks("tests.parallel.workers_traffic:sent_by_layers", 4, {"configs": configs}, 240)


@pytest.mark.parametrize(("layout", "model"), RUNS)
def test_the_ledger_has_every_byte(counted, layout, model):
    config = config_of(layout, model)
    batch = config.training.micro_batch_size
    ledger = traffic_per_micro_batch(config.model, config.parallel, batch, element_bytes=FLOAT32)
    for rank, runs in enumerate(counted):
        for layer, sent in enumerate(runs[f"{layout}: {model}"], start=1):
            assert (sent["forward"], sent["backward"]) == ledger.total(layer), (rank, layer)


@pytest.mark.parametrize("layout", ["TP=4+SP", "TP=2+SP CP=2"])
def test_hidden_states_are_gathered_once_and_scores_alone_decide(counted, layout):
    """Keys of all tokens: one gathering serves keys, values and queries; a float a token the decision."""
    config = config_of(layout, "keys of all, 1/2")
    tokens = config.training.micro_batch_size * config.model.seq_length
    hidden = FLOAT32 * config.model.hidden_size * tokens // config.parallel.context_parallel_size
    for runs in counted:
        calls = runs[f"{layout}: keys of all, 1/2"][1]["calls"]
        gathers = [size for name, size in calls if name == "_allgather_base_"]
        assert sorted(gathers) == [FLOAT32 * tokens, hidden, hidden]  # the third: the feed-forward layer's


def bytes_of_attention(layout: str, model: str) -> float:
    """Of the R layer, but for its feed-forward part; forward and backward."""
    config = config_of(layout, model)
    ledger = traffic_per_micro_batch(config.model, config.parallel, config.training.micro_batch_size)
    return sum(ledger.total(2)) - sum(ledger.total(2, ["feed_forward"]))


# Four times fewer light tokens than 1/2 take a third of the rows. Context parallel ranks send as many rows as
# they hold tokens, unless there are fewer in all; with sequence parallelism all tokens are gathered at 1/2.
ROUTED_KEYS = {"TP=4": 0.34, "TP=4+SP": 0.39, "CP=4": 0.76, "TP=2 CP=2": 0.39, "TP=2+SP CP=2": 0.58}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_routed_layer_moves_less_than_the_twins(layout):
    config = config_of(layout, "keys of all, 1/2")
    twin = traffic_per_micro_batch(
        full_attention_twin(config.model), config.parallel, config.training.micro_batch_size
    )
    of_twin = sum(twin.total(2)) - sum(twin.total(2, ["feed_forward"]))
    by_model = {model: bytes_of_attention(layout, model) for model in MODELS if "1/" in model}
    assert max(by_model.values()) < 1.01 * of_twin + 4 * 1024  # scores: a float a token
    assert by_model["keys of all, 1/8"] < by_model["keys of all, 1/2"]
    assert by_model["routed keys, 1/8"] < ROUTED_KEYS[layout] * by_model["routed keys, 1/2"]
