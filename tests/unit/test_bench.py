"""`chiar bench` at tiny sizes on a CPU: every question is answered, and no wrong result is timed."""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType

from chiar_megatron.bench import attention_cases, baselines, spectral, step, step_check
from chiar_megatron.bench.checks import Checks, WrongResult, relative_error
from chiar_megatron.bench.commands import add_bench_arguments, run_bench
from chiar_megatron.bench.profile import STEPS, gap_lines
from chiar_megatron.bench.record import format_table, plain
from chiar_megatron.bench.step_config import StepSettings, twin_config
from chiar_megatron.bench.step_sides import PlainSettings, RandomStream
from chiar_megatron.bench.timing import Spread
from chiar_megatron.errors import ChiarError, ConfigError
from chiar_megatron.model.accounting import model_flops_per_token
from chiar_megatron.operators.spectral_mixing import SpectralMixing

CPU = torch.device("cpu")
STEP = "step --seq-length 32 --tokens-per-step 128 --steps 2 --routed-warmup 1 --compile no"
QUESTIONS = {
    "spectral": "spectral --rows 64 --hidden 48 --rounds 2",
    "attention": "attention --tokens 128 --seq-length 64 --heads 4 --groups 2 --head-size 8 --rounds 2",
    "layer": "layer --tokens 128 --seq-length 32 --rounds 1 --rho 0.5 --router learned --compile no",
    "step": f"{STEP} --rho 0.5 --router entropy",
}


def parse(arguments: str, *more: str) -> argparse.Namespace:
    """As the command line would."""
    parser = argparse.ArgumentParser()
    add_bench_arguments(parser)
    return parser.parse_args([*arguments.split(), "--device", "cpu", *more])


def answer(arguments: str, tmp_path, *more: str):
    """(exit code, the record)."""
    output = tmp_path / "result.json"
    code = run_bench(parse(arguments, "--output", str(output), *more))
    return code, json.loads(output.read_text()) if output.exists() else None


@pytest.mark.parametrize("question", QUESTIONS)
def test_every_question_is_answered_with_a_whole_record(question, tmp_path, capsys):
    code, record = (
        answer(QUESTIONS[question], tmp_path, "--profile", str(tmp_path / "p.txt"))
        if (question == "step")
        else answer(QUESTIONS[question], tmp_path)
    )
    assert code == 0
    assert record["benchmark"].startswith(question)
    for key in ("settings", "machine", "command", "date", "checks", "notes", "results"):
        assert record[key], key
    assert {"device", "torch", "triton", "megatron_core", "git_commit"} <= record["machine"].keys()
    assert all(check["error"] <= check["limit"] for check in record["checks"])
    for result in record["results"]:
        timed = result["tokens_per_second" if question == "step" else "time"]
        assert 0 < timed["quartile_low"] <= timed["median"] <= timed["quartile_high"], result["name"]
        assert result.get("floor_seconds", 0) > 0 or result["floor_tokens_per_second"] > 0
    printed = capsys.readouterr().out
    assert "| " in printed and "floor" in printed and printed.strip().endswith("result.json")
    {"step": expect_step, "attention": expect_attention, "layer": expect_layer}.get(
        question, lambda record: None
    )(record)
    if question == "step":
        profile = (tmp_path / "p.txt").read_text()
        assert profile.count("## ") == 4 and "host may wait" in profile and "aten::" in profile


def expect_step(record):
    """Sides in order, rows of the capacity, ratios to the faster twin and to the plain GPT."""
    sides = {result["name"]: result for result in record["results"]}
    assert list(sides) == ["nanogpt", "twin", "entropy ρ=0.5", "twin again"]
    routed = sides["entropy ρ=0.5"]
    assert routed["rows"]["tokens"] == 128 and routed["rows"]["executed"] == 128  # ceil64(0.525·128)
    light = routed["routed_fraction"] * 128
    assert math.isclose(routed["rows"]["useful"] + routed["rows"]["overflowed"], light)
    assert routed["slack"] == 0.05 and len(routed["routed_fraction_by_layer"]) == 2
    medians = {name: side["tokens_per_second"]["median"] for name, side in sides.items()}
    twin = max(medians["twin"], medians["twin again"])
    assert math.isclose(routed["ratio_to_twin"], medians["entropy ρ=0.5"] / twin)
    assert math.isclose(routed["ratio_to_nanogpt"], medians["entropy ρ=0.5"] / medians["nanogpt"])
    assert max(sides["twin"]["ratio_to_twin"], sides["twin again"]["ratio_to_twin"]) == 1.0
    assert all(math.isfinite(side["loss_last"]) for side in sides.values())
    assert any("random token ids" in note for note in record["notes"])


def expect_attention(record):
    """Padding is part of what is timed, and not of the floor."""
    rows = {result["name"]: result["rows"] for result in record["results"]}
    assert rows["routed ρ=0.5"] == {"executed": 128, "useful": 64}
    assert rows["routed ρ=0.25"] == {"executed": 64, "useful": 32}
    floors = {r["name"]: r["floor_seconds"] for r in record["results"] if r["phase"] == "forward"}
    assert math.isclose(floors["routed ρ=0.25"], floors["full torch's choice"] / 4)


def expect_layer(record):
    """One layer of each kind, the routed one at its share."""
    sides = {result["name"]: result for result in record["results"]}
    assert list(sides) == ["A", "D", "R learned ρ=0.5"]
    assert abs(sides["R learned ρ=0.5"]["routed_fraction"][0] - 0.5) < 0.02
    assert sides["D"]["useful_flops"] < sides["R learned ρ=0.5"]["useful_flops"] < sides["A"]["useful_flops"]


@pytest.mark.parametrize(
    ("result", "reason"),
    [
        (torch.tensor([1.0, 2.0, 3.001]), "above"),
        (torch.tensor([1.0, 2.0, math.nan]), "inf"),
        (torch.tensor([1.0, 2.0, math.inf]), "inf"),
        (torch.zeros(3), "above"),
        (torch.tensor([1.0, 2.0]), "shape"),
    ],
)
def test_a_wrong_result_is_refused_with_its_error(result, reason):
    checks = Checks()
    assert (
        checks.close("right", torch.tensor([1.0, 2.0, 3.0 + 1e-6]), torch.tensor([1.0, 2.0, 3.0]), 1e-5)
        < 1e-6
    )
    with pytest.raises(WrongResult, match=reason):
        checks.close("wrong", result, torch.tensor([1.0, 2.0, 3.0]), 1e-5)
    json.dumps(plain(checks.measured), allow_nan=False)


def test_relative_error_of_nothing():
    assert relative_error(torch.zeros(2), torch.zeros(2)) == 0.0
    assert relative_error(torch.ones(2), torch.zeros(2)) == math.inf


WRONG_WAYS = {
    "filter left out": lambda x, w: (None, x + 0.0 * w),
    "one token too late": lambda x, w: (None, spectral.spectral_mixing(x, w).roll(1, 0)),
    "no gradient of w": lambda x, w: (None, spectral.spectral_mixing(x, w.detach()) + 0.0 * w),
    "entropy of x itself": lambda x, w: (spectral._entropy(x.detach().square()), None),
}


@pytest.mark.parametrize("name", WRONG_WAYS)
def test_a_wrong_spectral_way_is_refused(name):
    settings = spectral.SpectralSettings(rows=32, hidden=40, dtype="fp32", rounds=1)
    inputs = spectral._inputs(settings, CPU, torch.Generator().manual_seed(0))
    way = spectral.Way(name, WRONG_WAYS[name], 1e-5, 1e-4)
    with pytest.raises(WrongResult, match=name):
        spectral.check_ways([way], inputs, Checks())


def test_a_wrong_operator_is_not_timed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(spectral, "spectral_mixing", lambda x, w: x * w)
    code, record = answer(QUESTIONS["spectral"], tmp_path)
    assert code == 1 and record is None
    assert "WRONG, not timed: operators: mixing" in capsys.readouterr().out


@pytest.mark.parametrize("wrong", ["sees the future", "sees other sequences", "padding is not 0"])
def test_wrong_routed_attention_is_refused(wrong):
    generator = torch.Generator().manual_seed(0)
    shape = attention_cases.Shape(2, 32, 4, 2, 8, torch.float32, generator)
    case = attention_cases.routed_cases(shape, 0.25, 1, lambda text: None)[0]
    attention_cases.check_case(case, "right", Checks())
    assert case.rows is not None
    rows, pad = case.rows, case.rows.last_R < case.rows.first_R
    assert pad.any()
    changed = {
        "sees the future": replace(
            rows, last_R=torch.where(pad, rows.last_R, (rows.last_R + 1).clamp_max(63))
        ),
        "sees other sequences": replace(rows, first_R=torch.where(pad, rows.first_R, 0)),
        "padding is not 0": replace(rows, last_R=torch.where(pad, 63, rows.last_R)),
    }[wrong]

    def compute(q, k, v):
        return attention_cases.routed_attention(q, k, v, changed.first_R, changed.last_R)

    with pytest.raises(WrongResult, match="routed"):
        attention_cases.check_case(replace(case, compute=compute), wrong, Checks())


def test_a_wrong_side_of_the_step_is_refused(tmp_path, monkeypatch, capsys):
    forward = SpectralMixing.forward

    def wrong(self, x, chosen=None, *more):
        y = forward(self, x, chosen, *more)
        return y if chosen is None else 0.99 * y + 0.01 * y.roll(1, -1)  # only where tokens are skipped

    monkeypatch.setattr(SpectralMixing, "forward", wrong)
    code, record = answer(f"{STEP} --sides twin,routed --rho 0.5 --router learned", tmp_path)
    assert code == 1 and "WRONG, not timed: learned ρ=0.5" in capsys.readouterr().out
    failed = {result["name"]: result.get("failed") for result in record["results"]}
    assert failed == {"twin": None, "learned ρ=0.5": "wrong result", "twin again": None}
    assert "tokens_per_second" not in record["results"][1]


def test_a_wrong_plain_gpt_is_refused(monkeypatch):
    config = twin_config(StepSettings.of(parse(STEP), CPU), 1)
    settings = PlainSettings.beside(config, compiled=False, cudnn=False)
    step_check.check_plain(settings, config, CPU, Checks())
    everything = torch.ones(32, 32, dtype=torch.bool)
    right = baselines.plain_attention
    monkeypatch.setattr(baselines, "plain_attention", lambda q, k, v: right(q, k, v, everything))
    with pytest.raises(WrongResult, match="plain GPT"):
        step_check.check_plain(settings, config, CPU, Checks())


def test_a_side_without_memory_is_reported_and_the_others_go_on(tmp_path, monkeypatch):
    def full(*unused):
        raise torch.OutOfMemoryError("no memory left")

    monkeypatch.setattr(step, "PlainTrainee", full)
    code, record = answer(f"{STEP} --sides nanogpt,twin --no-check", tmp_path)
    assert code == 0 and record["results"][0]["failed"] == "out of memory"
    assert record["results"][1]["tokens_per_second"]["median"] > 0
    assert record["settings"]["check"] is False and not record["checks"]


def test_a_side_that_fails_is_told_by_the_exit_code(tmp_path, monkeypatch):
    def broken(*unused):
        raise RuntimeError("kernel does not compile")

    monkeypatch.setattr(step, "Product", broken)
    code, record = answer(f"{STEP} --sides nanogpt,twin --no-check --no-repeat-twin", tmp_path)
    assert code == 1 and "kernel does not compile" in record["results"][1]["error"]
    assert record["results"][0]["tokens_per_second"]["median"] > 0


def test_what_is_out_of_time_is_left_out_and_said(tmp_path):
    code, record = answer(STEP, tmp_path, "--time-limit", "0")
    assert code == 0 and all(result["skipped"] == "time limit" for result in record["results"])
    assert sum("--time-limit has passed" in note for note in record["notes"]) == len(record["results"])


@pytest.mark.parametrize("question", ["spectral", "attention", "layer"])
def test_nothing_is_checked_or_timed_once_the_time_is_up(question, tmp_path):
    code, record = answer(QUESTIONS[question], tmp_path, "--time-limit", "0")
    assert code == 0 and record["results"] == record["checks"] == []
    assert any("skipped, --time-limit has passed" in note for note in record["notes"])


def test_a_record_that_cannot_be_written_is_refused_before_measuring(tmp_path, capsys):
    (tmp_path / "file").touch()
    for question in QUESTIONS:
        for output in (tmp_path, tmp_path / "file" / "b.json", "/proc/b.json"):
            with pytest.raises(ConfigError, match=f"--output: {output} "):
                run_bench(parse(QUESTIONS[question], "--output", str(output)))
    assert capsys.readouterr().out == ""
    with pytest.raises(ConfigError, match="--output: "):
        run_bench(parse("balance --processes 2", "--output", str(tmp_path)))


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ("spectral --hidden 1", "--hidden must be at least 2"),
        ("layer --router foo", "model.router.kind: 'foo'"),
        ("layer --router soft --rho 0.3", "model.router.target"),
        ("balance --processes 2 --router foo", "model.router.kind: 'foo'"),
    ],
)
def test_bad_options_are_refused_before_any_work(arguments, named, tmp_path, capsys):
    with pytest.raises(ConfigError, match=named) as refused:
        run_bench(parse(arguments, "--output", str(tmp_path / "r.json")))
    assert not str(refused.value).startswith("chiar")  # the command line says so
    assert capsys.readouterr().out == "" and not list(tmp_path.iterdir())


def test_missing_text_is_refused_before_any_work(tmp_path, capsys):
    with pytest.raises(ChiarError, match="nothere"):
        run_bench(parse(f"{STEP} --data nothere", "--output", str(tmp_path / "r.json")))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("tokens", [64 * 10**10, 64 * 10**16])
def test_more_than_fits_in_memory_is_one_line(tokens, tmp_path):
    arguments = f"attention --no-flex --seq-length 64 --tokens {tokens} --rounds 1"
    with pytest.raises(ConfigError, match=f"--tokens: {tokens} needs more memory") as refused:
        run_bench(parse(arguments, "--output", str(tmp_path / "r.json")))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ("--preset 400m-twin", "--preset"),
        ("--seq-length 48", "--tokens-per-step"),
        ("--sides twin,megatron", "megatron"),
        ("--set model.router.slack", "--set"),
        ("--set model.slack=1", "model.slack"),
    ],
)
def test_options_that_do_not_fit_are_refused_by_name(options, named, tmp_path):
    with pytest.raises(ConfigError, match=named):
        run_bench(parse(f"{STEP} --sides twin", *options.split(), "--output", str(tmp_path / "r.json")))


def test_fields_of_the_recipe_can_be_overruled():
    parsed = parse(STEP, "--set", "training.recompute=full", "--set", "model.dropout=0.1")
    config = twin_config(StepSettings.of(parsed, CPU), 1)
    assert config.training.recompute == "full" and config.model.dropout == 0.1


def test_the_plain_gpt_has_the_size_of_the_400m_twin():
    parsed = parse("step --preset 400m --seq-length 256 --tokens-per-step 32768")
    config = twin_config(StepSettings.of(parsed, CPU), 1)
    settings = PlainSettings.beside(config, compiled=False, cudnn=False)
    with torch.device("meta"):
        model = baselines.PlainGpt(settings.sizes)
    assert (
        settings.sizes.vocab == 50304 and abs(sum(p.numel() for p in model.parameters()) / 404e6 - 1) < 0.01
    )
    counted = model_flops_per_token(settings.counted_as(config.model), 256, 1.0)
    matrices = 28 * 12 * 1024**2 + 50304 * 1024
    assert math.isclose(counted, 6 * matrices + 28 * 12 * 1024 * 257 / 2, rel_tol=1e-9)


def test_random_text_is_fixed_and_not_constant():
    first, again = (RandomStream(97, 16, 8, seed=3).read([1, 9]) for _ in range(2))
    assert torch.equal(first.tokens_BS, again.tokens_BS)
    assert torch.equal(first.tokens_BS[0], first.tokens_BS[1])  # position 9 of 8 samples is the second again
    assert torch.equal(first.tokens_BS[:, 1:], first.labels_BS[:, :-1])
    assert len(first.tokens_BS.unique()) > 5 and int(first.tokens_BS.max()) < 97


def test_the_spread_of_a_rate_turns_quartiles_round():
    seconds = Spread.of([1.0, 2.0, 4.0, 8.0, 16.0])
    assert (seconds.low, seconds.median, seconds.high) == (2.0, 4.0, 8.0)
    rate = seconds.inverse(16.0)
    assert (rate.low, rate.median, rate.high) == (2.0, 4.0, 8.0)
    assert Spread.of([3.0]).record("s") == {
        "median": 3.0, "quartile_low": 3.0, "quartile_high": 3.0, "samples": 1, "unit": "s",
    }  # fmt: skip
    assert format_table(["a", "bb"], [["ccc", "d"]]) == ["| a   | bb |", "|-----|----|", "| ccc | d  |"]


def test_the_options_need_no_torch():
    code = "import sys, argparse; from chiar_megatron.bench.commands import add_bench_arguments as add; "
    code += "add(argparse.ArgumentParser()); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_gaps_between_kernels_are_added_up_whatever_their_streams():
    def event(key, start, end, device_type=DeviceType.CUDA):
        return SimpleNamespace(
            key=key, time_range=SimpleNamespace(start=start, end=end), device_type=device_type
        )

    events = [event("a", 0, 100), event("b", 3100, 3200), event("c", 3150, 5200), event("b", 5200, 5300)]
    head, *lines = gap_lines([*events, event("c", 7300, 7400), event("host", 200, 300, DeviceType.CPU)])
    assert head.startswith(f"{5 / STEPS:.2f} ms a step between {5 / STEPS:.0f} kernels")  # 2.5 rounds to 2
    assert [line.split() for line in lines] == [
        [f"{3 / STEPS:.3f}", "ms", f"{1 / STEPS:.1f}x", "b"],
        [f"{2 / STEPS:.3f}", "ms", f"{1 / STEPS:.1f}x", "c"],
    ]
