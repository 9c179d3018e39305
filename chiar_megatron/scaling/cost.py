"""What a token costs, in FLOPs or in device seconds, as a function of N and ρ: `k · N^p · exp(q(ρ - 1))`.

Fitted by least squares of logarithms to the runs themselves, because the FLOPs of a routed model are not 6N
a token, nor are those of a small one with its head and attention. Runs counted as C = 6ND give k = 6, p = 1
and q = 0 back.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from chiar_megatron.scaling.law import Array, Runs


@dataclass(frozen=True)
class CostModel:
    """Cost of one training token, of the fit and of each resample."""

    coefficients: Array
    """`[3]`: ln k, p, q."""
    draws: Array
    """`[resamples, 3]`."""
    worst_error: float
    """Largest |model / measured - 1| over the runs."""

    def per_token(self, n: Array | float, rho: Array | float) -> Array:
        """Cost of a token, by the fit; n and rho broadcast."""
        return _cost(self.coefficients, n, rho)

    def per_token_drawn(self, n: Array | float, rho: float) -> Array:
        """The same by each resample, `[resamples]`; n: one for all or one for each."""
        return _cost(self.draws.T, n, rho)

    def parameters_at(self, cost: float, rho: float) -> float:
        """N whose token costs `cost`: the inverse of `per_token`."""
        k, p, q = self.coefficients
        return float(np.exp((np.log(cost) - k - q * (rho - 1.0)) / p))


def _cost(coefficients: Array, n: Array | float, rho: Array | float) -> Array:
    k, p, q = coefficients
    return np.asarray(np.exp(k + p * np.log(n) + q * (np.asarray(rho) - 1.0)))


def fit_cost(runs: Runs, total: Array, index: np.typing.NDArray[np.int64] | None) -> CostModel:
    """The cost model of `total` costs of runs `[runs]`; index `[resamples, runs]`: a draw for each."""
    log_n = np.log(runs.n)
    spans_rho = runs.rho is not None and float(np.ptp(runs.rho)) > 1e-6
    terms = [np.ones(len(runs)), log_n, (runs.rho - 1.0) if runs.rho is not None and spans_rho else None]
    if np.ptp(log_n) < 1e-6:
        terms[1] = None
    design = np.stack([term for term in terms if term is not None], axis=1)
    observed = np.log(total / runs.d)
    offset = np.zeros(len(runs)) if terms[1] is not None else log_n  # one size: take p = 1

    def solve(rows: np.typing.NDArray[np.int64] | slice) -> Array:
        found = np.linalg.lstsq(design[rows], (observed - offset)[rows], rcond=None)[0]
        whole = np.zeros(3)
        whole[[place for place, term in enumerate(terms) if term is not None]] = found
        if terms[1] is None:
            whole[1] = 1.0
        return whole

    coefficients = solve(slice(None))
    draws = np.empty((0, 3)) if index is None else np.stack([solve(rows) for rows in index])
    model = CostModel(coefficients, draws, 0.0)
    errors = np.abs(model.per_token(runs.n, 1.0 if runs.rho is None else runs.rho) * runs.d / total - 1)
    return CostModel(coefficients, draws, float(errors.max()))
