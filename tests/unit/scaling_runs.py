"""Runs of known laws, for the tests of scaling laws and for the coverage benchmark's small form."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np

from chiar_megatron.scaling.law import Runs

TRUTH = dict(E=1.8, A=480.0, B=2100.0, alpha=0.347, beta=0.367)


def plain_loss(n, d, rho=1.0, gamma=0.0, rho_on="n"):
    """The law, written down once more."""
    t, worth = TRUTH, np.exp(gamma * (rho - 1))
    n, d = n * (worth if rho_on in ("n", "both") else 1), d * (worth if rho_on in ("d", "both") else 1)
    return t["E"] + t["A"] / n ** t["alpha"] + t["B"] / d ** t["beta"]


def law_runs(noise: float = 0.0, seed: int = 0, gamma: float | None = None, rho_on: str = "n") -> Runs:
    """IsoFLOP runs, 7 sizes at each budget; with gamma every one at ρ = 1 and at ρ = 0.4, whose tokens cost
    20% less."""
    n, d, rho, flops = [], [], [], []
    for budget in np.geomspace(1e18, 1e21, 6):
        for factor in np.geomspace(0.2, 5, 7):
            for share in (1.0,) if gamma is None else (1.0, 0.4):
                size = np.sqrt(budget / 120) * factor
                n.append(size)
                d.append(budget / (6 * size * (1.0 if share == 1.0 else 0.8)))
                rho.append(share)
                flops.append(budget)
    n, d, rho = np.array(n), np.array(d), np.array(rho)
    loss = plain_loss(n, d, rho, gamma or 0.0, rho_on)
    loss *= np.exp(noise * np.random.default_rng(seed).standard_normal(len(n)))
    return Runs(n, d, loss, None if gamma is None else rho, np.array(flops), np.array(flops) * 2e-15, rho_on)


def write_csv(path: Path, runs: Runs, **columns: str) -> Path:
    """A CSV of runs; columns: names by field of `Runs`."""
    fields = {name: value for name, value in vars(runs).items() if name in columns and value is not None}
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([columns[name] for name in fields])
        writer.writerows(zip(*(map(repr, map(float, v)) for v in fields.values()), strict=True))
    return path
