"""Figures of a fit, PNG and SVG: loss over training FLOPs with the law, and isoFLOP curves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from chiar_megatron.errors import DataError
from chiar_megatron.metrics.picture import STYLE
from chiar_megatron.scaling.analysis import Analysis
from chiar_megatron.scaling.isoflop import rho_groups
from chiar_megatron.scaling.law import predict_loss
from chiar_megatron.scaling.predict import optimum

_MARKERS = "os^Dv"
_MOST_CURVES = 8  # sizes of one share of attention drawn as curves of their own


def draw_fit(analysis: Analysis, folder: Path) -> list[Path]:
    """Write `curves.png` and `isoflop.png`, and an SVG beside each. Raises DataError if it cannot."""
    written = []
    with matplotlib.rc_context(STYLE):
        for name, draw in (("curves", _draw_curves), ("isoflop", _draw_isoflop)):
            figure = Figure(figsize=(6.4, 4.4), layout="constrained")
            FigureCanvasAgg(figure)
            draw(analysis, figure.subplots())
            for suffix, options in ((".png", {"dpi": 160}), (".svg", {"metadata": {"Date": None}})):
                path = folder / f"{name}{suffix}"
                try:
                    folder.mkdir(parents=True, exist_ok=True)
                    figure.savefig(path, **options)
                except OSError as error:
                    raise DataError(f"figure {path} cannot be written ({error.strerror})") from error
                written.append(path)
    return written


Rows = npt.NDArray[np.intp]


def _groups(analysis: Analysis) -> list[tuple[str, float, Rows]]:
    """Label, ρ and rows of the runs that share a share of attention; full attention first."""
    shares = analysis.runs.rho
    if shares is None:
        return [("", 1.0, np.arange(len(analysis.runs)))]
    groups = [(float(shares[rows].mean()), rows) for rows in rho_groups(analysis.runs)]
    return [(f"ρ = {rho:.2f}", rho, rows) for rho, rows in groups]


def _draw_curves(analysis: Analysis, axes: Axes) -> None:
    """Every run at its FLOPs; for each size what the law says about longer and shorter runs."""
    runs = analysis.runs
    assert runs.flops is not None
    sizes = np.unique(np.round(np.log(runs.n), 1))
    colours = matplotlib.colormaps["viridis"](np.linspace(0, 0.9, len(sizes)))
    for (label, rho, rows), marker in zip(_groups(analysis), _MARKERS * 3, strict=False):
        place = np.searchsorted(sizes, np.round(np.log(runs.n[rows]), 1))
        axes.scatter(
            runs.flops[rows],
            runs.loss[rows],
            c=colours[place],
            marker=marker,
            s=22,
            zorder=3,
            label=label or "runs",
        )
        if len(np.unique(place)) <= _MOST_CURVES:
            for number in np.unique(place):
                _draw_one_size(analysis, axes, rows[place == number], rho, colours[number], marker)
        budgets = np.geomspace(runs.flops.min(), runs.flops.max() * 3, 60)
        axes.plot(
            budgets,
            [optimum(analysis, float(budget), rho=rho).loss.value for budget in budgets],
            color="#555555",
            linestyle="--" if marker == "o" else ":",
            linewidth=1.2,
            label=f"best for the budget{', ' + label if label else ''}",
        )
    axes.set(xscale="log", xlabel="training FLOPs", ylabel="loss (nats a token)", title="Runs and the law")
    axes.legend(loc="upper right")  # curves fall; "best" searches for seconds


def _draw_one_size(analysis: Analysis, axes: Axes, rows: Rows, rho: float, colour: Any, marker: str) -> None:
    runs = analysis.runs
    n = float(np.exp(np.log(runs.n[rows]).mean()))
    d = np.geomspace(runs.d[rows].min() / 1.5, runs.d[rows].max() * 1.5, 50)
    loss = predict_loss(analysis.law.values(), n, d, rho, runs.rho_on)
    axes.plot(
        d * analysis.flops.per_token(n, rho),
        loss,
        color=colour,
        linewidth=1.0,
        alpha=0.8 if marker == "o" else 0.5,
    )


def _draw_isoflop(analysis: Analysis, axes: Axes) -> None:
    """Loss over N at each budget, with the parabolas and their minima; without budgets, the law's curves."""
    runs = analysis.runs
    assert runs.flops is not None
    axes.set(xscale="log", xlabel="parameters N", ylabel="loss (nats a token)")
    if analysis.isoflop is None:
        _draw_law_isoflop(analysis, axes)
        axes.legend()
        return
    axes.set_title("IsoFLOP curves: runs, parabolas, minima")
    budgets = sorted({round(np.log(p.flops), 1) for p in analysis.isoflop.parabolas})
    colours = matplotlib.colormaps["viridis"](np.linspace(0, 0.85, len(budgets)))
    for parabola in analysis.isoflop.parabolas:
        colour = colours[budgets.index(round(np.log(parabola.flops), 1))]
        twin = parabola.rho is None or parabola.rho > 0.95
        near = np.abs(np.log(runs.flops / parabola.flops)) < 0.3
        if parabola.rho is not None and runs.rho is not None:
            near &= np.abs(runs.rho - parabola.rho) < 0.1
        label = f"{parabola.flops:.1e} FLOPs" + ("" if parabola.rho is None else f", ρ {parabola.rho:.2f}")
        axes.scatter(
            runs.n[near], runs.loss[near], color=colour, marker="o" if twin else "s", s=22, label=label
        )
        n = np.geomspace(runs.n[near].min(), runs.n[near].max(), 60)
        loss = parabola.loss + parabola.curvature * np.log(n / parabola.n) ** 2
        axes.plot(n, loss, color=colour, linestyle="-" if twin else ":", linewidth=1.2)
        if not parabola.inside:
            continue
        axes.plot(parabola.n, parabola.loss, marker="*", color=colour, markersize=11, markeredgecolor="white")
    axes.legend(fontsize=7.5)


def _draw_law_isoflop(analysis: Analysis, axes: Axes) -> None:
    runs = analysis.runs
    assert runs.flops is not None
    axes.set_title("IsoFLOP curves of the law (the runs have no budgets)")
    budgets = np.geomspace(runs.flops.min(), runs.flops.max(), 5)
    colours = matplotlib.colormaps["viridis"](np.linspace(0, 0.85, len(budgets)))
    n = np.geomspace(runs.n.min(), runs.n.max(), 80)
    for budget, colour in zip(budgets, colours, strict=True):
        d = budget / analysis.flops.per_token(n, 1.0)
        enough = d > 0.3 * runs.d.min()
        loss = predict_loss(analysis.law.values(), n[enough], d[enough])
        axes.plot(n[enough], loss, color=colour, label=f"{budget:.1e} FLOPs")
