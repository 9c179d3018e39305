"""One page about a fit, as HTML that needs no other file."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterator, Sequence
from pathlib import Path

from chiar_megatron import __version__
from chiar_megatron.checkpoint.files import write_durably
from chiar_megatron.errors import DataError
from chiar_megatron.scaling.analysis import Analysis
from chiar_megatron.scaling.predict import efficiency_multiplier, optimum

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; margin: 0.6rem 0; } td, th { padding: 0.15rem 0.8rem; text-align: right; }
th { border-bottom: 1px solid #888; } td:first-child, th:first-child { text-align: left; }
img { width: 49%; } .warning { color: #a33; } code { background: #eee; padding: 0 0.2rem; }
"""


def write_report(analysis: Analysis, figures: Sequence[Path], path: Path, notes: Sequence[str]) -> None:
    """Write the page; figures: PNG files to set into it. Raises DataError if it cannot be written."""
    body = "\n".join(_body(analysis, figures, notes))
    title = f"Scaling law of {html.escape(Path(analysis.source).name)}"
    page = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>'
        f"<style>{_STYLE}</style><body><h1>{title}</h1>\n{body}\n</body></html>\n"
    )
    try:
        write_durably(path, page)
    except OSError as error:
        raise DataError(f"{path} cannot be written ({error.strerror}); choose another --output") from error


def _body(analysis: Analysis, figures: Sequence[Path], notes: Sequence[str]) -> Iterator[str]:
    settings = analysis.settings
    form = "E + A/N<sup>α</sup> + B/D<sup>β</sup>"
    if analysis.law.gamma is not None:
        what = {"n": "N", "d": "D", "both": "N and D"}[analysis.runs.rho_on]
        form += f" with {what} times e<sup>γ(ρ-1)</sup>"
    yield f"<p>loss = {form}, nats a token; {len(analysis.runs)} runs. Huber loss of ln loss, δ = "
    yield f"{settings.delta:g}, by {settings.method}; {settings.resamples} resamples, "
    yield f"intervals {settings.level:.0%}. chiar-megatron {__version__}.</p>"
    for note in notes:
        yield f"<p>{html.escape(note)}</p>"
    for warning in analysis.warnings:
        yield f'<p class="warning">{html.escape(warning)}</p>'
    intervals = analysis.intervals()
    yield from _table(
        ("parameter", "value", "from", "to"),
        [
            (name, f"{value:.6g}", *(f"{end:.5g}" for end in intervals.get(name, ())))
            for name, value in zip(analysis.law.names, analysis.law.values(), strict=True)
        ],
    )
    for figure in figures:
        data = base64.b64encode(figure.read_bytes()).decode()
        yield f'<img alt="{figure.stem}" src="data:image/png;base64,{data}">'
    yield from _optima(analysis)
    if analysis.held_out is not None:
        held = analysis.held_out
        yield f"<h2>Held out</h2><p>Fitted without the {held.runs} largest runs, which reach "
        yield f"{held.extrapolation:.3g} times the FLOPs fitted: mean error {held.mean_error:+.4f} nats, "
        yield f"mean absolute {held.mean_absolute_error:.4f}, worst {held.worst_relative_error:.2%}.</p>"


def _optima(analysis: Analysis) -> Iterator[str]:
    """Compute-optimal sizes up to ten times the largest budget, and what CHIAR is worth."""
    runs = analysis.runs
    assert runs.flops is not None
    top = float(runs.flops.max())
    shares = [1.0] if runs.rho is None else sorted({1.0, round(float(runs.rho.min()), 2)}, reverse=True)
    rows = []
    for budget in (top / 10, top, 10 * top):
        for rho in shares:
            best = optimum(analysis, budget, rho=rho)
            rows.append((f"{budget:.3g}", f"{rho:g}", str(best.n), str(best.d), str(best.loss)))
    yield "<h2>Best N and D for a budget</h2>"
    yield from _table(("FLOPs", "ρ", "N", "D", "loss"), rows)
    if analysis.law.gamma is None or shares == [1.0]:
        return
    yield "<h2>Efficiency multiplier against the twin</h2>"
    units = [("FLOPs", False)] + ([("device seconds", True)] if analysis.seconds is not None else [])
    worth = [
        (f"{shares[-1]:g}", unit, str(efficiency_multiplier(analysis, shares[-1], seconds=seconds)))
        for unit, seconds in units
    ]
    yield from _table(("ρ", "in", "the twin's budget over CHIAR's, for equal loss"), worth)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield "<table><tr>" + "".join(f"<th>{html.escape(cell)}</th>" for cell in header) + "</tr>"
    for row in rows:
        yield "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>"
    yield "</table>"
