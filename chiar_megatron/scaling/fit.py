"""Fitting a law: the Huber loss of `ln predicted - ln observed`, by L-BFGS or by variable projection.

Both methods minimise the same function (Hoffmann et al. 2022, approach 3; δ = 1e-3 there) and so check each
other. L-BFGS starts from a grid. Variable projection solves for E, A and B, in which the law is linear, by
non-negative least squares at every trial of the exponents, and comes to the Huber loss by reweighting.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Any, Literal

import numpy as np
from scipy.optimize import minimize, nnls
from threadpoolctl import threadpool_limits

from chiar_megatron.errors import DataError
from chiar_megatron.scaling.law import ROUTED_PARAMETERS, Array, CentredRuns, Law, Runs, law_of

Method = Literal["lbfgs", "varpro"]

EXPONENT_BOUNDS = (1e-3, 4.0)
GAMMA_BOUNDS = (-5.0, 5.0)
_SMALLEST_SHARE = 1e-8  # of the smallest loss, that E may fall to
_GRID = ((0.3, 0.6, 0.9), (0.2, 0.4, 0.7), (0.2, 0.4, 0.7), (-0.3, 0.3))  # E / smallest loss, α, β, γ


@dataclass(frozen=True)
class PointFit:
    """A law and how well it fits."""

    law: Law
    theta: Array
    """The same inside, `[p]`."""
    objective: float
    """Sum of Huber losses."""
    starts_agreeing: float
    """Share of the grid's starts that ended at this minimum (L-BFGS); 1 for variable projection."""


def one_thread() -> Any:
    """A context in which BLAS has one thread: L-BFGS works on matrices of a few numbers, where threads that
    wait for each other cost 30 times the work."""
    return threadpool_limits(limits=1, user_api="blas")


class HuberProblem:
    """The Huber loss of some runs as a function of θ."""

    def __init__(self, runs: Runs, delta: float) -> None:
        """Raises DataError where there are too few runs for the law's parameters."""
        self.runs, self.delta = runs, delta
        self.centred = CentredRuns(runs)
        if len(runs) <= self.centred.parameters:
            names = ", ".join(ROUTED_PARAMETERS[: self.centred.parameters])
            raise DataError(
                f"{len(runs)} runs are too few for a law of {self.centred.parameters} parameters ({names}); "
                f"give at least {self.centred.parameters + 1}"
            )
        log_loss = self.centred.loss
        smallest = float(log_loss.min())
        self.bounds = [(smallest + np.log(_SMALLEST_SHARE), smallest), (-25.0, 10.0), (-25.0, 10.0)]
        self.bounds += [EXPONENT_BOUNDS] * 2 + [GAMMA_BOUNDS] * (self.centred.parameters - 5)
        # L-BFGS stops by absolute sizes: about 1 suits it.
        self._scale = 1.0 / (delta * len(runs) * max(float(log_loss.std()), 1e-9))

    def value(self, theta: Array, weights: Array | None = None) -> tuple[float, Array]:
        """The scaled loss and its gradient; weights: how often each run counts."""
        residuals, jacobian = self.centred.residuals(theta)
        size = np.abs(residuals)
        slope = np.clip(residuals, -self.delta, self.delta)
        loss = np.where(size <= self.delta, 0.5 * residuals**2, self.delta * (size - 0.5 * self.delta))
        if weights is not None:
            loss, slope = loss * weights, slope * weights
        return float(loss.sum() * self._scale), jacobian @ slope * self._scale

    def objective(self, theta: Array) -> float:
        """The loss, unscaled."""
        return self.value(theta)[0] / self._scale

    def descend(self, start: Array, weights: Array | None = None) -> tuple[Array, float]:
        """The minimum that L-BFGS finds from `start`, and the scaled loss there."""
        options = {"maxiter": 3000, "maxfun": 6000, "maxcor": 20, "ftol": 1e-14, "gtol": 1e-9}
        low, high = np.array(self.bounds).T
        found = minimize(
            self.value,
            np.clip(start, low, high),
            args=(weights,),
            jac=True,
            method="L-BFGS-B",
            bounds=self.bounds,
            options=options,
        )
        return found.x, float(found.fun)

    def grid(self) -> list[Array]:
        """Starts: what E leaves of the losses is shared evenly by the other two terms."""
        losses, starts = self.runs.loss, []
        for share, alpha, beta, gamma in product(*_GRID):
            rest = np.log((np.median(losses) - share * losses.min()) / 2)
            start = [np.log(share * losses.min()), rest, rest, alpha, beta, gamma]
            if self.centred.parameters == 6 or gamma == _GRID[3][0]:
                starts.append(np.array(start[: self.centred.parameters]))
        return starts


def fit_point(runs: Runs, delta: float = 1e-3, method: Method = "lbfgs") -> PointFit:
    """The law that minimises the Huber loss. Raises DataError for too few runs."""
    problem = HuberProblem(runs, delta)
    agreeing = 1.0
    with one_thread():
        if method == "varpro":
            theta = _variable_projection(problem)
        else:
            ends = [problem.descend(start) for start in problem.grid()]
            theta, best = min(ends, key=lambda end: end[1])
            agreeing = sum(end[1] <= best * (1 + 1e-6) + 1e-6 for end in ends) / len(ends)
    return PointFit(law_of(problem.centred.plain(theta)), theta, problem.objective(theta), agreeing)


def _variable_projection(problem: HuberProblem) -> Array:
    """θ by variable projection, reweighted until the Huber loss stands still."""
    centred = problem.centred
    observed = problem.runs.loss
    nonlinear = np.array([[a, b, g][: centred.parameters - 3] for _, a, b, g in product(*_GRID)])
    weights = 1.0 / observed**2
    best = min(np.unique(nonlinear, axis=0), key=lambda trial: _project(centred, trial, observed, weights)[1])
    objective = np.inf
    for _ in range(500):
        found = minimize(
            lambda trial, weights: _project(centred, trial, observed, weights)[1],
            best,
            args=(weights,),
            method="Nelder-Mead",
            bounds=problem.bounds[3:],
            options={"xatol": 1e-9, "fatol": 1e-16, "maxiter": 4000, "initial_simplex": _simplex(best)},
        )
        best = found.x
        linear, _ = _project(centred, best, observed, weights)
        theta = np.concatenate([np.log(np.maximum(linear, 1e-12)), best])
        residuals, _ = centred.residuals(theta)
        residuals = np.where(np.abs(residuals) < 1e-12, 1e-12, residuals)
        # With these weights least squares is stationary exactly where the Huber loss is.
        slope = np.clip(residuals, -problem.delta, problem.delta)
        weights = slope / (np.exp(residuals) * np.expm1(residuals) * observed**2)
        previous, objective = objective, problem.objective(theta)
        if abs(previous - objective) <= 1e-9 * objective:
            break
    return theta


def _simplex(centre: Array) -> Array:
    """A small one: the minimum moves little between reweightings."""
    return np.vstack([centre, centre + 0.02 * np.eye(len(centre))])


def _project(centred: CentredRuns, trial: Array, observed: Array, weights: Array) -> tuple[Array, float]:
    """The best E, A and B (about the means) for the exponents, and the weighted squares that remain."""
    effective_n, effective_d = centred.effective(0.0 if centred.rho is None else float(trial[2]))
    root = np.sqrt(weights)
    terms = [np.ones_like(observed), np.exp(-trial[0] * effective_n), np.exp(-trial[1] * effective_d)]
    solution, norm = nnls(np.stack(terms, axis=1) * root[:, None], observed * root)
    return solution, float(norm) ** 2
