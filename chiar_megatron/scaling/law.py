"""The laws that are fitted: `E + A/N^α + B/D^β`, and the same with an effective N or D for routed models.

ρ is the share of attention: of all pairs of a token and a layer, those that go through full attention (D
layers 0, A layers 1, R layers the measured routed fraction, averaged over layers). A routed model counts as
one of `N·exp(γ(ρ - 1))` parameters (`rho_on` n), as one trained on `D·exp(γ(ρ - 1))` tokens (d), or both.
The twin has ρ = 1 and keeps its law; γ > 0 says that less attention is worth less, γ < 0 that it is worth
more. One number more than the twin's law, so that it is identified as soon as two values of ρ have been
trained at more than one size; a γ of each term, or an exponent that depends on ρ, is not identified by
sweeps of a few dozen runs. What ρ acts on is chosen by the better fit. It assumes that a share of attention
is worth the same wherever it sits: schedules of equal ρ share their curve.

Inside, θ = (ln E, ln A, ln B, α, β[, γ]) with N and D divided by their geometric means over the runs, so
that scale and exponent are nearly uncorrelated and optimizers converge.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

RhoOn = Literal["n", "d", "both"]
"""Which of N and D a routed model has an effective one of."""
RHO_ON: tuple[RhoOn, ...] = ("n", "d", "both")

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
    rho_on: RhoOn = "n"
    """What ρ acts on."""

    def __len__(self) -> int:
        return len(self.n)

    def take(self, index: npt.NDArray[np.generic]) -> Runs:
        """The runs at `index`, integers or booleans."""
        return replace(self, **{name: value[index] for name, value in self.columns().items()})

    def columns(self) -> dict[str, Array]:
        """What is known of the runs, by field."""
        return {name: value for name, value in vars(self).items() if isinstance(value, np.ndarray)}


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


def predict_loss(
    values: Array, n: Array | float, d: Array | float, rho: Array | float = 1.0, rho_on: RhoOn = "n"
) -> Array:
    """Loss in nats. values: `[..., 5 or 6]` in the order of `ROUTED_PARAMETERS`; n, d, rho broadcast with
    its leading shape."""
    E, A, B, alpha, beta = (values[..., i] for i in range(5))
    effective_n, effective_d = (np.asarray(size, dtype=np.float64) for size in (n, d))
    if values.shape[-1] == 6:
        worth = np.exp(values[..., 5] * (np.asarray(rho) - 1.0))
        effective_n = effective_n * worth if rho_on != "d" else effective_n
        effective_d = effective_d * worth if rho_on != "n" else effective_d
    return np.asarray(E + A / effective_n**alpha + B / effective_d**beta)


class CentredRuns:
    """Runs in logarithms about their means, and the way from θ to plain values and back."""

    def __init__(self, runs: Runs) -> None:
        log_n, log_d = np.log(runs.n), np.log(runs.d)
        self.mean_n, self.mean_d = float(log_n.mean()), float(log_d.mean())
        self.n, self.d, self.loss = log_n - self.mean_n, log_d - self.mean_d, np.log(runs.loss)
        self.rho = None if runs.rho is None else runs.rho - 1.0
        self.on_n, self.on_d = runs.rho_on != "d", runs.rho_on != "n"
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

    def effective(self, gamma: float) -> tuple[Array, Array]:
        """Logarithms of effective N and D, centred as N and D are."""
        if self.rho is None:
            return self.n, self.d
        return self.n + self.on_n * gamma * self.rho, self.d + self.on_d * gamma * self.rho

    def residuals(self, theta: Array) -> tuple[Array, Array]:
        """`ln predicted - ln observed` `[runs]` and its derivatives by θ `[p, runs]`."""
        effective_n, effective_d = self.effective(0.0 if self.rho is None else float(theta[5]))
        terms = np.empty((3, len(self.n)))
        terms[0] = theta[0]
        terms[1] = theta[1] - theta[3] * effective_n
        terms[2] = theta[2] - theta[4] * effective_d
        top = terms.max(axis=0)
        weights = np.exp(terms - top)
        total = weights.sum(axis=0)
        weights /= total
        jacobian = np.empty((self.parameters, len(self.n)))
        jacobian[:3] = weights
        jacobian[3] = -weights[1] * effective_n
        jacobian[4] = -weights[2] * effective_d
        if self.rho is not None:
            slope = self.on_n * weights[1] * theta[3] + self.on_d * weights[2] * theta[4]
            jacobian[5] = -slope * self.rho
        return top + np.log(total) - self.loss, jacobian
