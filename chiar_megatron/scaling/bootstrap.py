"""How sure a fit is: bootstrap intervals, and the prediction error on the largest runs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from chiar_megatron.errors import DataError
from chiar_megatron.scaling.fit import HuberProblem, PointFit, fit_point, one_thread
from chiar_megatron.scaling.law import Array, Runs, predict_loss

_ASIDE = (0.6, 1.5)  # factors on both exponents of a resample's alternative starts


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
