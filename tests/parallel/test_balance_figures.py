"""What a step tells of its balance, in real layouts of 4 processes, against every rank's recorded decisions;
and a real run's files, continued, with traces and alarms."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from chiar_megatron.config.schema import ParallelConfig
from chiar_megatron.metrics.jsonl import read_events, read_metrics
from chiar_megatron.metrics.traces import read_traces
from chiar_megatron.routing.balance import capacity_rows
from tests.parallel.harness import run_ranks
from tests.parallel.run_server import RunServer
from tests.parallel.tiny_run import recipe, write_data, write_recipe
from tests.parallel.workers_balance import Told
from tests.unit.tiny_models import tiny_config

STEPS, GLOBAL, MICRO, LENGTH = 4, 16, 2, 48
LAYOUTS = {
    "DP=4": ParallelConfig(),
    "DP=2 TP=2": ParallelConfig(tensor_model_parallel_size=2),
    "DP=2 TP=2+SP": ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True),
    "DP=2 PP=2": ParallelConfig(pipeline_model_parallel_size=2),
    "DP=2 PP=2 VPP=2": ParallelConfig(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2),
    "DP=2 CP=2": ParallelConfig(context_parallel_size=2),
    "DP=1 PP=2 TP=2+SP": ParallelConfig(
        tensor_model_parallel_size=2, pipeline_model_parallel_size=2, sequence_parallel=True
    ),
}


@pytest.fixture(scope="module")
def told() -> dict[str, list[Told]]:
    """Ranks' answers by layout."""
    config = tiny_config({"kind": "learned", "target": 0.5}, schedule="D R*2 R", seq_length=LENGTH)
    config = replace(
        config,
        training=replace(config.training, global_batch_size=GLOBAL, micro_batch_size=MICRO),
        logging=replace(config.logging, routing_traces=1),
    )
    arguments = {"config": config, "layouts": LAYOUTS, "steps": STEPS}
    answers = run_ranks("tests.parallel.workers_balance:tell", 4, arguments, 300)
    return {name: [answer[name] for answer in answers] for name in LAYOUTS}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_figures_are_those_of_the_recorded_decisions(told: dict[str, list[Told]], layout: str) -> None:
    ranks = told[layout]
    capacity = capacity_rows(tiny_config({"kind": "learned", "target": 0.5}).model.router, MICRO * LENGTH)
    assert capacity is not None and capacity < MICRO * LENGTH
    replicas = 1 + max(rank.data_parallel_rank for rank in ranks)
    micro_batches = GLOBAL // (MICRO * replicas)
    for rank in ranks[1:]:
        same = [replace(b, rank_seconds=[]) for b in rank.balance]
        assert same == [replace(b, rank_seconds=[]) for b in ranks[0].balance], "ranks disagree"
    assert len(ranks[0].balance) == STEPS - 1, "the last step was told without detail"
    for step, balance in enumerate(ranks[0].balance):
        light = {key: row.numpy() for rank in ranks for key, row in rank.light[step].items()}
        scores = {key: row.numpy() for rank in ranks for key, row in rank.scores[step].items()}
        layers = sorted({layer for _, layer in light})
        assert layers == [2, 3, 4] == ranks[0].routing[step].layers
        for index, layer in enumerate(layers):
            samples = sorted(sample for sample, own in light if own == layer)
            assert samples == list(range(step * GLOBAL, (step + 1) * GLOBAL))
            counts = np.array([light[sample, layer].sum() for sample in samples])
            # Micro-batch m of replica r has samples m · (micro · replicas) + r · micro + j.
            by_micro = counts.reshape(micro_batches, replicas, MICRO).sum(-1)
            by_rank = by_micro.sum(0)
            assert balance.rank_max_over_mean[index] == pytest.approx(by_rank.max() / by_rank.mean())
            expected = by_micro.max() / by_micro.mean()
            assert balance.micro_batch_max_over_mean[index] == pytest.approx(expected)
            assert balance.executed_max_over_mean[index] == balance.all_layers_executed_max_over_mean == 1.0
            kept = np.minimum(by_micro, capacity).sum()
            useful = ranks[0].routing[step].useful_over_executed[index]
            assert useful == pytest.approx(kept / (capacity * by_micro.size))
            thresholds = {rank.thresholds[step].get(layer) for rank in ranks} - {None}
            assert {balance.threshold[index]} == thresholds
            if step == 0:
                assert balance.score_histogram == []
                continue
            last = [s for s in samples if s % GLOBAL >= GLOBAL - MICRO * replicas]  # the last micro-batches
            before = np.concatenate(
                [rank.scores[step - 1][key].numpy() for rank in _one_a_replica(ranks, layer)
                 for key in rank.scores[step - 1] if key[1] == layer]
            ).astype(np.float64)  # fmt: skip
            edges = before.mean() + before.std() * np.concatenate(
                ([-np.inf], np.arange(-4.0, 4.25, 0.5), [np.inf])
            )
            pairs = zip(edges, edges[1:], strict=False)
            drawn = np.concatenate([scores[sample, layer] for sample in last]).astype(np.float64)
            assert balance.score_histogram[index] == [
                int(((drawn >= low) & (drawn < high)).sum()) for low, high in pairs
            ]
            traces = ranks[0].traces[step]
            assert traces is not None and traces.layers.tolist() == layers and traces.seq_length == LENGTH
            assert traces.light[:, index].tolist() == [int(light[s, layer].sum()) for s in last]
            assert traces.replica.tolist() == [r for r in range(replicas) for _ in range(MICRO)]
            assert traces.histogram[:, index].sum(0).tolist() == balance.score_histogram[index]


def _one_a_replica(ranks: list[Told], layer: int) -> list[Told]:
    """One of the ranks that hold a layer, from each replica."""
    holders = [rank for rank in ranks if any(own == layer for _, own in rank.light[0])]
    return list({rank.data_parallel_rank: rank for rank in holders}.values())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_rank_tells_its_own_time(told: dict[str, list[Told]], layout: str) -> None:
    for balance in told[layout][0].balance:
        assert len(balance.rank_seconds) == 4 and min(balance.rank_seconds) > 0.0
        step_time = balance.step_time()
        assert step_time["max"] == balance.rank_seconds[int(step_time["slowest_rank"])]
        assert step_time["max_over_mean"] >= 1.0


def test_a_run_leaves_traces_and_alarms_and_continues_them(server: RunServer, tmp_path: Path) -> None:
    """A threshold that nothing passes; stopped after 60 of 130 steps, so that only both reach 100."""
    sections = {
        "model": {"router": {"kind": "learned", "threshold": 50.0}},
        "training": {"steps": 130, "global_batch_size": 4, "micro_batch_size": 4},
        "logging": {"log_interval_steps": 5, "routing_traces": 24, "tensorboard": True},
    }
    path = write_recipe(tmp_path / "r.yaml", recipe(write_data(tmp_path), tmp_path / "run", sections))
    run_dir = tmp_path / "run"
    assert server.start(["pretrain", path, "training.exit_after_steps=60"]).wait() == [75]
    assert [record["alarms"] for record in read_metrics(run_dir)] == [{}] * 12
    traces = run_dir / "routing_traces"
    assert sorted(p.name for p in traces.iterdir()) == [f"step_{s:08d}.npz" for s in range(35, 65, 5)]
    (traces / "step_00000065.npz").write_bytes(b"of a killed attempt")
    run = server.start(["pretrain", path])
    assert run.wait() == [0]
    alarms = {record["step"]: record["alarms"] for record in read_metrics(run_dir)}
    assert alarms[95] == {} and alarms[100] == {
        "routed_fraction/layer_2": 0.0,
        "routed_fraction/layer_3": 0.0,
    }
    told = [e for e in read_events(run_dir) if e["event"] == "alarm"]
    assert [(e["step"], e["alarm"], e["layer"]) for e in told] == [
        (100, "routed_fraction", 2), (100, "routed_fraction", 3),
    ]  # fmt: skip
    assert run.output().count("have gone to attention for 100 steps") == 2
    # Continued once more after the end, nothing is told again.
    assert server.start(["pretrain", path, "training.steps=140"]).wait() == [0]
    assert len([e for e in read_events(run_dir) if e["event"] == "alarm"]) == 2
    kept = read_traces(run_dir)
    assert [len(step.replica) for step in kept] == [4] * 6
    assert sum(p.stat().st_size for p in traces.iterdir()) < 20_000
    last = json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])
    assert [sum(counts) for counts in last["score_histogram"]] == [4 * 16] * 2
    _tensorboard_has_histograms(run_dir, last)


def _tensorboard_has_histograms(run_dir: Path, last: dict[str, list[list[int]]]) -> None:
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    accumulator = reader.EventAccumulator(str(run_dir / "tensorboard"))
    accumulator.Reload()
    event = accumulator.Histograms("score_histogram/layer_3")[-1]
    assert event.step == 140 and sum(event.histogram_value.bucket) == 64
    assert {"rank_max_over_mean/layer_2", "rank_seconds/max_over_mean", "threshold/layer_3"} <= set(
        accumulator.Tags()["scalars"]
    )
