"""The laws that are fitted: `E + A/N^α + B/D^β`, and the same with an effective N for routed models.

Routed models: `E + A/(N·exp(γ(ρ - 1)))^α + B/D^β`, where ρ is the share of attention: of all pairs of a
token and a layer, those that go through full attention (D layers 0, A layers 1, R layers the measured
routed fraction, averaged over layers). The twin has ρ = 1 and keeps its law; γ > 0 says that a model with
less attention is worth a smaller one. One number more than the twin's law, so that it is identified as
soon as two values of ρ have been trained at more than one size; a γ of each term, or a ρ-dependent
exponent, is not identified by sweeps of a few dozen runs. It assumes that a share of attention is worth the
same wherever it sits: runs of different schedules but equal ρ share their curve.

Inside, θ = (ln E, ln A, ln B, α, β[, γ]) with N and D divided by their geometric means over the runs, so
that scale and exponent are nearly uncorrelated and optimizers converge.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

PARAMETERS = ("E", "A", "B", "alpha", "beta")
ROUTED_PARAMETERS = (*PARAMETERS, "gamma")


@dataclass(frozen=True)
class Runs:
    """Runs to fit, one entry each; all positive."""

    n: Array
    """Parameters N."""
    d: Array
    """Training tokens D."""
    loss: Array
    """Final loss, nats a token."""
    rho: Array | None = None
    """Share of attention in [0, 1]; None for a law without it."""
    flops: Array | None = None
    """Training FLOPs C, where known."""
    seconds: Array | None = None
    """Device seconds of training (GPUs × time), where measured."""

    def __len__(self) -> int:
        return len(self.n)

    def take(self, index: npt.NDArray[np.generic]) -> Runs:
        """The runs at `index`, integers or booleans."""
        fields = {name: value[index] for name, value in vars(self).items() if value is not None}
        return replace(self, **fields)


@dataclass(frozen=True)
class Law:
    """One fitted law in its plain form."""

    E: float
    A: float
    B: float
    alpha: float
    beta: float
    gamma: float | None = None
    """None: a law without ρ."""

    def values(self) -> Array:
        """The parameters, in the order of `names`."""
        return np.array([getattr(self, name) for name in self.names], dtype=np.float64)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the parameters."""
        return PARAMETERS if self.gamma is None else ROUTED_PARAMETERS


def law_of(values: Array) -> Law:
    """The law of 5 or 6 values, in the order of `ROUTED_PARAMETERS`."""
    return Law(*(float(value) for value in values))


def predict_loss(values: Array, n: Array | float, d: Array | float, rho: Array | float = 1.0) -> Array:
    """Loss in nats. values: `[..., 5 or 6]` in the order of `ROUTED_PARAMETERS`; n, d, rho broadcast with
    its leading shape."""
    E, A, B, alpha, beta = (values[..., i] for i in range(5))
    effective = np.asarray(n, dtype=np.float64)
    if values.shape[-1] == 6:
        effective = effective * np.exp(values[..., 5] * (np.asarray(rho) - 1.0))
    return np.asarray(E + A / effective**alpha + B / np.asarray(d, dtype=np.float64) ** beta)


class CentredRuns:
    """Runs in logarithms about their means, and the way from θ to plain values and back."""

    def __init__(self, runs: Runs) -> None:
        log_n, log_d = np.log(runs.n), np.log(runs.d)
        self.mean_n, self.mean_d = float(log_n.mean()), float(log_d.mean())
        self.n, self.d, self.loss = log_n - self.mean_n, log_d - self.mean_d, np.log(runs.loss)
        self.rho = None if runs.rho is None else runs.rho - 1.0
        self.parameters = 5 if self.rho is None else 6

    def plain(self, theta: Array) -> Array:
        """Plain values of θ `[..., p]`: E, A and B, with units of parameters and tokens again."""
        values = theta.copy()
        values[..., 0] = np.exp(theta[..., 0])
        values[..., 1] = np.exp(theta[..., 1] + theta[..., 3] * self.mean_n)
        values[..., 2] = np.exp(theta[..., 2] + theta[..., 4] * self.mean_d)
        return values

    def theta(self, values: Array) -> Array:
        """The inverse of `plain`."""
        theta = values.copy()
        theta[..., 0] = np.log(values[..., 0])
        theta[..., 1] = np.log(values[..., 1]) - values[..., 3] * self.mean_n
        theta[..., 2] = np.log(values[..., 2]) - values[..., 4] * self.mean_d
        return theta

    def residuals(self, theta: Array) -> tuple[Array, Array]:
        """`ln predicted - ln observed` `[runs]` and its derivatives by θ `[p, runs]`."""
        effective = self.n if self.rho is None else self.n + theta[5] * self.rho
        terms = np.empty((3, len(self.n)))
        terms[0] = theta[0]
        terms[1] = theta[1] - theta[3] * effective
        terms[2] = theta[2] - theta[4] * self.d
        top = terms.max(axis=0)
        weights = np.exp(terms - top)
        total = weights.sum(axis=0)
        weights /= total
        jacobian = np.empty((self.parameters, len(self.n)))
        jacobian[:3] = weights
        jacobian[3] = -weights[1] * effective
        jacobian[4] = -weights[2] * self.d
        if self.rho is not None:
            jacobian[5] = -weights[1] * theta[3] * self.rho
        return top + np.log(total) - self.loss, jacobian
