"""Plans, real runs of them, and what `collect` makes of run folders in every state."""

from __future__ import annotations

import csv
import json
import os
import shutil
from pathlib import Path

import pytest
import yaml

from chiar_megatron.cli import main
from chiar_megatron.config.load import load_config
from chiar_megatron.config.schedule import parse_schedule
from chiar_megatron.data.preprocess import preprocess
from chiar_megatron.errors import ConfigError
from chiar_megatron.metrics.jsonl import read_metrics
from chiar_megatron.model.accounting import flops_per_sequence, parameter_count
from chiar_megatron.scaling.analysis import Analysis, FitSettings, analyse, save
from chiar_megatron.scaling.ladder import parse_size, parse_variant
from chiar_megatron.scaling.manifest import planned_size, read_sweep
from chiar_megatron.scaling.plan import batch_rule, lr_rule
from chiar_megatron.scaling.predict import predict_run
from chiar_megatron.scaling.table import read_table
from chiar_megatron.training.loop import resolve
from tests.unit.scaling_runs import law_runs
from tests.unit.tiny_models import sample_text, tiny_tokenizer

BASE = dict(
    model=dict(
        schedule="A*2", hidden_size=32, num_attention_heads=2, seq_length=16, norm="pre",
        router=dict(kind="learned"),
    ),
    training=dict(micro_batch_size=4, eval_steps=2),
)  # fmt: skip
GRID = ["--ladder", "32x3,48x4", "--schedules", "twin,chiar:0.5,interleave:2", "--budgets", "1e9,4e9"]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A recipe with its text."""
    folder = tmp_path_factory.mktemp("scaling")
    tokenizer = tiny_tokenizer(folder)
    (folder / "text.txt").write_text(
        "<|endoftext|>\n".join(sample_text(300, seed=i) + "\n" for i in range(12))
    )
    preprocess([folder / "text.txt"], tokenizer, folder / "data")
    data = dict(train=[str(folder / "data")], split="80,20,0", tokenizer=str(tokenizer))
    (folder / "base.yaml").write_text(yaml.safe_dump({**BASE, "data": data}))
    return folder / "base.yaml"


def plan(base: Path, folder: Path, *options: str) -> int:
    overrides = ["runtime.threads_per_process=1"]
    return main(["scaling", "plan", str(base), *overrides, "--output", str(folder), *options])


@pytest.mark.parametrize(
    ("variant", "layers", "kinds"),
    [
        ("twin", 3, "AAA"), ("chiar", 4, "DRRA"), ("chiar:0.25", 3, "DRA"),
        ("interleave:2", 4, "DADA"), ("interleave:3", 5, "DADDA"), ("interleave:2", 5, "ADADA"),
    ],
)  # fmt: skip
def test_schedules(variant, layers, kinds):
    assert "".join(parse_schedule(parse_variant(variant).schedule(layers))) == kinds


@pytest.mark.parametrize(
    "text", ["", "twins", "twin:1", "chiar:1", "chiar:x", "chiar:nan", "interleave", "interleave:1"]
)
def test_unknown_variants_are_refused(text):
    with pytest.raises(ConfigError, match="--schedules"):
        parse_variant(text)


def test_isoflop_recipes_spend_their_budget(base, tmp_path, capsys):
    assert (
        plan(base, tmp_path, *GRID, "--batch-tokens", "64", "--price", "2", "--flops-per-second", "1e9") == 0
    )
    shown = capsys.readouterr().out
    sweep = read_sweep(tmp_path)
    assert len(sweep.runs) == 12 and "12 runs" in shown and all(run.name in shown for run in sweep.runs)
    for run in sweep.runs:
        config = load_config(sweep.recipe(run))
        resolved = resolve(config)
        training = config.training
        assert training.global_batch_size == 4 and config.run_dir == run.run_dir
        assert run.tokens == training.steps * 4 * 16
        # The last step may be rounded away; a step of the largest model is 4% of the small budget.
        assert run.training_flops == pytest.approx(run.budget, rel=0.03)
        assert (run.parameters, run.parameters_non_embedding) == (
            parameter_count(resolved.model).total, parameter_count(resolved.model).non_embedding
        )  # fmt: skip
        assert config.optimizer.lr == pytest.approx(lr_rule(run.budget))
        assert config.optimizer.decay_steps is None and config.data.cache_dir is None
        heads = config.model.hidden_size // config.model.num_attention_heads
        assert heads == 16 and run.device_hours == pytest.approx(run.training_flops / 1e9 / 3600)
    by_name = {run.variant: run.attention_share for run in sweep.runs if run.size == "48x4"}
    assert by_name == {"twin": 1.0, "chiar:0.5": 0.5, "interleave:2": 0.5}
    more = ["--ladder", "64x3", "--budgets", "9e9", "--schedules", "twin", "--batch-tokens", "64"]
    assert plan(base, tmp_path, *more) == 2 and "add to it with --add" in capsys.readouterr().err
    assert plan(base, tmp_path, *more, "--add", "--held-out") == 0
    both = read_sweep(tmp_path)
    assert [run.held_out for run in both.runs] == [False] * 12 + [True]
    assert main(["scaling", "collect", str(tmp_path), "--held-out"]) == 0
    assert [row["size"] for row in read_table(tmp_path / "held_out.csv")] == ["64x3"]
    assert not (tmp_path / "runs.csv").exists()  # the table that is fitted
    assert both.rules[0].startswith("32x3, 48x4: batch 64 tokens") and any(
        rule.startswith("64x3:") for rule in both.rules
    )


def test_every_batch_validates_on_equal_text_and_added_runs_are_sorted(base, tmp_path, capsys):
    """The base validates on 2 batches of 8 sequences, whatever the batch that a run is given."""
    few = ["--ladder", "32x3", "--schedules", "twin", "--add"]
    for budget, batch in (("8e9", 128), ("2e9", 64), ("4e9", 32)):
        assert plan(base, tmp_path, *few, "--budgets", budget, "--batch-tokens", str(batch)) == 0
    sweep = read_sweep(tmp_path)
    assert [run.budget for run in sweep.runs] == [2e9, 4e9, 8e9]
    steps = [load_config(sweep.recipe(run)).training.eval_steps for run in sweep.runs]
    assert [run.global_batch_size for run in sweep.runs] == [4, 2, 8] and steps == [4, 8, 2]
    text = json.loads((base.parent / "data.json").read_text())["tokens"] * 0.8
    shown = capsys.readouterr().out
    assert f"1 runs read their text of {text:,.0f} tokens up to" in shown
    assert sweep.runs[-1].tokens > text > sweep.runs[0].tokens


def test_a_measured_fraction_counts_where_no_target_holds_it(base, tmp_path):
    """A run folder that has logged two layers' shares, of which a tenth overflowed."""
    (tmp_path / "run").mkdir()
    record = dict(step=2, routed_fraction=[0.2, 0.4], overflow_fraction=[0.0, 0.5])
    (tmp_path / "run" / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    measured = ["--measured", str(tmp_path / "run"), "--ladder", "32x4", "--budgets", "4e9"]
    assert plan(base, tmp_path / "sweep", *measured, "--schedules", "twin,chiar,chiar:0.5") == 0
    shares = {run.variant: run.attention_share for run in read_sweep(tmp_path / "sweep").runs}
    assert shares == pytest.approx({"twin": 1.0, "chiar": (0.2 * 2 + 1) / 4, "chiar:0.5": 0.5})
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 2}\n')
    assert plan(base, tmp_path / "other", *measured) == 2


def test_other_kinds_of_sweep(base, tmp_path):
    few = ["--ladder", "32x3", "--schedules", "twin"]
    assert plan(base, tmp_path / "ratio", *few, "--kind", "ratio", "--ratios", "5,10") == 0
    ratios = [run.tokens / run.parameters for run in read_sweep(tmp_path / "ratio").runs]
    assert ratios == pytest.approx([5, 10], rel=0.03)
    assert plan(base, tmp_path / "lr", *few, "--kind", "lr", "--budgets", "4e9", "--lr-factors", "0.5,2") == 0
    rates = [
        load_config(tmp_path / "lr" / run.recipe).optimizer.lr for run in read_sweep(tmp_path / "lr").runs
    ]
    assert rates == pytest.approx([lr_rule(4e9) / 2, lr_rule(4e9) * 2])


def test_the_published_rule_of_batch_and_rate():
    """DeepSeek LLM, section 3.1 and table 2: at 2.94e20... a batch of about 1.5M tokens for 1e21."""
    assert batch_rule(1e21) == pytest.approx(2.17e6, rel=0.02) and lr_rule(1e21) == pytest.approx(
        7.4e-4, rel=0.02
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--ladder", "32-3", "--budgets", "1e9"], "--ladder: '32-3' must be"),
        (["--ladder", "40x3", "--budgets", "1e9"], "hidden size 40 of 40x3 is not divisible"),
        (["--ladder", "32x2", "--budgets", "1e9"], "2 layers are too few for chiar"),
        (["--ladder", "32x3"], "--budgets: empty"),
        (["--ladder", "32x3", "--budgets", "-1"], "--budgets: -1.0 must be"),
        (["--ladder", "32x3,32x3", "--budgets", "1e9"], "--ladder: names one twice"),
        (["--ladder", "32x3", "--budgets", "10"], "no run is left"),
        (["--ladder", "32x3", "--budgets", "9e9,9.001e9"], "two runs would be called twin_32x3_c9e09"),
        (["--ladder", "32x3", "--budgets", "1e9", "--min-ratio", "nan"], "--min-ratio: nan must be"),
    ],
)
def test_bad_plans_are_refused(base, tmp_path, capsys, options, message):
    assert plan(base, tmp_path, *options) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "sweep.json").exists()
    with pytest.raises(ConfigError, match="--ladder"):
        parse_size("0x3")


def test_submit_runs_what_is_left_and_collect_tells_every_state(base, tmp_path, capsys):
    folder = tmp_path / "sweep"
    options = [
        "--ladder",
        "32x3",
        "--schedules",
        "twin,chiar:0.5",
        "--budgets",
        "5e8",
        "--batch-tokens",
        "64",
    ]
    assert plan(base, folder, *options) == 0
    twin, chiar = read_sweep(folder).runs
    assert main(["scaling", "submit", str(folder)]) == 0
    capsys.readouterr()
    assert main(["scaling", "collect", str(folder)]) == 0
    assert "2 finished" in capsys.readouterr().out
    rows = read_table(folder / "runs.csv")
    summary = json.loads((base.parent / "data.json").read_text())
    assert {row["tokenizer"] for row in rows} == {summary["tokenizer_sha256"][:12]}
    assert {int(row["vocab_size"]) for row in rows} == {summary["tokenizer_vocab_size"]}
    records = read_metrics(Path(chiar.run_dir))
    fraction = sum(r["routed_fraction"][0] for r in records) / len(records)
    model = resolve(load_config(folder / chiar.recipe)).model
    for row, run in zip(rows, (twin, chiar), strict=True):
        assert int(row["tokens"]) == run.tokens and int(row["parameters"]) == run.parameters
        assert row["loss_kind"] == "validation" and float(row["device_seconds"]) > 0
        assert [float(row["loss"])] == list(read_metrics(Path(run.run_dir))[-1]["validation"].values())
    assert float(rows[1]["attention_share"]) == pytest.approx((0 + fraction + 1) / 3)
    useful = flops_per_sequence(model, 16, fraction).total("training").useful / 16 * chiar.tokens
    assert float(rows[1]["useful_flops"]) == pytest.approx(useful, rel=1e-6)
    assert float(rows[0]["training_flops"]) == pytest.approx(twin.training_flops, rel=1e-9)

    exit_file = Path(twin.run_dir) / "exit.json"
    before = exit_file.stat().st_mtime_ns
    shutil.rmtree(chiar.run_dir)
    assert status(folder, capsys) == {twin.name: "finished", chiar.name: "missing"}
    (tmp_path / "cluster.yaml").write_text("gpus_per_node: 1\n")
    slurm = ["--slurm", f"--cluster={tmp_path}/cluster.yaml", "--throttle=1", "--dry-run"]
    assert main(["scaling", "submit", str(folder), *slurm]) == 0
    shown = capsys.readouterr()
    assert "#SBATCH --array=0-0%1" in shown.out and f"RUN_DIRS=({chiar.run_dir})" in shown.out
    assert f"{twin.name} is finished: left out" in shown.err
    assert main(["scaling", "submit", str(folder), "--throttle=1"]) == 2
    assert "give --slurm too" in capsys.readouterr().err
    law = a_law(tmp_path / "law")
    assert main(["scaling", "submit", str(folder), "--fit", str(tmp_path / "law")]) == 0
    assert exit_file.stat().st_mtime_ns == before  # the finished one was not run again
    predicted = predict_run(
        law, n=chiar.parameters_non_embedding, d=chiar.tokens, flops=None, rho=chiar.attention_share
    )
    shown = capsys.readouterr().out
    assert f"predicted before it starts: loss {predicted.loss.value:.4f}, 95%" in shown
    assert f"loss {float(rows[1]['loss']):.4f}; predicted {predicted.loss.value:.4f}" in shown
    assert json.loads((folder / "predictions.jsonl").read_text())["loss"] == predicted.loss.value
    with pytest.raises(ConfigError, match="its N is the column 'Model Size'"):
        planned_size(chiar, "Model Size")
    assert status(folder, capsys)[chiar.name] == "finished"
    states(folder, Path(chiar.run_dir), chiar.name, capsys)


def a_law(folder: Path) -> Analysis:
    """A fit whose N leaves embeddings out."""
    settings = FitSettings(resamples=20)
    law = analyse(law_runs(noise=0.01, gamma=0.3), "runs.csv", settings, "parameters_non_embedding")
    save(law, folder / "fit.json")
    return law


def states(folder: Path, run_dir: Path, name: str, capsys) -> None:
    """What is left of a run by a failure, a stop, a kill, and while it runs."""
    for code, expected in ((2, "failed"), (75, "stopped")):
        (run_dir / "exit.json").write_text(json.dumps(dict(reason="because", step=1, exit_code=code)))
        assert status(folder, capsys)[name] == expected
    (run_dir / "exit.json").write_text("{")
    assert status(folder, capsys)[name] == "failed"
    (run_dir / "exit.json").unlink()
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 99, "lo')  # being written
    assert status(folder, capsys)[name] == "running"
    for path in run_dir.iterdir():
        os.utime(path, (0, 0))
    assert status(folder, capsys)[name] == "stopped"
    (run_dir / "config.yaml").write_text("model: [")
    assert status(folder, capsys)[name] == "failed"


def status(folder: Path, capsys) -> dict[str, str]:
    assert main(["scaling", "collect", str(folder), "--output", str(folder / "now.csv")]) == 0
    capsys.readouterr()
    with (folder / "now.csv").open() as file:
        return {row["run"]: row["status"] for row in csv.DictReader(file)}


def test_a_sweep_without_the_runs_that_are_asked_for(base, tmp_path, capsys):
    one = ["--ladder", "32x3", "--schedules", "twin", "--budgets", "5e8", "--batch-tokens", "64"]
    for folder, given, asked, said in (
        (tmp_path / "a", [], ["--held-out"], "has no held-out runs; plan them with --held-out"),
        (tmp_path / "b", ["--held-out"], [], "has only held-out runs; give --held-out"),
    ):
        assert plan(base, folder, *one, *given) == 0
        capsys.readouterr()
        for verb in ("collect", "submit"):
            assert main(["scaling", verb, str(folder), *asked]) == 2
            assert capsys.readouterr().err == f"chiar: {folder} {said}\n"
        assert not list(folder.glob("*.csv"))


def test_tables_are_files_with_a_known_ending(base, tmp_path, capsys):
    one = ["--ladder", "32x3", "--schedules", "twin", "--budgets", "5e8", "--batch-tokens", "64"]
    folder = tmp_path / "sweep"
    assert plan(base, folder, *one) == 0
    for arguments, said in (
        (["collect", str(folder), "--output", str(tmp_path / "x.txt")], "must end in .csv or .parquet"),
        (["fit", str(folder)], f"table {folder} is a folder; give a .csv, .tsv or .parquet"),
    ):
        capsys.readouterr()
        assert main(["scaling", *arguments]) == 2
        told = capsys.readouterr().err
        assert said in told and told.count("\n") == 1
    assert not (tmp_path / "x.txt").exists()


def test_parquet_holds_what_csv_holds(tmp_path):
    pytest.importorskip("pyarrow")
    from chiar_megatron.scaling.table import write_table

    rows = [dict(run='a "b", c', n=3, loss=0.1, gap=None), dict(run="d", n=4, loss=1e-9, gap=2.5)]
    for name in ("t.csv", "t.parquet"):
        write_table(tmp_path / name, rows)
    assert read_table(tmp_path / "t.parquet") == rows
    assert [{k: str(v if v is not None else "") for k, v in row.items()} for row in rows] == read_table(
        tmp_path / "t.csv"
    )
