"""The simulation of balance against closed forms, brute force, and a schedule played through another way."""

from __future__ import annotations

import functools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from chiar_megatron.checkpoint.claim import claim_run
from chiar_megatron.cli import main
from chiar_megatron.config.load import resolve_config
from chiar_megatron.config.schema import ModelConfig, ParallelConfig, RouterConfig, RunConfig
from chiar_megatron.errors import ChiarError
from chiar_megatron.metrics.traces import StepTraces, TraceWriter, read_traces
from chiar_megatron.model.accounting import flops_per_sequence
from chiar_megatron.planning.balance import simulate
from chiar_megatron.planning.pipeline_time import step_time
from chiar_megatron.planning.traced_light import controlled_light, light_at, pools
from chiar_megatron.routing.balance import capacity_rows
from chiar_megatron.routing.statistics import score_histogram

LENGTH, MICRO = 512, 4
MODEL = ModelConfig(
    schedule="D R*3 A", hidden_size=64, vocab_size=100, seq_length=LENGTH,
    router=RouterConfig(kind="learned", target=0.5),
)  # fmt: skip


def run_config(replicas: int = 2, micro_batches: int = 2, **parallel: Any) -> RunConfig:
    config = RunConfig(model=MODEL, parallel=ParallelConfig(data_parallel_size=replicas, **parallel))
    training = replace(
        config.training, micro_batch_size=MICRO, global_batch_size=MICRO * replicas * micro_batches
    )
    return resolve_config(replace(config, training=training), vocab_size=None, eod_token=None)


def traced(scores_SLT: np.ndarray, threshold: float, replica: list[int]) -> StepTraces:
    """As a run would record these scores, float32 `[sequences, layers, tokens]`."""
    mean_L = scores_SLT.astype(np.float64).mean((0, 2)) + 0.1  # of another step: a little off
    deviation_L = 1.1 * scores_SLT.astype(np.float64).std((0, 2))
    scores_LTS = torch.from_numpy(scores_SLT).permute(1, 2, 0)
    histogram_LSX = score_histogram(scores_LTS, torch.from_numpy(mean_L), torch.from_numpy(deviation_L))
    layers = scores_SLT.shape[1]
    return StepTraces(
        layers=np.arange(2, 2 + layers),
        replica=np.array(replica),
        light=(scores_SLT > threshold).sum(2).astype(np.uint16),
        histogram=histogram_LSX.numpy().swapaxes(0, 1).astype(np.uint16),
        threshold=np.full(layers, threshold),
        score_mean=mean_L,
        score_deviation=deviation_L,
    )


def gaussian(sequences: int, shift: Any = 0.0, seed: int = 0) -> np.ndarray:
    """Sequences differ by half a standard deviation; `shift` `[S]` moves each."""
    generator = np.random.default_rng(seed)
    scores = generator.normal(size=(sequences, 3, LENGTH))
    scores += 0.5 * generator.normal(size=(sequences, 3, 1)) + np.reshape(shift, (-1, 1, 1))
    return scores.astype(np.float32)


@pytest.mark.parametrize(("stages", "micro_batches"), [(1, 5), (2, 1), (3, 2), (4, 8), (4, 3)])
def test_the_schedule_against_its_longest_path(stages: int, micro_batches: int) -> None:
    """1F1B written once more: as operations of a stage in order, and the longest path that leads to each."""
    work = np.random.default_rng(3).uniform(0.5, 2.0, (7, stages, micro_batches))

    def order(stage: int) -> list[tuple[str, int]]:
        forwards, backwards, done = list(range(micro_batches)), list(range(micro_batches)), []
        in_flight = 0
        while backwards:
            if forwards and in_flight < min(stages - stage, micro_batches):
                done.append(("F", forwards.pop(0)))
                in_flight += 1
            else:
                done.append(("B", backwards.pop(0)))
                in_flight -= 1
        return done

    def longest(w: np.ndarray) -> float:
        orders = [order(stage) for stage in range(stages)]

        @functools.cache
        def end(kind: str, stage: int, m: int) -> float:
            place = orders[stage].index((kind, m))
            waits = [end(orders[stage][place - 1][0], stage, orders[stage][place - 1][1])] if place else [0.0]
            if kind == "F" and stage > 0:
                waits.append(end("F", stage - 1, m))
            if kind == "B":
                waits.append(end("F", stage, m) if stage == stages - 1 else end("B", stage + 1, m))
            return max(waits) + float(w[stage, m]) * (1 / 3 if kind == "F" else 2 / 3)

        return max(end("B", 0, m) for m in range(micro_batches))

    assert step_time(work) == pytest.approx([longest(w) for w in work])
    equal = np.ones((1, stages, micro_batches))
    assert step_time(equal) == pytest.approx([micro_batches + stages - 1])


def test_light_tokens_at_other_thresholds_are_those_of_the_scores() -> None:
    scores = gaussian(40)
    step = traced(scores, 0.3, [0] * 40)
    assert np.array_equal(light_at(step, step.threshold), step.light)
    counts = []
    for place in np.linspace(-3, 3, 13):
        found = light_at(step, np.full(3, place))
        assert np.abs(found - (scores > place).sum(2)).mean() < 0.02 * LENGTH
        counts.append(found)
    assert (np.diff(counts, axis=0) <= 0).all()
    # A later step, whose scores have drifted: the controller's threshold drifts with them.
    later = traced(3.0 * gaussian(40, seed=1) + 7.0, 5.0, [0] * 40)
    for target in (0.05, 0.5, 0.9):
        light = controlled_light([step, later], target)
        assert light.mean(0) / LENGTH == pytest.approx([target] * 3, abs=0.001)
        assert light[:40].mean() == pytest.approx(light[40:].mean(), rel=0.15)


def test_neighbouring_steps_are_pooled() -> None:
    steps = [traced(gaussian(100, seed=s), 0.1 * s, [0] * 50 + [1] * 50) for s in range(7)]
    pooled = pools(steps, 0.5)
    assert [len(pool.replica_S) for pool in pooled] == [300, 400]
    fixed = np.concatenate([light_at(step, np.zeros(3)) for step in steps[:3]])
    assert np.array_equal(pooled[0].light_SL[False], fixed)
    assert len(pools(steps[:1], 0.5)) == 1


def test_two_replicas_of_constant_text_by_closed_form() -> None:
    """`as recorded`, each replica's sequences alike: rows and ledger say what a step takes."""
    scores = np.repeat(gaussian(2, [-0.6, 0.4]), 4, axis=0)
    step = traced(scores, 0.0, [0] * 4 + [1] * 4)
    config = run_config()
    found = {
        (e.text, e.controller, e.capacity): e for e in simulate(config, [step] * 3, (2, 64)).estimates
        if e.ranks == 2
    }  # fmt: skip
    light_RL = step.light[[0, 4]].astype(float)
    assert light_RL.sum(1)[0] != light_RL.sum(1)[1]
    fixed = found["as recorded", False, False]
    assert fixed.rows_max_over_mean == pytest.approx(light_RL.sum(1).max() / light_RL.sum(1).mean())
    assert fixed.light_max_over_mean == pytest.approx((light_RL.max(0) / light_RL.mean(0)).max())
    assert fixed.share == pytest.approx(light_RL.mean() / LENGTH)
    flops = [
        flops_per_sequence(config.model, LENGTH, (shares / LENGTH).tolist()).total("training").executed
        for shares in light_RL
    ]
    assert fixed.over_mean == pytest.approx(max(flops) / np.mean(flops), rel=1e-6)
    capped = found["as recorded", False, True]
    rows = capacity_rows(config.model.router, MICRO * LENGTH)
    assert rows is not None
    kept = np.minimum(MICRO * light_RL, rows)
    assert capped.rows_max_over_mean == 1.0
    assert capped.overflow == pytest.approx(1.0 - kept.sum() / (MICRO * light_RL).sum())
    assert capped.overflow > 0.0
    assert capped.useful_over_executed == pytest.approx(kept.mean() / rows)
    flops = [
        flops_per_sequence(
            config.model, LENGTH, (shares / LENGTH).tolist(), capacity_fraction=rows / (MICRO * LENGTH)
        ).total("training").executed
        for shares in light_RL
    ]  # fmt: skip
    assert capped.over_mean == pytest.approx(max(flops) / np.mean(flops), rel=1e-6)
    assert capped.over_mean < fixed.over_mean


def test_more_ranks_against_a_plain_resampling() -> None:
    step = traced(gaussian(48), 0.0, [0] * 48)
    found = simulate(run_config(replicas=1), [step], (8, 256)).estimates
    assert {e.text for e in found} == {"mixed"}
    generator = np.random.default_rng(9)
    for ranks in (8, 256):
        ratios = []
        for _ in range(400):
            drawn = step.light[generator.integers(48, size=(ranks, 2 * MICRO))].astype(float).sum((1, 2))
            ratios.append(drawn.max() / drawn.mean())
        fixed, controlled, capped, both = [e for e in found if e.ranks == ranks]
        assert fixed.rows_max_over_mean == pytest.approx(np.mean(ratios), abs=0.01)
        assert both.share == controlled.share == pytest.approx(0.5, abs=0.02)
        assert capped.rows_max_over_mean == both.rows_max_over_mean == 1.0
        assert 1.0 <= both.over_mean < fixed.over_mean


def test_stages_wait_at_every_micro_batch() -> None:
    """One replica waits for nobody; cut into equal stages it waits for itself, and less so with capacity."""
    scores = gaussian(48)
    step = traced(np.concatenate((scores, scores[::-1]), axis=1), 0.0, [0] * 48)
    step = replace(step, layers=np.arange(1, 7))
    config = run_config(1, 8)
    config = replace(config, model=replace(config.model, schedule="R*6"))
    alone = simulate(config, [step], (1,)).estimates
    assert [e.over_mean for e in alone] == pytest.approx([1.0] * 4)
    config = replace(config, parallel=replace(config.parallel, pipeline_model_parallel_size=2))
    cut = simulate(config, [step], (1, 2))
    assert cut.stages == ((1, 2, 3), (4, 5, 6)) and [e.replicas for e in cut.estimates] == [1] * 4
    assert cut.estimates[0].over_mean > 1.0005 and cut.estimates[3].over_mean < cut.estimates[0].over_mean
    given = simulate(config, [step], (2,), [[1], [2, 3, 4, 5, 6]])
    assert given.stages == ((1,), (2, 3, 4, 5, 6))


def test_a_recipe_of_another_model_is_refused(tmp_path: Path) -> None:
    step = traced(gaussian(4), 0.0, [0] * 4)
    other = replace(run_config(), model=replace(MODEL, schedule="D R*2 A"))
    with pytest.raises(ChiarError, match=r"routed layers \[2, 3, 4\].*give the recipe of the traced run"):
        simulate(other, [step])
    with pytest.raises(ChiarError, match="--ranks: one replica takes 4 processes"):
        simulate(run_config(tensor_model_parallel_size=4), [step], (1, 2))
    with pytest.raises(ChiarError, match="logging.routing_traces=4096"):
        read_traces(tmp_path)


def test_the_newest_sequences_are_kept_and_a_damaged_file_is_named(tmp_path: Path) -> None:
    step = traced(gaussian(4), 0.0, [0] * 4)
    writer = TraceWriter(claim_run(tmp_path), 10, 0)
    for number in range(10, 60, 10):
        writer.write(number, step)
    files = sorted(path.name for path in (tmp_path / "routing_traces").iterdir())
    assert files == [f"step_{number:08d}.npz" for number in (30, 40, 50)]
    TraceWriter(claim_run(tmp_path), 10, 40)  # continued from step 40
    kept = read_traces(tmp_path)
    assert len(kept) == 2 and np.array_equal(kept[0].histogram, step.histogram)
    (tmp_path / "routing_traces" / files[0]).write_bytes(b"PK not really")
    with pytest.raises(ChiarError, match="step_00000030.npz is damaged"):
        read_traces(tmp_path)
    TraceWriter(claim_run(tmp_path), 10, 40).write(50, step)  # a damaged trace does not stop a run
    assert json.dumps(simulate(run_config(), read_traces(tmp_path), (8,)).as_dict())


@pytest.mark.parametrize(
    "change",
    [
        {"light": np.zeros((3, 3), np.uint16)},
        {"replica": np.zeros(0, int), "light": np.zeros((0, 3), int), "histogram": np.zeros((0, 3, 18), int)},
        {"threshold": np.full(3, np.nan)},
        {"light": np.full((8, 3), "many")},
        {"histogram": np.zeros((8, 3, 5), np.uint16)},
    ],
    ids=["another shape", "no sequences", "not a number", "words", "other bins"],
)
def test_arrays_that_do_not_belong_together_are_a_damaged_file(
    tmp_path: Path, change: dict[str, Any]
) -> None:
    arrays = vars(traced(gaussian(8), 0.0, [0] * 4 + [1] * 4))
    (tmp_path / "routing_traces").mkdir()
    path = tmp_path / "routing_traces" / "step_00000010.npz"
    np.savez(path, **arrays)
    assert len(read_traces(tmp_path)) == 1
    np.savez(path, **(arrays | change))
    with pytest.raises(ChiarError, match=f"{path} is damaged or no file of routing traces; remove it"):
        read_traces(tmp_path)


def test_more_ranks_than_fit_are_refused() -> None:
    with pytest.raises(
        ChiarError, match="--ranks: 1000000000 ranks of 2 micro-batches a step .* at most 15000000$"
    ):
        simulate(run_config(), [traced(gaussian(8), 0.0, [0] * 8)], ranks=(8, 1_000_000_000))


def test_chiar_plan_simulates_a_runs_traces(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    TraceWriter(claim_run(tmp_path), 100, 0).write(10, traced(gaussian(40), 0.0, [0] * 40))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "model: {schedule: 'D R*3 A', hidden_size: 64, vocab_size: 100, seq_length: 512,\n"
        "  router: {kind: learned, target: 0.5}}\n"
        "training: {micro_batch_size: 4, global_batch_size: 16}\n"
        "parallel: {pipeline_model_parallel_size: 2, layout: 'Et*2|t*3L'}\n"
    )
    command = ["plan", str(recipe), "--traces", str(tmp_path), "--ranks", "2,8"]
    assert main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["balance"]
    assert found["stages"] == [[1, 2], [3, 4, 5]] and {e["ranks"] for e in found["estimates"]} == {2, 8}
    assert main(command) == 0 and "capacity" in capsys.readouterr().out
    assert main([*command[:2], "--traces", str(tmp_path / "none")]) == 2
