"""Context parallel ranks share attention equally wherever the light tokens lie."""

from __future__ import annotations

import pytest

from chiar_megatron.config.schema import ParallelConfig, RouterConfig
from tests.parallel.harness import run_ranks
from tests.parallel.parity_cases import OFF, make_case
from tests.parallel.workers_context import Comparison

RANKS, BATCH, SEQUENCE, HEADS = 2, 2, 96, 4
TOKENS = BATCH * SEQUENCE
LIGHT = {
    "all on the first rank": TOKENS // 2,
    "all on the last rank": TOKENS // 2,
    "none": 0,
    "every token": TOKENS,
}
# By name: keys of all or of light tokens; 64 rows, or as many as there are light tokens.
CONFIGS = {
    f"{keys}, {'64 rows' if target else 'exact'}": make_case(
        RouterConfig(kind="learned", keys_values=keys, target=target, threshold=0.0),
        OFF,
        schedule="R",
        seq_length=SEQUENCE,
        num_query_groups=2 if keys == "all" else 1,
    )
    for keys in ("all", "routed")
    for target in (0.25, None)
}
RUNS = [(name, place) for name in CONFIGS for place in LIGHT]


@pytest.fixture(scope="module")
def ranks() -> list[dict[tuple[str, str], Comparison]]:
    args = {"configs": CONFIGS, "parallel": ParallelConfig(context_parallel_size=RANKS)}
    return run_ranks("tests.parallel.workers_context:skewed", RANKS, args, 240)


@pytest.mark.parametrize(("name", "place"), RUNS)
def test_losses_and_gradients_are_those_of_one_process(ranks, name, place):
    for rank in ranks:
        assert rank[name, place].largest_error < 1e-5


@pytest.mark.parametrize(("name", "place"), RUNS)
def test_every_rank_attends_equally(ranks, name, place):
    rows = 64 if "64" in name else LIGHT[place]
    used = min(rows, LIGHT[place])
    keys = rows if name.startswith("routed") else TOKENS
    for rank in ranks:
        assert rank[name, place].work_of_one == [(rows, HEADS, keys, used)]
        assert rank[name, place].work == [(rows, HEADS // RANKS, keys, used)]
        assert rank[name, place].overflows == (LIGHT[place] - used,) * 2
