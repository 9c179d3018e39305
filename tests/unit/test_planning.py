"""`chiar plan` against what was measured on a GPU, what autograd keeps, and megatron-core's own schedule."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from megatron.core.pipeline_parallel.schedules import get_schedule_table

from chiar_megatron.cli import main
from chiar_megatron.config.load import config_from_dict, resolve_config
from chiar_megatron.config.schema import RunConfig
from chiar_megatron.config.validate import check_config
from chiar_megatron.model.accounting import flops_per_sequence
from chiar_megatron.model.build import build_model
from chiar_megatron.model.initialize import initialize_parameters
from chiar_megatron.model.pipeline import pipeline_costs
from chiar_megatron.planning.activations import ActivationModel
from chiar_megatron.planning.candidates import candidates, weigh
from chiar_megatron.planning.memory import GIB, USABLE, micro_batches_in_flight, stage_memory
from chiar_megatron.planning.speed import (
    LAUNCHES,
    SECONDS_PER_LAUNCH,
    SHARED,
    UNCOMPILED_LAUNCHES,
    Cluster,
    step_time,
)
from chiar_megatron.routing.balance import capacity_rows
from chiar_megatron.runtime.distributed import single_process_world
from tests.unit.kept_bytes import bytes_kept

REPOSITORY = Path(__file__).resolve().parents[2]
RESULTS = REPOSITORY / "benchmarks" / "results"


def resolved(fields: dict[str, Any]) -> RunConfig:
    return resolve_config(config_from_dict(fields), vocab_size=None, eod_token=None)


def recorded(pattern: str) -> list[tuple[str, RunConfig, dict[str, Any]]]:
    """Every side of the product that `chiar bench step` measured: its name, its recipe, its figures."""
    found = []
    for path in sorted(RESULTS.glob(pattern)):
        record = json.loads(path.read_text())
        settings = record["settings"]
        for result in record["results"]:
            router, _, rho = result["name"].partition(" ρ=")
            if "tokens_per_second" not in result or router.startswith(("nanogpt", "twin again")):
                continue
            fields: dict[str, Any] = {"model.preset": f"{settings['preset']}-twin"}
            if rho:
                fields = {"model.preset": settings["preset"], "model.router.target": float(rho)}
                fields["model.router.kind"] = router
            fields |= {"model.dropout": 0.0, "model.seq_length": settings["seq_length"]}
            fields["training.precision"] = settings["precision"]
            fields["training.micro_batch_size"] = settings["micro_batch_size"]
            fields["training.global_batch_size"] = settings["tokens_per_step"] // settings["seq_length"]
            found.append((f"{path.stem}: {result['name']}", resolved(fields), result))
    return found


RECORDS = "step_T*_h200.json"


@pytest.mark.parametrize(("name", "config", "measured"), recorded(RECORDS), ids=lambda value: str(value)[:40])
def test_memory_of_recorded_runs(name: str, config: RunConfig, measured: dict[str, Any]) -> None:
    (stage,) = stage_memory(config, replicas=1, compiled=True)
    assert stage.peak == pytest.approx(measured["peak_memory_bytes"], rel=0.02)


@pytest.mark.parametrize(("name", "config", "measured"), recorded(RECORDS), ids=lambda value: str(value)[:40])
def test_speed_of_recorded_runs(name: str, config: RunConfig, measured: dict[str, Any]) -> None:
    planned = weigh(config, 1, Cluster(gpus=1)).tokens_per_second
    # One throughput for all: attention over 32,768 tokens is the slowest there is.
    assert planned == pytest.approx(measured["tokens_per_second"]["median"], rel=0.15)


def test_there_are_records() -> None:
    names = [name for name, _, _ in recorded(RECORDS)]
    assert sum("twin" in name for name in names) >= 4 and sum("ρ=" in name for name in names) >= 4


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("norm", ["post", "pre"])
@pytest.mark.parametrize("router", ["entropy", "soft"])
def test_activations_are_those_that_autograd_keeps(precision: str, norm: str, router: str) -> None:
    config = resolved(
        {
            "model.schedule": "D R A",
            "model.hidden_size": 256,
            "model.num_attention_heads": 4,
            "model.num_query_groups": 2,
            "model.vocab_size": 64,
            "model.seq_length": 128,
            "model.norm": norm,
            "model.router.kind": router,
            "model.router.dispatch": "dense",  # on a CPU skipping takes other ways than the kernels
            "model.meta_router.enabled": False,
            "training.precision": precision,
        }
    )
    module = build_model(config, single_process_world("cpu"))
    initialize_parameters(module, 1)
    planned = ActivationModel(config, compiled=False)
    for layer in module.train().chiar_layers:
        batch, length = config.training.micro_batch_size, config.model.seq_length
        found = bytes_kept(layer, batch, length) / (batch * length)
        if layer.kind == "R" and norm == "post":
            # Beside the input, which attention keeps and the kernel reads again, a CPU keeps its spectrum.
            found -= planned.layer("R").input
        assert planned.layer(layer.kind).kept == pytest.approx(found, rel=0.02), layer.kind


@pytest.mark.parametrize(("stages", "virtual", "micro_batches"), [(4, 1, 8), (4, 2, 8), (2, 3, 4), (4, 2, 4)])
def test_micro_batches_under_way_are_those_of_the_schedule(stages: int, virtual: int, micro_batches: int):
    """megatron-core's order of chunks, forward passes ahead of the backward ones by its own warm-up."""
    config = resolved(
        {
            "model.schedule": "A*24",
            "model.vocab_size": 64,
            "parallel.pipeline_model_parallel_size": stages,
            "parallel.virtual_pipeline_model_parallel_size": virtual,
            "training.global_batch_size": micro_batches,
            "training.micro_batch_size": 1,
        }
    )
    order = [chunk for _, chunk in get_schedule_table(micro_batches, virtual, stages)]
    for stage in range(stages):
        ahead = stages - stage - 1
        if virtual > 1:
            ahead = 2 * ahead + (virtual - 1) * stages
        held, most = [0] * virtual, 0
        for step in range(len(order) + ahead):
            if step < len(order):
                held[order[step]] += 1
            most = max(most, sum(held))
            if step >= min(ahead, len(order)) and step - ahead < len(order):
                held[virtual - 1 - order[step - ahead]] -= 1
        assert sum(micro_batches_in_flight(config, stages * virtual, stage)) == most, stage


def test_step_time_by_hand() -> None:
    fields = {
        "model.preset": "400m-twin",
        "parallel.pipeline_model_parallel_size": 4,
        "parallel.layout": "even",
        "training.micro_batch_size": 2,
        "training.global_batch_size": 64,
    }
    cluster = Cluster(gpus=8, tflops=400.0, link_gb_s=1e12)
    config = resolved(fields)
    time = step_time(config, 2, cluster)
    ledger = flops_per_sequence(config.model, 256, 1.0)
    head = ledger.total(names=("head",)).executed
    heaviest = (7 * ledger.per_layer()[0].executed + head) * 2 / 400e12
    assert time.total == pytest.approx((16 + 3) * heaviest, rel=1e-6)
    assert time.launching == 0.0
    # Without a graph the host launches seven layers of each micro-batch.
    fields_of_host = fields | {"runtime.cuda_graph": False}
    launched = step_time(resolved(fields_of_host), 2, cluster)
    assert launched.launching == pytest.approx(
        (16 + 3) * (7 * LAUNCHES * SECONDS_PER_LAUNCH - heaviest), rel=1e-6
    )
    again = step_time(resolved(fields_of_host | {"training.recompute": "full"}), 2, cluster)
    assert again.total == pytest.approx((16 + 3) * 7 * 4 / 3 * LAUNCHES * SECONDS_PER_LAUNCH, rel=1e-6)
    eager = step_time(resolved(fields_of_host | {"runtime.compile": False}), 2, cluster)
    assert eager.total == pytest.approx((16 + 3) * 7 * UNCOMPILED_LAUNCHES * SECONDS_PER_LAUNCH, rel=1e-6)
    assert time.bubble == pytest.approx(3 * heaviest)
    interleaved = resolved(fields | {"parallel.virtual_pipeline_model_parallel_size": 7})
    assert step_time(interleaved, 2, cluster).bubble == pytest.approx(3 / 7 * heaviest)
    slow = step_time(config, 2, Cluster(gpus=8, tflops=400.0, link_gb_s=1.0))
    assert slow.data_parallel > 0.5 and slow.model_parallel > 0.01


@pytest.mark.parametrize(("groups", "sent_groups"), [(16, 16), (2, 4)])
def test_context_parallel_step_by_hand(groups: int, sent_groups: int) -> None:
    """Four ranks share the FLOPs; each sends queries, keys, values and outputs of its tokens for the heads
    that it does not keep, and the gradients of them all back. Two groups go round four ranks twice."""
    fields = {"model.preset": "400m-twin", "model.num_query_groups": groups, "training.precision": "bf16"}
    fields |= {"training.micro_batch_size": 2, "training.global_batch_size": 8}
    fields |= {"parallel.context_parallel_size": 4}
    config = resolved(fields)
    time = step_time(config, 1, Cluster(gpus=4, tflops=400.0, link_gb_s=100.0))
    flops = flops_per_sequence(config.model, 256, 1.0).total().executed
    assert time.compute == pytest.approx(8 * flops / (4 * SHARED * 400e12))
    assert time.imbalance == time.launching == 0.0
    tokens, head = 2 * 256 / 4, 64
    sent = 3 / 4 * tokens * (2 * 16 + 2 * sent_groups) * head * 2
    assert time.model_parallel == pytest.approx(4 * 28 * 2 * sent / 100e9)
    apart = step_time(config, 1, Cluster(gpus=4, gpus_per_node=2, tflops=400.0, network_gb_s=10.0))
    assert apart.model_parallel == pytest.approx(4 * 28 * 2 * sent / 10e9)
    again = step_time(
        resolved(fields | {"training.recompute": "full"}), 1, Cluster(gpus=4, tflops=400.0, link_gb_s=100.0)
    )
    assert again.model_parallel == pytest.approx(4 * 28 * 3 * sent / 100e9)


@pytest.mark.parametrize(("target", "rows", "own_rows"), [(0.125, 320, 320), (0.5, 1088, 512)])
def test_context_parallel_ranks_project_the_rows_they_may_have(target: float, rows: int, own_rows: int):
    """Of 2,048 tokens in a micro-batch four ranks hold 512 each: all light ones may be one rank's."""
    fields = {"model.preset": "400m", "model.schedule": "D R*2 A", "model.router.target": target}
    fields |= {"model.router.kind": "random", "training.micro_batch_size": 8}
    one, four = resolved(fields), resolved(fields | {"parallel.context_parallel_size": 4})
    assert capacity_rows(one.model.router, 2048) == rows
    # A query and an output projection of 1,024 × 1,024, forward and twice as much backward.
    more = 2 * 2 * 1024**2 * 3 * (4 * own_rows - rows) / 8
    costs, costs_of_one = pipeline_costs(four).layers, pipeline_costs(one).layers
    assert [a - b for a, b in zip(costs, costs_of_one, strict=True)] == pytest.approx([0, more, more, 0])
    dense = {"model.router.dispatch": "dense"}
    assert (
        pipeline_costs(resolved(fields | dense)).layers
        == pipeline_costs(resolved(fields | dense | {"parallel.context_parallel_size": 4})).layers
    )


def test_context_parallel_ranks_share_a_long_sequence() -> None:
    """One sequence that no replica could share: activations halve, what is kept of weights does not."""
    fields = {"model.preset": "400m-twin", "model.seq_length": 32768, "model.dropout": 0.0}
    fields |= {"training.micro_batch_size": 1, "training.global_batch_size": 1, "runtime.compile": False}
    (one,), (two,), (four,) = (
        stage_memory(resolved(fields | {"parallel.context_parallel_size": size}), 1, False)
        for size in (1, 2, 4)
    )
    assert one.static == two.static == four.static
    assert four.activations == pytest.approx(two.activations / 2, rel=0.02)
    # Keys and values arrive as tensors of their own: the product of all three is not kept beside them.
    assert 0.45 < two.activations / one.activations < 0.5
    assert four.loss == pytest.approx(one.loss / 4)
    listed, _ = candidates(resolved(fields), Cluster(gpus=4))
    assert {c.config.parallel.context_parallel_size for c in listed} >= {2, 4}
    assert [c.time.total for c in listed] == sorted(c.time.total for c in listed)


def plan(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["plan", *arguments]) == 0
    return capsys.readouterr().out


def test_the_verb_lists_layouts_that_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model: {preset: 400m, vocab_size: 50304}\ndata: {tokenizer: not/here}\n")
    options = ["training.micro_batch_size=2", "training.global_batch_size=64", "--gpus", "16"]
    told = json.loads(plan(capsys, str(recipe), *options, "--gpu-memory-gib", "16", "--json"))
    layouts = told["layouts"]
    assert len(layouts) > 10 and told["not_fitting"] >= 0
    seconds = [layout["step_seconds"] for layout in layouts]
    assert seconds == sorted(seconds)
    assert all(layout["peak_bytes"] <= USABLE * 16 * GIB for layout in layouts)
    batch = {"micro_batch_size": 2, "global_batch_size": 64}
    for layout in layouts:
        fields = {"model": {"preset": "400m"}, "parallel": layout["parallel"], "training": batch}
        check_config(config_from_dict(fields), 16)
    assert told["parameters"]["total"] == 400_091_137
    text = plan(capsys, str(recipe), *options, "parallel.pipeline_model_parallel_size=4")
    assert "heaviest stage 1.0" in text and "with equal layer counts Et*7|t*7|t*7|t*7L" in text
    assert main(["plan", str(recipe), *options, "--gpu-memory-gib", "0.5"]) == 2
    told_small = capsys.readouterr()
    assert "none" in told_small.out and "does NOT fit" in told_small.out
    (line,) = told_small.err.splitlines()
    assert line.startswith(
        "chiar: --gpu-memory-gib: no layout of 16 GPUs fits in 92% of 0.5 GiB; the smallest"
    )
    assert line.endswith("use more or larger GPUs or lower training.micro_batch_size")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--gpus", "3"], "16 is not divisible by micro_batch_size 8 × 3 replicas"),
        (["model.vocab_size=null"], "data.tokenizer: not/here does not exist, and model.vocab_size is null"),
        (["model.vocab_size=null", "data.tokenizer=null"], "null, and there is no tokenizer to ask"),
        (["parallel.pipeline_model_parallel_size=40"], "number of layers: 28 is too few for 40 stages"),
        (["parallel.layouts=auto"], "nearest: parallel.layout"),
        (["--ranks", "64"], "--ranks: there is nothing to simulate them from; give a run with --traces RUN"),
        (
            ["--traces", "not/here"],
            "not/here/routing_traces holds no routing traces: train with logging.rout",
        ),
        (["parallel.context_parallel_size=3"], "model.seq_length: 256 is not divisible by parallel.context_"),
        (["parallel.context_parallel_size=32"], "does not divide the 16 query heads of a process"),
        (["--gpus", "6", "parallel.context_parallel_size=4"], "does not divide the 6 processes started"),
        (
            ["parallel.context_parallel_size=2", "model.num_query_groups=3"],
            "model.num_attention_heads: 16 is not divisible by model.num_query_groups 3",
        ),
        (
            ["parallel.virtual_pipeline_model_parallel_size=2"],
            "virtual_pipeline_model_parallel_size: 2 needs parallel.pipeline_model_parallel_size above 1",
        ),
        (
            [
                "--gpus",
                "6",
                "parallel.pipeline_model_parallel_size=3",
                "training.micro_batch_size=4",
                "parallel.virtual_pipeline_model_parallel_size=2",
            ],
            "they must come in multiples of the 3 stages",
        ),
    ],
)
def test_bad_input_is_one_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "model: {preset: 400m, vocab_size: 50304}\ndata: {tokenizer: not/here}\n"
        "training: {global_batch_size: 16, micro_batch_size: 8}\n"
    )
    assert main(["plan", str(recipe), *options]) == 2
    captured = capsys.readouterr()
    assert message in captured.err and not captured.out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--gpus", "0"], "argument --gpus: 0 must be at least 1"),
        (["--gpus", "many"], "argument --gpus: 'many' must be a whole number, at least 1"),
        (["--gpu-memory-gib", "0"], "argument --gpu-memory-gib: 0.0 must be above 0 and finite"),
        (["--tflops", "nan"], "argument --tflops: nan must be above 0 and finite"),
        (["--link-gb-s", "fast"], "argument --link-gb-s: 'fast' must be a number above 0"),
        (["--ranks", "8,"], "argument --ranks: '' must be a whole number, at least 1"),
    ],
)
def test_a_bad_option_is_named(capsys: pytest.CaptureFixture[str], options: list[str], message: str) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["plan", "recipe.yaml", *options])
    assert stopped.value.code == 2
    assert capsys.readouterr().err == f"chiar plan: {message}; see `chiar plan --help`\n"
