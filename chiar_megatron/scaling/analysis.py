"""One fit with all that is known about it, and the file that keeps it for `predict`, plots and reports."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from chiar_megatron.checkpoint.files import write_durably
from chiar_megatron.config.fields import nearest_name
from chiar_megatron.errors import ConfigError, DataError
from chiar_megatron.scaling.bootstrap import Draws, HeldOut, bootstrap, held_out_error
from chiar_megatron.scaling.cost import CostModel, fit_cost
from chiar_megatron.scaling.doubts import implausible, unfit_costs, warnings
from chiar_megatron.scaling.fit import Method, PointFit, fit_point
from chiar_megatron.scaling.isoflop import IsoFlop, fit_isoflop
from chiar_megatron.scaling.law import RHO_ON, Array, CentredRuns, Law, RhoOn, Runs, law_of, predict_loss

FORMAT = 2
_MOST_RESAMPLES = 100_000


@dataclass(frozen=True)
class FitSettings:
    """How to fit."""

    method: Method = "lbfgs"
    """L-BFGS from a grid of starts, or variable projection; resamples always descend by L-BFGS."""
    delta: float = 1e-3
    """Huber's δ, of ln loss."""
    resamples: int = 1000
    """Of the bootstrap; 0 for no intervals."""
    seed: int = 0
    """Of the resamples."""
    rho_on: RhoOn | None = None
    """What ρ acts on; None: what fits best."""
    level: float = 0.95
    """Of intervals."""

    def check(self) -> None:
        """Raises ConfigError for a setting out of its range."""
        if not (math.isfinite(self.delta) and self.delta > 0):
            raise ConfigError(f"--delta: {self.delta} must be above 0, such as 1e-3")
        if self.resamples != 0 and not 20 <= self.resamples <= _MOST_RESAMPLES:
            raise ConfigError(
                f"--bootstrap: {self.resamples} must be 0 or from 20 to {_MOST_RESAMPLES}, such as 1000"
            )
        if not 0 < self.level < 1:
            raise ConfigError(f"--level: {self.level} must lie between 0 and 1, such as 0.95")
        if self.seed < 0:
            raise ConfigError(f"--seed: {self.seed} must be 0 or more")

    def check_form(self, runs: Runs) -> None:
        """Raises ConfigError where ρ is to act in a law that has none."""
        if self.rho_on is not None and runs.rho is None:
            raise ConfigError(f"--rho-on: {self.rho_on}, but the law has no ρ; name its column by --rho")


@dataclass(frozen=True)
class Analysis:
    """A fitted law, its intervals, its costs and its warnings."""

    settings: FitSettings
    source: str
    """The table."""
    n_column: str
    """What counts as N: the table's column."""
    runs: Runs
    law: Law
    objective: float
    residuals: Array
    """ln observed - ln predicted, `[runs]`."""
    draws: Draws | None
    flops: CostModel
    seconds: CostModel | None
    """None: no device time was measured."""
    held_out: HeldOut | None
    isoflop: IsoFlop | None
    """None: the runs do not come in budgets."""
    warnings: tuple[str, ...]

    def intervals(self) -> dict[str, tuple[float, float]]:
        """By parameter; empty without a bootstrap."""
        if self.draws is None:
            return {}
        names = self.law.names
        return {name: self.draws.interval(self.draws.values[:, i]) for i, name in enumerate(names)}

    def summary(self) -> dict[str, Any]:
        """The figures of the JSON line."""
        figures: dict[str, Any] = dict(zip(self.law.names, self.law.values().tolist(), strict=True))
        figures["rho_on"] = None if self.law.gamma is None else self.runs.rho_on
        figures["n_column"] = self.n_column
        figures["runs"] = len(self.runs)
        figures["objective"] = self.objective
        if self.draws is not None:
            figures["intervals"] = self.intervals()
            figures["level"] = self.draws.level
            figures["resamples"] = len(self.draws.values)
        figures["held_out"] = None if self.held_out is None else asdict(self.held_out)
        figures["isoflop"] = None if self.isoflop is None else self.isoflop.summary()
        figures["warnings"] = list(self.warnings)
        return figures

    def lines(self) -> Iterator[str]:
        """The same for people."""
        form = "E + A/N^alpha + B/D^beta"
        if self.law.gamma is not None:
            what = {"n": "N", "d": "D", "both": "N and D"}[self.runs.rho_on]
            form += f", {what} times exp(gamma(rho-1))"
        yield f"{self.source}: {len(self.runs)} runs; loss = {form}; N: {self.n_column}"
        intervals = self.intervals()
        for name, value in zip(self.law.names, self.law.values(), strict=True):
            low, high = intervals.get(name, (None, None))
            tail = "" if low is None else f"   {self.settings.level:.0%} {low:.5g} to {high:.5g}"
            yield f"  {name:5s} {value:12.6g}{tail}"
        yield f"  residuals: median |ln observed - ln predicted| {np.median(np.abs(self.residuals)):.2%}"
        k, p, q = self.flops.coefficients
        yield (
            f"  FLOPs a token = {np.exp(k):.4g}·N^{p:.4g}"
            + (f"·exp({q:.3g}(rho-1))" if q else "")
            + f", within {self.flops.worst_error:.1%} of every run"
        )
        if self.held_out is not None:
            held = self.held_out
            yield (
                f"  fitted without the {held.runs} largest runs ({held.extrapolation:.3g}× as large): "
                f"mean error {held.mean_error:+.4f} nats, worst {held.worst_relative_error:.2%}"
            )
        if self.isoflop is not None:
            yield from self.isoflop.lines()
        for warning in self.warnings:
            yield f"  warning: {warning}"


def analyse(runs: Runs, source: str, settings: FitSettings, n_column: str = "parameters") -> Analysis:
    """Fit, bootstrap and judge. Raises DataError for too few runs."""
    runs, fit = _fit_best_form(runs, settings)
    draws = None
    if settings.resamples > 0:
        draws = bootstrap(
            runs,
            fit,
            resamples=settings.resamples,
            delta=settings.delta,
            seed=settings.seed,
            level=settings.level,
        )
    assert runs.flops is not None
    index = None if draws is None else draws.index
    flops = fit_cost(runs, runs.flops, index)
    seconds = None if runs.seconds is None else fit_cost(runs, runs.seconds, index)
    return Analysis(
        settings=settings,
        source=source,
        n_column=n_column,
        runs=runs,
        law=fit.law,
        objective=fit.objective,
        residuals=-CentredRuns(runs).residuals(fit.theta)[0],
        draws=draws,
        flops=flops,
        seconds=seconds,
        held_out=held_out_error(runs, settings.delta),
        isoflop=fit_isoflop(runs),
        warnings=(*implausible(runs), *warnings(runs, fit, draws), *unfit_costs(flops, seconds)),
    )


def _fit_best_form(runs: Runs, settings: FitSettings) -> tuple[Runs, PointFit]:
    """With ρ: on N, on D or on both, whichever fits best, if the settings do not say."""
    forms: Sequence[RhoOn] = RHO_ON if settings.rho_on is None else (settings.rho_on,)
    tried = [replace(runs, rho_on=form) for form in (forms if runs.rho is not None else RHO_ON[:1])]
    fits = [(form, fit_point(form, settings.delta, settings.method)) for form in tried]
    return min(fits, key=lambda pair: pair[1].objective)


def save(analysis: Analysis, path: Path) -> None:
    """Write all that `predict` needs. Raises DataError if it cannot."""
    record = {
        "format": FORMAT,
        "settings": asdict(analysis.settings),
        "source": analysis.source,
        "n_column": analysis.n_column,
        "runs": {name: value.tolist() for name, value in analysis.runs.columns().items()},
        "rho_on": analysis.runs.rho_on,
        "names": analysis.law.names,
        "values": analysis.law.values().tolist(),
        "summary": analysis.summary(),
        "draws": None if analysis.draws is None else analysis.draws.values.tolist(),
        "index": None if analysis.draws is None else analysis.draws.index.tolist(),
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_durably(path, json.dumps(record))
    except OSError as error:
        raise DataError(f"{path} cannot be written ({error.strerror}); choose another --output") from error


def load(path: Path) -> Analysis:
    """Read what `save` wrote; path: the file, or its folder. Raises DataError if it is none."""
    file = path / "fit.json" if path.is_dir() else path
    if not file.is_file():
        folder = file.parent
        names = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
        raise DataError(
            f"fit {file} does not exist{nearest_name(file.name, names)}; `chiar scaling fit` makes it"
        )
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        if record["format"] != FORMAT:
            raise DataError(f"fit {file} has format {record['format']}, not {FORMAT}; fit again")
        columns = {name: np.array(value, dtype=np.float64) for name, value in record["runs"].items()}
        runs = Runs(**columns, rho_on=record["rho_on"])
        settings = FitSettings(**record["settings"])
        law = law_of(np.array(record["values"]))
        draws = None
        if record["draws"] is not None:
            draws = Draws(np.array(record["draws"]), np.array(record["index"]), settings.level)
        summary = record["summary"]
        held_out = None if summary["held_out"] is None else HeldOut(**summary["held_out"])
        objective, doubts = float(summary["objective"]), tuple(map(str, summary["warnings"]))
        source, n_column = str(record["source"]), str(record["n_column"])
        assert runs.flops is not None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{file} is not a fit of `chiar scaling fit` ({error}); fit again") from error
    index = None if draws is None else draws.index
    predicted = predict_loss(law.values(), runs.n, runs.d, 1.0 if runs.rho is None else runs.rho, runs.rho_on)
    return Analysis(
        settings=settings,
        source=source,
        n_column=n_column,
        runs=runs,
        law=law,
        objective=objective,
        residuals=np.log(runs.loss / predicted),
        draws=draws,
        flops=fit_cost(runs, runs.flops, index),
        seconds=None if runs.seconds is None else fit_cost(runs, runs.seconds, index),
        held_out=held_out,
        isoflop=fit_isoflop(runs),
        warnings=doubts,
    )
