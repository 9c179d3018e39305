"""How sure a fit is: bootstrap intervals, prediction error on the largest runs, what is not identified."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from chiar_megatron.errors import DataError
from chiar_megatron.scaling.fit import (
    EXPONENT_BOUNDS,
    GAMMA_BOUNDS,
    HuberProblem,
    PointFit,
    fit_point,
    one_thread,
)
from chiar_megatron.scaling.law import Array, CentredRuns, Runs, predict_loss

_ASIDE = (0.6, 1.5)  # factors on both exponents of a resample's alternative starts
_STEEP = 1000.0  # condition number of the parameters' correlations from which two directions are one


@dataclass(frozen=True)
class Draws:
    """Laws fitted to resampled runs."""

    values: Array
    """`[resamples, p]`, plain, in the order of `ROUTED_PARAMETERS`."""
    index: np.typing.NDArray[np.int64]
    """`[resamples, runs]`: the runs of each resample."""
    level: float
    """Of intervals, e.g. 0.95."""

    def interval(self, samples: Array) -> tuple[float, float]:
        """Percentile interval of one figure's samples `[resamples]`."""
        tail = (1.0 - self.level) / 2
        low, high = np.quantile(samples, [tail, 1.0 - tail])
        return float(low), float(high)


@dataclass(frozen=True)
class HeldOut:
    """How a law fitted without the largest runs predicts them."""

    runs: int
    """Held out: those of at least half the largest FLOPs; a twentieth to two fifths of all."""
    extrapolation: float
    """Largest FLOPs held out over largest FLOPs fitted."""
    mean_error: float
    """Mean of predicted - observed, nats."""
    mean_absolute_error: float
    """Nats."""
    worst_relative_error: float
    """Largest |predicted / observed - 1|."""


def bootstrap(
    runs: Runs, fit: PointFit, *, resamples: int, delta: float = 1e-3, seed: int = 0, level: float = 0.95
) -> Draws:
    """Fit resamples of the runs (drawn with replacement), from the full fit and two starts aside of it.

    Pairs are drawn, not residuals: measured on synthetic laws (`benchmarks/scaling_coverage.py`) residuals
    of a fit of 5 parameters to some 40 runs are too small, and their intervals too narrow.
    """
    problem = HuberProblem(runs, delta)
    generator = np.random.default_rng(seed)
    count = len(runs)
    index = generator.integers(0, count, (resamples, count))
    starts = [fit.theta]
    for factor in _ASIDE:
        start = fit.theta.copy()
        start[3:5] *= factor
        starts.append(start)
    thetas = np.empty((resamples, problem.centred.parameters))
    with one_thread():
        for place in range(resamples):
            weights = np.bincount(index[place], minlength=count).astype(np.float64)
            ends = [problem.descend(start, weights) for start in starts]
            thetas[place] = min(ends, key=lambda end: end[1])[0]
    return Draws(problem.centred.plain(thetas), index, level)


def held_out_error(runs: Runs, delta: float = 1e-3) -> HeldOut | None:
    """The law without the largest runs, judged on them; None where too few runs would remain."""
    if runs.flops is None:
        return None
    largest = runs.flops >= 0.5 * runs.flops.max()
    count = int(np.clip(largest.sum(), 0.05 * len(runs), max(1.0, 0.4 * len(runs))))
    largest = np.zeros(len(runs), dtype=bool)
    largest[np.argsort(runs.flops, kind="stable")[-max(1, count) :]] = True
    kept, held = runs.take(~largest), runs.take(largest)
    assert kept.flops is not None and held.flops is not None
    try:
        law = fit_point(kept, delta).law
    except DataError:
        return None
    predicted = predict_loss(law.values(), held.n, held.d, 1.0 if held.rho is None else held.rho, held.rho_on)
    error = predicted - held.loss
    return HeldOut(
        len(held),
        float(held.flops.max() / kept.flops.max()),
        float(error.mean()),
        float(np.abs(error).mean()),
        float(np.abs(error / held.loss).max()),
    )


def warnings(runs: Runs, fit: PointFit, draws: Draws | None) -> list[str]:
    """What the runs cannot tell, one sentence each; empty where all parameters are identified."""
    found = _degenerate_design(runs)
    centred = CentredRuns(runs)
    residuals, jacobian = centred.residuals(fit.theta)
    # Each parameter in units of its own effect on the losses: what remains is how alike the effects are.
    norms = np.linalg.norm(jacobian, axis=1)
    names = fit.law.names
    for name, norm in zip(names, norms, strict=True):
        if norm < 1e-9:
            found.append(f"{name} has no effect on the losses fitted: its value says nothing")
    if not found:
        singular = np.linalg.svd(jacobian / norms[:, None], compute_uv=False)
        condition = float(singular[0] / singular[-1])
        if condition > _STEEP:
            found.append(
                f"the effects of the parameters on these runs are nearly the same (condition number "
                f"{condition:.0f}): single values mean little; vary N and D more, apart from each other"
            )
    found += _at_bounds(runs, fit, draws)
    if draws is None:
        found += _loose_by_curvature(names, fit, residuals, jacobian)
    else:
        found += _loose_by_draws(names, draws)
    if fit.starts_agreeing < 0.2:
        found.append(f"only {fit.starts_agreeing:.0%} of the starts reached this minimum: others may be near")
    return found


def _degenerate_design(runs: Runs) -> list[str]:
    found = []
    for name, column, exponent in (("N", runs.n, "alpha"), ("D", runs.d, "beta")):
        distinct = len(np.unique(np.round(np.log(column), 2)))
        if distinct < 3:
            found.append(
                f"only {distinct} value(s) of {name} differ by more than 1%: {exponent} and E cannot be told "
                "apart; train at least 3, better 4"
            )
    log_n, log_d = np.log(runs.n), np.log(runs.d)
    if log_n.std() > 0.01 and log_d.std() > 0.01:
        correlation = float(np.corrcoef(log_n, log_d)[0, 1])
        if abs(correlation) > 0.995:
            found.append(
                f"N and D lie on one line (correlation {correlation:.3f}), as in a sweep of one ratio D/N: "
                "which of them lowers the loss cannot be told; add runs at other ratios"
            )
    if runs.rho is not None and np.ptp(runs.rho) < 0.05:
        found.append(f"ρ spans only {np.ptp(runs.rho):.3f}: gamma cannot be told; add the twin or another ρ")
    return found


def _at_bounds(runs: Runs, fit: PointFit, draws: Draws | None) -> list[str]:
    """Parameters that the fit, or over a twentieth of the resamples, pushes against a bound."""
    values = fit.law.values()[None] if draws is None else draws.values
    low, high = EXPONENT_BOUNDS
    limits = [("alpha", 3, low, high), ("beta", 4, low, high)]
    if fit.law.gamma is not None:
        limits.append(("gamma", 5, *GAMMA_BOUNDS))
    found = []
    for name, place, least, most in limits:
        share = float(
            np.isclose(values[:, place, None], [least, most], rtol=0.01, atol=0.0).any(axis=1).mean()
        )
        if share > 0.05:
            found.append(f"{name} runs into its bounds {least:g} to {most:g} ({share:.0%}): not identified")
    share = float(np.mean(values[:, 0] < 0.02 * runs.loss.min()))
    if share > 0.05:
        found.append(f"E falls to 0 ({share:.0%}): these runs do not show where the loss would level off")
    return found


def _loose_by_curvature(
    names: tuple[str, ...], fit: PointFit, residuals: Array, jacobian: Array
) -> list[str]:
    spread = 1.4826 * float(np.median(np.abs(residuals)))
    covariance = spread**2 * np.linalg.pinv(jacobian @ jacobian.T, rcond=1e-12)
    errors = np.sqrt(np.diag(covariance))
    found = []
    for name in ("alpha", "beta"):
        place = names.index(name)
        if 2 * errors[place] > 0.5 * fit.theta[place]:
            found.append(
                f"{name} {fit.theta[place]:.3g} has a standard error of about {errors[place]:.2g}: hardly "
                "identified; bootstrap it"
            )
    if 2 * errors[0] > 0.5:
        found.append(f"E has a standard error of about {errors[0]:.0%}: hardly identified; bootstrap it")
    return found


def _loose_by_draws(names: tuple[str, ...], draws: Draws) -> list[str]:
    found = []
    for name in ("E", "alpha", "beta"):
        samples = draws.values[:, names.index(name)]
        low, high = draws.interval(samples)
        if high - low > float(np.median(samples)):
            found.append(
                f"{name} is hardly identified: its interval {low:.3g} to {high:.3g} is wider than it is large"
            )
    return found
