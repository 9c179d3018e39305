"""Do the intervals of `chiar scaling fit` cover the truth as often as they say?

Simulates sweeps of a known law (6 budgets × 7 sizes, log-normal noise, or Student's t with 3 degrees of
freedom), fits each, and counts how often each parameter's interval holds the truth. `--gamma` simulates the
law of routed models: every run twice, with full attention and at ρ = 0.5. Also with residuals drawn instead
of pairs, the alternative that lost.

    python benchmarks/scaling_coverage.py --simulations 200 --resamples 200 --noise 0.01
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from chiar_megatron.scaling.bootstrap import Draws, bootstrap
from chiar_megatron.scaling.fit import HuberProblem, PointFit, fit_point, one_thread
from chiar_megatron.scaling.law import ROUTED_PARAMETERS, Array, Runs, predict_loss

TRUTH = (1.8, 480.0, 2100.0, 0.347, 0.367)
LEVEL = 0.95


def simulate(generator: np.random.Generator, truth: Array, noise: float, tails: str) -> Runs:
    """One sweep: 42 runs, or 84 where the truth has a γ."""
    shares = (1.0, 0.5) if len(truth) == 6 else (1.0,)
    budget, factor, rho = (
        grid.ravel() for grid in np.meshgrid(np.geomspace(1e18, 1e21, 6), np.geomspace(0.2, 5, 7), shares)
    )
    n = np.sqrt(budget / 120) * factor
    d = budget / 6 / n
    errors = generator.standard_normal(len(n))
    if tails == "t3":
        errors = generator.standard_t(3, len(n)) / np.sqrt(3)
    loss = predict_loss(truth, n, d, rho) * np.exp(noise * errors)
    return Runs(n, d, loss, rho if len(truth) == 6 else None, budget)


def of_pairs(runs: Runs, fit: PointFit, resamples: int, seed: int) -> Draws:
    """What the product does."""
    return bootstrap(runs, fit, resamples=resamples, seed=seed, level=LEVEL)


def of_residuals(runs: Runs, fit: PointFit, resamples: int, seed: int) -> Draws:
    """Residuals, widened by the degrees of freedom, drawn onto the fitted law."""
    problem, generator = HuberProblem(runs, 1e-3), np.random.default_rng(seed)
    residuals, _ = problem.centred.residuals(fit.theta)
    fitted = problem.centred.loss + residuals
    wide = residuals * np.sqrt(len(runs) / (len(runs) - len(fit.theta)))
    thetas: list[Array] = []
    with one_thread():
        for _ in range(resamples):
            problem.centred.loss = fitted - generator.choice(wide, len(runs))
            thetas.append(problem.descend(fit.theta)[0])
    return Draws(problem.centred.plain(np.array(thetas)), np.zeros((0, 0), dtype=np.int64), LEVEL)


def cover(
    draw: Callable[[Runs, PointFit, int, int], Draws], arguments: argparse.Namespace
) -> tuple[list[int], list[float]]:
    """How often each interval held the truth, and the intervals' median widths as shares of it."""
    generator = np.random.default_rng(arguments.seed)
    truth = np.array(TRUTH if arguments.gamma is None else (*TRUTH, arguments.gamma))
    hits, widths = np.zeros(len(truth), dtype=int), []
    for simulation in range(arguments.simulations):
        runs = simulate(generator, truth, arguments.noise, arguments.tails)
        draws = draw(runs, fit_point(runs), arguments.resamples, simulation)
        ends = np.array([draws.interval(draws.values[:, i]) for i in range(len(truth))])
        hits += (ends[:, 0] <= truth) & (truth <= ends[:, 1])
        widths.append((ends[:, 1] - ends[:, 0]) / truth)
    return hits.tolist(), np.median(widths, axis=0).round(4).tolist()


def main() -> int:
    """Print the counts, and write the record where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--simulations", type=int, default=200)
    parser.add_argument("--resamples", type=int, default=200)
    parser.add_argument(
        "--noise", type=float, default=0.01, help="standard deviation of ln loss (%(default)s)"
    )
    parser.add_argument("--tails", choices=("normal", "t3"), default="normal")
    parser.add_argument("--gamma", type=float, help="of the routed models' law (a law without)")
    parser.add_argument("--residuals", action="store_true", help="also draw residuals instead of pairs")
    parser.add_argument("--seed", type=int, default=5)
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the record as JSON")
    arguments = parser.parse_args()
    record: dict[str, object] = {
        "command": sys.argv,
        "python": platform.python_version(),
        "numpy": np.__version__,
    }
    ways = {"pairs": of_pairs} | ({"residuals": of_residuals} if arguments.residuals else {})
    for name, draw in ways.items():
        started = time.monotonic()
        hits, widths = cover(draw, arguments)
        seconds = time.monotonic() - started
        print(
            f"{name}: {LEVEL:.0%} intervals that hold the truth, of {arguments.simulations} ({seconds:.0f} s)"
        )
        covered = dict(zip(ROUTED_PARAMETERS, hits))  # noqa: B905 (5 of the 6 without --gamma)
        for (parameter, hit), width in zip(covered.items(), widths, strict=True):
            print(f"  {parameter:5s} {hit:4d}   median width {width:.1%} of the value")
        record[name] = {"covered": covered, "median_width": widths, "seconds": round(seconds)}
        if arguments.output is not None:
            arguments.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
