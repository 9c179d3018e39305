"""IsoFLOP curves: at each budget a parabola of loss over ln N, and how its minimum moves with the budget.

Hoffmann et al. 2022, approach 2. Routed models get parabolas of their own at each ρ.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from chiar_megatron.scaling.law import Array, Runs

_SAME_BUDGET = 0.25  # largest relative step of FLOPs inside one budget, before rounding N and steps
_SAME_RHO = 0.05  # largest step of ρ inside one group: measured shares scatter, and depend on the depth


@dataclass(frozen=True)
class Parabola:
    """Loss of one budget and one ρ: `loss + curvature · (ln N - ln n)²`."""

    flops: float
    """Geometric mean of the runs' FLOPs."""
    rho: float | None
    runs: int
    n: float
    """N at the minimum."""
    d: float
    """D there, at the runs' own cost of a token."""
    loss: float
    """At the minimum, nats."""
    curvature: float
    inside: bool
    """Whether the minimum lies between the smallest and the largest N; else it is extrapolated."""


@dataclass(frozen=True)
class IsoFlop:
    """All parabolas, and `n = n_coefficient · C^n_exponent` through the minima inside, if there are 2."""

    parabolas: tuple[Parabola, ...]
    n_exponent: float | None
    n_coefficient: float | None

    def summary(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "parabolas": [vars(parabola) for parabola in self.parabolas],
            "n_exponent": self.n_exponent,
            "n_coefficient": self.n_coefficient,
        }

    def lines(self) -> Iterator[str]:
        """For people."""
        for p in self.parabolas:
            rho = "" if p.rho is None else f", rho {p.rho:.2f}"
            best = f"best N {p.n:.4g}, D {p.d:.4g}, loss {p.loss:.4f}"
            found = best if p.inside else "no minimum between the sizes trained"
            yield f"  isoFLOP {p.flops:.3g}{rho}: {found}"
        if self.n_exponent is not None:
            yield f"  isoFLOP minima: N = {self.n_coefficient:.4g}·C^{self.n_exponent:.3f}"


def fit_isoflop(runs: Runs) -> IsoFlop | None:
    """Parabolas of every budget and ρ with at least 3 sizes and a minimum; None if there is none."""
    assert runs.flops is not None
    parabolas: list[Parabola] = []
    for rows in _groups(runs):
        if len(np.unique(np.round(np.log(runs.n[rows]), 3))) >= 3:
            parabola = _parabola(runs.take(rows))
            if parabola is not None:
                parabolas.append(parabola)
    if not parabolas:
        return None
    inside = [p for p in parabolas if p.inside]
    exponent = coefficient = None
    if len({round(np.log(p.flops), 1) for p in inside}) >= 2:
        exponent, intercept = np.polyfit(np.log([p.flops for p in inside]), np.log([p.n for p in inside]), 1)
        exponent, coefficient = float(exponent), float(np.exp(intercept))
    return IsoFlop(tuple(parabolas), exponent, coefficient)


def _groups(runs: Runs) -> list[np.typing.NDArray[np.int64]]:
    """Rows of equal budget and ρ. A table whose FLOPs have no gaps has no budgets: no groups."""
    assert runs.flops is not None
    order = np.argsort(runs.flops, kind="stable")
    gaps = np.diff(np.log(runs.flops[order])) > np.log1p(_SAME_BUDGET)
    groups = []
    for budget in np.split(order, np.flatnonzero(gaps) + 1):
        if runs.flops[budget].max() > (1 + _SAME_BUDGET) * runs.flops[budget].min():
            continue
        groups += [budget[rows] for rows in rho_groups(runs.take(budget))]
    return groups


def rho_groups(runs: Runs) -> list[np.typing.NDArray[np.int64]]:
    """Rows of runs that share a share of attention, full attention first; all together without ρ."""
    if runs.rho is None:
        return [np.arange(len(runs))]
    order = np.argsort(-runs.rho, kind="stable")
    return np.split(order, np.flatnonzero(-np.diff(runs.rho[order]) > _SAME_RHO) + 1)


def _parabola(runs: Runs) -> Parabola | None:
    assert runs.flops is not None
    log_n: Array = np.log(runs.n)
    curvature, slope, height = np.polyfit(log_n - log_n.mean(), runs.loss, 2)
    if curvature <= 0:
        return None
    offset = -slope / (2 * curvature)
    best = float(np.exp(log_n.mean() + offset))
    flops = float(np.exp(np.log(runs.flops).mean()))
    cost = np.polyfit(log_n, np.log(runs.flops / runs.d), 1)
    return Parabola(
        flops=flops,
        rho=None if runs.rho is None else float(runs.rho.mean()),
        runs=len(runs),
        n=best,
        d=float(flops / np.exp(np.polyval(cost, np.log(best)))),
        loss=float(height - slope**2 / (4 * curvature)),
        curvature=float(curvature),
        inside=bool(runs.n.min() <= best <= runs.n.max()),
    )
