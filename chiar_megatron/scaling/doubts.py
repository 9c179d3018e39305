"""What makes a fit doubtful: columns that cannot be what they are said to be, and what is not identified."""

from __future__ import annotations

import numpy as np

from chiar_megatron.scaling.bootstrap import Draws
from chiar_megatron.scaling.cost import CostModel
from chiar_megatron.scaling.fit import EXPONENT_BOUNDS, GAMMA_BOUNDS, PointFit
from chiar_megatron.scaling.law import Array, CentredRuns, Runs

_STEEP = 1000.0  # condition number of the parameters' correlations from which two directions are one
_FLOPS_OVER_6ND = (0.02, 100.0)  # mixtures of experts lie low, small models of long sequences high
_TOKENS_A_PARAMETER = (1e-4, 1e6)
_WORST_COST = 0.5  # relative error of the cost model
_HIGHEST_LOSS = 14.0  # nats; more than guessing costs with a vocabulary of a million


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


def implausible(runs: Runs) -> list[str]:
    """Units and columns that cannot be right, one sentence each."""
    found = []
    ratio = float(np.median(runs.d / runs.n))
    if not _TOKENS_A_PARAMETER[0] <= ratio <= _TOKENS_A_PARAMETER[1]:
        found.append(f"D/N is {ratio:.2g}: N and D are to be numbers, not thousands or billions of them")
    if runs.flops is not None:
        share = float(np.median(runs.flops / (6.0 * runs.n * runs.d)))
        if not _FLOPS_OVER_6ND[0] <= share <= _FLOPS_OVER_6ND[1]:
            found.append(
                f"training FLOPs are {share:.2g} times 6ND: N, D and C are to be numbers, not thousands or "
                "billions of them"
            )
    if runs.loss.max() > _HIGHEST_LOSS:
        found.append(
            f"the highest loss is {runs.loss.max():.3g} nats, more than guessing costs: is it a perplexity?"
        )
    return found


def unfit_costs(flops: CostModel, seconds: CostModel | None) -> list[str]:
    """Costs of a token that N and ρ do not tell: optima and multipliers rest on them."""
    found = []
    for what, cost in (("FLOPs", flops), ("device seconds", seconds)):
        if cost is not None and cost.worst_error > _WORST_COST:
            found.append(
                f"{what} a token do not follow from N and rho: off by {cost.worst_error:.0%} at worst, so "
                f"that optima and multipliers in {what} mean little"
            )
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
