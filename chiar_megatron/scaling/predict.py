"""`chiar scaling predict`: losses, compute-optimal sizes, and what CHIAR is worth against the twin.

With a token's cost `k·N^p·exp(q(ρ-1))` the best N for a budget C solves one equation of powers:
`N^(α+pβ) = α·A_ρ·(C/k_ρ)^β / (p·β·B_ρ)`, where `A_ρ = A·exp(αγ(1-ρ))`
if ρ acts on N (else A), B_ρ likewise, and `k_ρ = k·exp(q(ρ-1))`. The loss
reached is E plus a power of C whose exponent does not depend on ρ, so the *efficiency multiplier*, the
twin's budget over CHIAR's for equal loss with each at its own best N, is one number for all budgets.
Budgets are FLOPs, or device seconds where runs were timed: the same equations with the other cost.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from chiar_megatron.errors import ConfigError
from chiar_megatron.scaling.analysis import Analysis
from chiar_megatron.scaling.cost import CostModel
from chiar_megatron.scaling.law import Array, RhoOn, predict_loss

Interval = tuple[float, float] | None


@dataclass(frozen=True)
class Estimate:
    """A figure and its interval; None without a bootstrap."""

    value: float
    interval: Interval

    def __str__(self) -> str:
        if self.interval is None:
            return f"{self.value:.5g}"
        return f"{self.value:.5g} ({self.interval[0]:.5g} to {self.interval[1]:.5g})"

    def summary(self) -> dict[str, Any]:
        """For JSON."""
        return {"value": self.value, "interval": self.interval}


@dataclass(frozen=True)
class Prediction:
    """The loss of a model of N parameters after D tokens."""

    n: float
    d: float
    """Infinite: the limit for ever more data, or with n infinite for ever larger models."""
    flops: float
    rho: float
    loss: Estimate
    """Of the law: where the mean of many such runs lies."""
    run_interval: Interval
    """Where one more run lies: the law's uncertainty and the runs' scatter about it."""


@dataclass(frozen=True)
class Optimum:
    """The best N and D for a budget."""

    budget: float
    unit: str
    """FLOPs or device seconds."""
    rho: float
    n: Estimate
    d: Estimate
    loss: Estimate


def predict_run(
    analysis: Analysis, *, n: float | None, d: float | None, flops: float | None, rho: float = 1.0
) -> Prediction:
    """Loss for N and D, for N and C, for D and C, or for one of N and D alone (the other without limit).

    Raises ConfigError for none or all three, for what is not positive, and for a ρ the law cannot have.
    """
    _check(analysis, {"--n": n, "--d": d, "--flops": flops}, rho)
    given = sum(value is not None for value in (n, d, flops))
    if given == 0 or given == 3 or (given == 1 and flops is not None):
        raise ConfigError("give two of --n, --d and --flops; --n or --d alone for the limit; or --optimum")
    cost = analysis.flops
    if flops is not None and n is not None:
        d = flops / float(cost.per_token(n, rho))
    elif flops is not None and d is not None:
        n = cost.parameters_at(flops / d, rho)
    n, d = n or np.inf, d or np.inf
    if flops is None:
        flops = float(cost.per_token(n, rho)) * d if np.isfinite(n * d) else np.inf
    value = float(predict_loss(analysis.law.values(), n, d, rho, analysis.runs.rho_on))
    if analysis.draws is None:
        return Prediction(n, d, flops, rho, Estimate(value, None), None)
    samples = predict_loss(analysis.draws.values, n, d, rho, analysis.runs.rho_on)
    return Prediction(
        n,
        d,
        flops,
        rho,
        Estimate(value, analysis.draws.interval(samples)),
        analysis.draws.interval(samples * _scatter(analysis, len(samples))),
    )


def optimum(analysis: Analysis, budget: float, *, rho: float = 1.0, seconds: bool = False) -> Optimum:
    """The best N and D for a budget of FLOPs, or of device seconds. Raises ConfigError if it cannot tell."""
    _check(analysis, {"--optimum-seconds" if seconds else "--optimum": budget}, rho)
    cost = _cost(analysis, seconds)
    unit = "device seconds" if seconds else "FLOPs"
    n, d, loss = _best(analysis.law.values(), cost.coefficients, budget, rho, analysis.runs.rho_on)
    if analysis.draws is None:
        return Optimum(budget, unit, rho, *(Estimate(float(value), None) for value in (n, d, loss)))
    drawn = _best(analysis.draws.values, cost.draws, budget, rho, analysis.runs.rho_on)
    estimates = [
        Estimate(float(value), analysis.draws.interval(samples))
        for value, samples in zip((n, d, loss), drawn, strict=True)
    ]
    return Optimum(budget, unit, rho, *estimates)


def efficiency_multiplier(analysis: Analysis, rho: float, *, seconds: bool = False) -> Estimate:
    """The twin's budget over that of a model with share of attention `rho`, for equal loss; above 1 CHIAR
    wins. Raises ConfigError where the law has no ρ, or for seconds where no time was measured."""
    if analysis.law.gamma is None:
        raise ConfigError("the multiplier needs a law with ρ: fit twin and CHIAR together, with --rho COLUMN")
    _check(analysis, {}, rho)
    cost = _cost(analysis, seconds)
    value = float(_multiplier(analysis.law.values(), cost.coefficients, rho, analysis.runs.rho_on))
    if analysis.draws is None:
        return Estimate(value, None)
    samples = _multiplier(analysis.draws.values, cost.draws, rho, analysis.runs.rho_on)
    return Estimate(value, analysis.draws.interval(samples))


def _multiplier(values: Array, cost: Array, rho: float, rho_on: RhoOn) -> Array:
    """Less attention saves exp(q(1-ρ)) a token; it costs exp(γ(1-ρ)) of N, so of cost to the p, or of D."""
    worth = values[..., 5] * ((rho_on != "d") * cost[..., 1] + (rho_on != "n"))
    return np.asarray(np.exp((1.0 - rho) * (cost[..., 2] - worth)))


def _best(values: Array, cost: Array, budget: float, rho: float, rho_on: RhoOn) -> tuple[Array, Array, Array]:
    """N, D and loss at the optimum; values `[..., 5 or 6]`, cost `[..., 3]`."""
    A, B, alpha, beta = (values[..., i] for i in (1, 2, 3, 4))
    gamma = values[..., 5] if values.shape[-1] == 6 else 0.0
    k, p, q = (cost[..., i] for i in range(3))
    k_rho = k + q * (rho - 1.0)
    log_b = np.log(B) + (rho_on != "n") * beta * gamma * (1.0 - rho)
    log_a = np.log(A) + (rho_on != "d") * alpha * gamma * (1.0 - rho)
    log_ratio = np.log(alpha) + log_a - np.log(p * beta) - log_b + beta * (np.log(budget) - k_rho)
    n = np.exp(log_ratio / (alpha + p * beta))
    d = np.exp(np.log(budget) - k_rho - p * np.log(n))
    return n, d, predict_loss(values, n, d, rho, rho_on)


def _scatter(analysis: Analysis, count: int) -> Array:
    """Factors by which single runs miss the law, drawn from the residuals; they had the law's own freedom,
    so they are widened by √(runs / (runs − parameters))."""
    runs = len(analysis.runs)
    freedom = np.sqrt(runs / (runs - len(analysis.law.values())))
    generator = np.random.default_rng(analysis.settings.seed + 1)
    return np.asarray(np.exp(generator.choice(analysis.residuals, count) * freedom))


def _cost(analysis: Analysis, seconds: bool) -> CostModel:
    if not seconds:
        return analysis.flops
    if analysis.seconds is None:
        raise ConfigError("no device time was measured: fit a table with a column of seconds (--seconds)")
    return analysis.seconds


def _check(analysis: Analysis, positive: dict[str, float | None], rho: float) -> None:
    for option, value in positive.items():
        if value is not None and not (np.isfinite(value) and value > 0):
            raise ConfigError(f"{option}: {value} must be finite and above 0")
    if not 0 <= rho <= 1:
        raise ConfigError(f"--rho: {rho} must be a share of attention, from 0 to 1")
    if rho != 1.0 and analysis.law.gamma is None:
        raise ConfigError(f"--rho: {rho}, but the law was fitted without ρ; fit with --rho COLUMN")


@dataclass(frozen=True)
class Question:
    """What `chiar scaling predict` is asked; None where it is not."""

    n: float | None = None
    d: float | None = None
    flops: float | None = None
    optimum: float | None = None
    """FLOPs."""
    optimum_seconds: float | None = None
    """Device seconds."""
    rho: float = 1.0
    multiplier: bool = False


def answer(analysis: Analysis, question: Question) -> tuple[list[str], dict[str, Any]]:
    """Lines for people and figures for JSON. Raises ConfigError where the question or the fit cannot."""
    q, lines, figures = question, list[str](), dict[str, Any]()
    level = analysis.settings.level
    asks_more = q.multiplier or q.optimum is not None or q.optimum_seconds is not None
    if not asks_more or (q.n, q.d, q.flops) != (None, None, None):
        prediction = predict_run(analysis, n=q.n, d=q.d, flops=q.flops, rho=q.rho)
        lines += [*prediction_lines(prediction, level), *_extrapolation(analysis, prediction.flops)]
        figures["loss"] = prediction.loss.value
        figures["interval"] = prediction.loss.interval
        figures["run_interval"] = prediction.run_interval
        figures.update({name: _finite(getattr(prediction, name)) for name in ("n", "d", "flops", "rho")})
    for name, budget, seconds in (
        ("optimum", q.optimum, False),
        ("optimum_seconds", q.optimum_seconds, True),
    ):
        if budget is not None:
            best = optimum(analysis, budget, rho=q.rho, seconds=seconds)
            lines.append(optimum_line(best))
            if not seconds:
                lines += _extrapolation(analysis, budget)
            figures[name] = {"budget": budget, "rho": q.rho}
            figures[name].update({key: getattr(best, key).summary() for key in ("n", "d", "loss")})
    if q.multiplier:
        figures["multiplier"] = {"rho": q.rho}
        for unit, seconds in (("flops", False), ("seconds", True)):
            if seconds and analysis.seconds is None:
                lines.append("efficiency multiplier in device time: no time was measured")
                continue
            estimate = efficiency_multiplier(analysis, q.rho, seconds=seconds)
            where = "device time" if seconds else "FLOPs"
            lines.append(
                f"efficiency multiplier of rho {q.rho:g} against full attention, in {where}: {estimate}"
            )
            figures["multiplier"][unit] = estimate.summary()
    # A law that is not identified extrapolates anyhow: the reader has to know.
    lines += [f"warning: {warning}" for warning in analysis.warnings]
    figures["warnings"] = list(analysis.warnings)
    return lines, figures


def _extrapolation(analysis: Analysis, flops: float) -> list[str]:
    """A line where intervals hold only if the law's form holds far beyond the runs."""
    assert analysis.runs.flops is not None
    ratio = flops / float(analysis.runs.flops.max())
    return [f"  extrapolated to {ratio:.3g} times the largest run's FLOPs"] if 10 < ratio < np.inf else []


def _finite(value: float) -> float | None:
    """JSON has no infinity."""
    return value if np.isfinite(value) else None


def prediction_lines(prediction: Prediction, level: float) -> Iterator[str]:
    """For people."""
    p = prediction
    yield f"N {p.n:.4g}, D {p.d:.4g}, FLOPs {p.flops:.4g}, rho {p.rho:.3g}: loss {p.loss}"
    if p.run_interval is not None:
        low, high = p.run_interval
        yield f"  a single run, {level:.0%}: {low:.4f} to {high:.4f}"


def optimum_line(best: Optimum) -> str:
    """For people."""
    return f"{best.budget:.4g} {best.unit}, rho {best.rho:.3g}: best N {best.n}, D {best.d}, loss {best.loss}"
