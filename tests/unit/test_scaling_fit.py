"""Laws: recovered from runs that obey them, against plain formulas and scipy's own minimisers."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import scipy.special
from scipy.optimize import approx_fprime, brentq, minimize_scalar

from chiar_megatron.cli import main
from chiar_megatron.errors import ConfigError, DataError
from chiar_megatron.scaling.analysis import FitSettings, analyse, load, save
from chiar_megatron.scaling.bootstrap import bootstrap
from chiar_megatron.scaling.doubts import warnings
from chiar_megatron.scaling.fit import HuberProblem, fit_point
from chiar_megatron.scaling.isoflop import fit_isoflop, rho_groups
from chiar_megatron.scaling.law import Runs
from chiar_megatron.scaling.predict import efficiency_multiplier, optimum, predict_run
from chiar_megatron.scaling.table import write_table
from tests.unit.scaling_runs import TRUTH, law_runs, plain_loss, write_csv

COLUMNS = dict(n="Model Size", flops="Training FLOP", loss="final loss", d="tok")
OPTIONS = ["--n", "Model Size", "--loss", "final loss", "--json"]


def fit_json(capsys, *arguments: str) -> dict:
    assert main(["scaling", "fit", *arguments]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.mark.parametrize("method", ["lbfgs", "varpro"])
def test_a_law_without_noise_is_recovered(tmp_path, capsys, method):
    table = write_csv(tmp_path / "runs.csv", law_runs(), **COLUMNS)
    options = [*OPTIONS, "--flops", "Training FLOP", "--bootstrap", "0", "--method", method]
    found = fit_json(capsys, str(table), *options)  # D = C/6N
    for name, value in TRUTH.items():
        assert found[name] == pytest.approx(value, rel=2e-3), name
    assert found["warnings"] == [] and found["held_out"]["mean_absolute_error"] < 1e-4


def test_the_huber_loss_and_its_gradient_are_those_of_the_formula():
    runs = law_runs(noise=0.02, gamma=0.3)
    problem = HuberProblem(runs, 1e-2)
    values = np.array([1.7, 400.0, 2500.0, 0.33, 0.38, 0.2])
    theta = problem.centred.theta(values)
    assert problem.centred.plain(theta) == pytest.approx(values)
    E, A, B, alpha, beta, gamma = values
    predicted = E + A / (runs.n * np.exp(gamma * (runs.rho - 1))) ** alpha + B / runs.d**beta
    expected = scipy.special.huber(1e-2, np.log(predicted / runs.loss)).sum()
    assert problem.objective(theta) == pytest.approx(expected, rel=1e-10)
    numeric = approx_fprime(theta, lambda t: problem.value(t)[0], 1e-7)
    assert problem.value(theta)[1] == pytest.approx(numeric, rel=1e-4, abs=1e-5)


def test_both_methods_find_the_same_minimum_of_noisy_runs():
    runs = law_runs(noise=0.01, seed=3, gamma=0.3)
    first, second = fit_point(runs, 1e-3, "lbfgs"), fit_point(runs, 1e-3, "varpro")
    assert second.objective == pytest.approx(first.objective, rel=1e-4)
    assert second.law.values() == pytest.approx(first.law.values(), rel=0.02)


def test_intervals_cover_the_truth():
    hits = np.zeros(6)
    truth = np.array([*TRUTH.values(), 0.3])
    for simulation in range(10):
        runs = law_runs(noise=0.01, seed=simulation, gamma=0.3)
        draws = bootstrap(runs, fit_point(runs), resamples=100, seed=simulation)
        ends = np.array([draws.interval(draws.values[:, place]) for place in range(6)])
        hits += (ends[:, 0] <= truth) & (truth <= ends[:, 1])
    assert hits.min() >= 8, hits
    assert (ends[3:5, 1] - ends[3:5, 0] < 0.3).all()  # an interval over everything would cover, too


@pytest.mark.parametrize("rho_on", ["n", "d", "both"])
def test_optimum_and_multiplier_are_those_of_a_search(tmp_path, rho_on):
    analysis = analyse(law_runs(gamma=0.3, rho_on=rho_on), "runs.csv", FitSettings(resamples=20))
    assert analysis.runs.rho_on == rho_on and analysis.law.gamma == pytest.approx(
        0.3, rel=1e-3
    )  # found by itself
    save(analysis, tmp_path / "fit.json")
    again = load(tmp_path)
    assert json.dumps(again.summary()) == json.dumps(analysis.summary())

    def best(budget: float, rho: float) -> tuple[float, float]:
        cost = 6.0 if rho == 1.0 else 4.8
        loss = lambda x: plain_loss(np.exp(x), budget / cost / np.exp(x), rho, 0.3, rho_on)  # noqa: E731
        found = minimize_scalar(loss, bracket=(15, 22), options={"xtol": 1e-10})
        return float(np.exp(found.x)), float(found.fun)

    for rho in (1.0, 0.4):
        n, loss = best(1e20, rho)
        found = optimum(again, 1e20, rho=rho)
        assert found.n.value == pytest.approx(n, rel=0.01) and found.loss.value == pytest.approx(
            loss, rel=1e-3
        )
        assert found.n.value * found.d.value * (6.0 if rho == 1.0 else 4.8) == pytest.approx(1e20, rel=0.01)
    target = best(1e20, 0.4)[1]
    twin_budget = np.exp(brentq(lambda x: best(np.exp(x), 1.0)[1] - target, np.log(1e19), np.log(1e21)))
    for seconds in (False, True):
        found = efficiency_multiplier(again, 0.4, seconds=seconds)
        assert found.value == pytest.approx(twin_budget / 1e20, rel=0.01)
        assert found.interval[0] <= found.value * 1.001 and found.interval[1] >= found.value * 0.999
    one = predict_run(again, n=1e9, d=2e10, flops=None)
    assert one.loss.value == pytest.approx(plain_loss(1e9, 2e10), rel=1e-3) and one.flops == pytest.approx(
        1.2e20
    )
    limit = predict_run(again, n=1e9, d=None, flops=None)
    assert limit.loss.value == pytest.approx(plain_loss(1e9, np.inf), rel=1e-3)
    with pytest.raises(ConfigError, match="give two of"):
        predict_run(again, n=None, d=None, flops=1e20)


def test_a_single_run_lies_in_its_interval_about_as_often_as_said():
    analysis = analyse(law_runs(noise=0.01, seed=1), "runs.csv", FitSettings(resamples=200))
    new, inside = law_runs(noise=0.01, seed=2), 0
    for n, d, loss in zip(new.n, new.d, new.loss, strict=True):
        low, high = predict_run(analysis, n=n, d=d, flops=None).run_interval
        inside += low <= loss <= high
    assert 0.85 * len(new) <= inside


def only(runs: Runs, keep) -> Runs:
    return runs.take(np.flatnonzero(keep))


@pytest.mark.parametrize(
    ("runs", "said"),
    [
        (
            Runs(np.repeat([1e8, 2e8], 6), np.tile(np.geomspace(1e9, 1e11, 6), 2), np.ones(12)),
            "2 value(s) of N",
        ),
        (Runs(*(lambda n: (n, 20 * n, np.ones(12)))(np.geomspace(1e7, 1e10, 12))), "lie on one line"),
        (Runs(*(lambda r: (r.n, r.d, r.loss, np.full(len(r), 0.5)))(law_runs())), "gamma cannot be told"),
    ],
)
def test_what_cannot_be_told_is_said(runs, said):
    rho = 1.0 if runs.rho is None else runs.rho
    runs = Runs(runs.n, runs.d, plain_loss(runs.n, runs.d, rho), runs.rho)
    assert any(said in warning for warning in warnings(runs, fit_point(runs), None))


def test_loose_intervals_and_bounds_are_said():
    runs = only(law_runs(noise=0.02), law_runs().flops < 5e18)
    fit = fit_point(runs)
    said = " ".join(warnings(runs, fit, bootstrap(runs, fit, resamples=60)))
    assert "hardly identified" in said or "not identified" in said or "falls to 0" in said


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({"Model Size": "Model Sise"}, [], "has no column 'Model Size' (--n); nearest: Model Sise"),
        ({"final loss": "x"}, [], "has no column 'final loss' (--loss)"),
        ({"\n1": "\nnan"}, [], "row 1, column 'Model Size': 'nan8257418.583505537' is not a finite number"),
        ({"\n1": "\n-1"}, [], "row 1, column 'Model Size': '-1"),
        ({"Training FLOP": "other", "tok": "else"}, ["--flops", "C"], "has no column 'C'"),
        ({}, ["--drop-highest-loss", "40"], "2 runs are too few for a law of 5 parameters"),
        ({}, ["--drop-highest-loss", "42"], "--drop-highest-loss: 42 must be"),
        ({}, ["--delta", "0"], "--delta: 0.0 must be above 0"),
        ({}, ["--bootstrap", "1000000000000"], "--bootstrap: 1000000000000 must be 0 or from 20 to"),
        ({}, ["--d", "final loss"], "column 'final loss': is both --d and --loss"),
        ({}, ["--rho-on", "d"], "--rho-on: d, but the law has no ρ"),
        ({}, ["--where", "tok"], "has no '='"),
        ({}, ["--rho", "tok"], "must be a share of attention, from 0 to 1"),
        ({}, ["--rho", "tok", "--no-rho"], "--rho tok: --no-rho contradicts it"),
        ({"tok": "final loss"}, [], "two columns 'final loss'"),
    ],
)
def test_bad_tables_are_refused_in_one_line(tmp_path, capsys, change, options, message):
    path = write_csv(tmp_path / "runs.csv", law_runs(), **COLUMNS)
    text = path.read_text()
    for old, new in change.items():
        text = text.replace(old, new, 1)
    path.write_text(text)
    if "--flops" not in options:
        options = [*options, "--flops", "Training FLOP"]
    assert main(["scaling", "fit", str(path), *OPTIONS, *options]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def write_rows(path, rows: list[dict]) -> str:
    write_table(path, rows)
    return str(path)


def rows_of(runs: Runs, **more) -> list[dict]:
    """Rows as `collect` names them; more: values for every second row, and for the others."""
    named = dict(parameters=runs.n, tokens=runs.d, loss=runs.loss, training_flops=runs.flops)
    rows = [dict(zip(named, map(float, values), strict=True)) for values in zip(*named.values(), strict=True)]
    for place, row in enumerate(rows):
        row.update({column: pair[place % 2] for column, pair in more.items()})
    return rows


def test_losses_that_cannot_be_compared_are_refused_or_noted(tmp_path, capsys):
    runs, path = law_runs(noise=0.01), tmp_path / "runs.csv"
    for column, pair in (("tokenizer", ("aa", "bb")), ("vocab_size", (1024, 512))):
        assert main(["scaling", "fit", write_rows(path, rows_of(runs, **{column: pair}))]) == 2
        error = capsys.readouterr().err
        assert f"pick one, --where {column}={pair[0]}" in error and error.count("\n") == 1
        # One kind beside rows that do not say is no contradiction.
        table = write_rows(path, rows_of(runs, **{column: (pair[0], "")}))
        assert fit_json(capsys, table, "--bootstrap", "0", "--json")["runs"] == len(runs)
    differing = rows_of(
        runs, device=("cpu", "H100"), loss_kind=("validation", "training"), device_seconds=(1, 2)
    )
    assert main(["scaling", "fit", write_rows(path, differing), "--bootstrap", "0"]) == 0
    shown = capsys.readouterr().out
    assert "differ in loss_kind (training, validation)" in shown
    assert "different devices (H100, cpu): seconds are left out" in shown
    equal = [{**row, "loss": 3.0} for row in rows_of(runs)]
    assert main(["scaling", "fit", write_rows(path, equal)]) == 2
    assert "column 'loss': all 42 losses are 3, which no law" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("column", "factor", "said"),
    [
        ("tokens", 1e-9, "D/N is"),
        ("training_flops", 1e-15, "training FLOPs are"),
        ("loss", 10.0, "is it a perplexity?"),
    ],
)
def test_units_that_cannot_be_right_are_said(tmp_path, capsys, column, factor, said):
    rows = [{**row, column: row[column] * factor} for row in rows_of(law_runs(noise=0.01))]
    found = fit_json(capsys, write_rows(tmp_path / "runs.parquet", rows), "--bootstrap", "0", "--json")
    assert any(said in warning for warning in found["warnings"])


def test_costs_that_n_does_not_tell_are_said():
    runs = law_runs(noise=0.01)
    slow = np.where(np.arange(len(runs)) % 2, 1.0, 9.0)  # another program on the machine
    timed = replace(runs, seconds=runs.flops * 1e-12 * slow)
    said = analyse(timed, "runs.csv", FitSettings(resamples=0)).warnings
    assert any("device seconds a token do not follow" in warning for warning in said)
    assert analyse(runs, "runs.csv", FitSettings(resamples=0)).warnings == ()


def test_shares_that_scatter_about_a_round_number_are_one_group():
    runs = law_runs(gamma=0.3)
    scatter = np.random.default_rng(0).uniform(-0.01, 0.01, len(runs))
    runs = replace(runs, rho=np.where(runs.rho < 1, 0.35 + scatter, 1.0))  # a fourth routed, five layers
    groups = rho_groups(runs)
    assert [len(rows) for rows in groups] == [42, 42] and (runs.rho[groups[0]] == 1).all()
    parabolas = fit_isoflop(runs).parabolas
    assert len(parabolas) == 12 and all(parabola.runs == 7 for parabola in parabolas)


def test_empty_missing_and_foreign_tables(tmp_path, capsys):
    (tmp_path / "runs.csv").write_text("a,b\n")
    (tmp_path / "torn.parquet").write_bytes(b"PAR1 not really")
    for name, message in (
        ("runs.csv", "no rows"),
        ("rums.csv", "nearest: runs.csv"),
        ("torn.parquet", "cannot be read"),
    ):
        assert main(["scaling", "fit", str(tmp_path / name)]) == 2
        assert message in capsys.readouterr().err
    for foreign in ("[1]", '{"format": 2, "runs": {}}', "{"):
        (tmp_path / "fit.json").write_text(foreign)
        with pytest.raises(DataError, match="is not a fit"):
            load(tmp_path)


def test_fit_writes_figures_and_one_page_and_predict_reads_them(tmp_path):
    table = write_csv(tmp_path / "runs.csv", law_runs(noise=0.005, gamma=0.3), rho="share", **COLUMNS)
    tool = [sys.executable, "tools/scaling_laws.py"]
    options = [
        "--d",
        "tok",
        "--flops",
        "Training FLOP",
        "--rho",
        "share",
        "--bootstrap",
        "40",
        "--output",
        str(tmp_path / "law"),
    ]
    done = subprocess.run([*tool, "fit", str(table), *OPTIONS[:-1], *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["isoflop"]["n_exponent"] == pytest.approx(0.51, abs=0.06)
    for name, start in (
        ("curves.png", b"\x89PNG"),
        ("isoflop.png", b"\x89PNG"),
        ("curves.svg", b"<?xml"),
        ("isoflop.svg", b"<?xml"),
    ):
        assert (tmp_path / "law" / name).read_bytes().startswith(start)
    page = (tmp_path / "law" / "report.html").read_text()
    assert (
        page.count("data:image/png;base64,") == 2
        and 'src="http' not in page
        and "Efficiency multiplier" in page
    )
    ask = ["predict", str(tmp_path / "law"), "--optimum", "1e20", "--rho", "0.4", "--multiplier"]
    done = subprocess.run([*tool, *ask], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    low, high = figures["multiplier"]["flops"]["interval"]
    assert low < np.exp(0.6 * (np.log(1 / 0.8) / 0.6 - 0.3)) < high  # exp((1-ρ)(q - pγ))
    far = [*tool, "predict", str(tmp_path / "law"), "--optimum", "3e22"]
    assert "extrapolated to 30 times" in subprocess.run(far, capture_output=True, text=True).stdout
