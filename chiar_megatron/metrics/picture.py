"""The picture of a run: loss, routed fraction of each layer, MetaRouter gate and throughput over steps; where
layers are routed also attention's rows, balance over ranks, thresholds and scores."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from chiar_megatron.errors import ChiarError
from chiar_megatron.metrics.jsonl import read_events, read_metrics
from chiar_megatron.metrics.picture_routing import (
    REFERENCE_COLOUR,
    draw_balance,
    draw_layers,
    draw_rows,
    draw_scores,
    say,
    smooth,
)

# Okabe and Ito's colours, which colour-blind readers tell apart: the run, then what it is compared with.
_RUN_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")

STYLE: dict[Any, Any] = {
    "font.size": 9.5,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "legend.fontsize": 8.5,
    "legend.frameon": False,
    "svg.hashsalt": "chiar",  # the same figures give the same bytes
}


@dataclass(frozen=True)
class _Run:
    """What is drawn of one run folder."""

    label: str
    records: list[dict[str, Any]]
    colour: str

    def series(self, key: str) -> tuple[list[int], list[float]]:
        """Steps and values of the records where `key` is a number."""
        points = [(r["step"], r[key]) for r in self.records if isinstance(r.get(key), (int, float))]
        return [step for step, _ in points], [value for _, value in points]

    def validation(self) -> dict[str, tuple[list[int], list[float]]]:
        """Steps and losses by name of the validation set."""
        found: dict[str, tuple[list[int], list[float]]] = {}
        for record in self.records:
            for name, loss in (record.get("validation") or {}).items():
                if loss is not None:
                    steps, losses = found.setdefault(name, ([], []))
                    steps.append(record["step"])
                    losses.append(loss)
        return found


def draw_run(
    run_dir: Path, output: Optional[Path] = None, compare: Optional[Mapping[str, Path]] = None
) -> Path:
    """Draw a run from its `metrics.jsonl` as PNG, and as SVG beside it.

    The loss panel also shows validation losses, the unigram entropy of the text where
    `<run_dir>/summary.json` has `unigram_entropy_nats`, and the runs of `compare`.

    Args:
        run_dir: the run folder.
        output: the `.png` to write; None for `<run_dir>/picture.png`.
        compare: other run folders by the name to show, e.g. `{"full attention": twin_dir}`; at most 3.

    Returns:
        The path of the PNG.

    Raises:
        ChiarError: metrics are missing or malformed or have fewer than 2 steps with a loss, or the picture
            cannot be written.
    """
    png = output or run_dir / "picture.png"
    if png.suffix != ".png":
        raise ChiarError(
            f"the picture's path {png} does not end in .png: rename it (an .svg is drawn beside it)"
        )
    folders = {"this run": run_dir, **(compare or {})}
    if len(folders) > len(_RUN_COLOURS):
        raise ChiarError(
            f"{len(folders) - 1} runs to compare with, at most {len(_RUN_COLOURS) - 1}: leave some out"
        )
    runs = [
        _load(folder, label, colour)
        for (label, folder), colour in zip(folders.items(), _RUN_COLOURS, strict=False)
    ]
    with matplotlib.rc_context(STYLE):
        figure = _draw(run_dir, runs)
        try:
            png.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(png, dpi=200)
            figure.savefig(png.with_suffix(".svg"), metadata={"Date": None})
        except OSError as error:
            raise ChiarError(f"the picture {png} cannot be written ({error.strerror})") from error
    return png


def _load(run_dir: Path, label: str, colour: str) -> _Run:
    run = _Run(label, read_metrics(run_dir), colour)
    steps, _ = run.series("loss")
    if len(steps) < 2:
        raise ChiarError(
            f"{run_dir / 'metrics.jsonl'} has {len(steps)} steps with a loss, a picture needs 2: train longer"
        )
    return run


def _draw(run_dir: Path, runs: Sequence[_Run]) -> Figure:
    records, layers = runs[0].records, _routed_layers(run_dir)
    has_balance = any(record.get("rank_max_over_mean") for record in records)
    rows = 4 if has_balance else 2
    figure = Figure(figsize=(9.0, 3.1 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(rows, 2)
    (loss, routed), (gate, throughput) = panels[:2]
    _draw_loss(loss, runs, _unigram_entropy(run_dir))
    routed.set_title("Routed fraction (share sent to attention)")
    routed.set_ylim(-0.02, 1.02)
    draw_layers(figure, routed, records, "routed_fraction", layers)
    _draw_gate(gate, runs[0])
    _draw_throughput(throughput, runs)
    over_steps = [loss, routed, gate, throughput]
    if has_balance:
        (attention_rows, balance), (threshold, scores) = panels[2:]
        draw_rows(attention_rows, records)
        draw_balance(balance, records)
        threshold.set_title("Threshold of the score")
        draw_layers(figure, threshold, records, "threshold", layers)
        draw_scores(figure, scores, records, layers)
        over_steps += [attention_rows, balance, threshold]
    for axes in over_steps:
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 2.5, 5, 10], integer=True))
        axes.tick_params(labelbottom=True)
        axes.set_xlabel("step")
    return figure


def _draw_loss(axes: Axes, runs: Sequence[_Run], unigram_entropy: Optional[float]) -> None:
    axes.set_title("Loss (nats per token)")
    for run in runs:
        prefix = f"{run.label}, " if len(runs) > 1 else ""
        steps, losses = run.series("loss")
        axes.plot(steps, losses, color=run.colour, alpha=0.2, linewidth=0.8)
        axes.plot(steps, smooth(losses), color=run.colour, linewidth=1.6, label=f"{prefix}training")
        for marker, (name, (at, values)) in zip("osD^vPX*", run.validation().items(), strict=False):
            axes.plot(
                at,
                values,
                color=run.colour,
                marker=marker,
                markersize=5,
                markerfacecolor="white",
                linestyle=":",
                label=f"{prefix}{'validation' if name == 'validation' else f'validation {name}'}",
            )
    if unigram_entropy is not None:
        axes.axhline(
            unigram_entropy,
            color=REFERENCE_COLOUR,
            linestyle="--",
            linewidth=1.2,
            label=f"unigram entropy {unigram_entropy:.2f}",
        )
    axes.legend(loc="upper right")


def _draw_gate(axes: Axes, run: _Run) -> None:
    axes.set_title("MetaRouter gate g (share of layer 1)")
    axes.set_ylim(-0.02, 1.02)
    steps, gates = run.series("gate")
    if not steps:
        say(axes, "no MetaRouter (g = 1)")
        return
    axes.plot(steps, gates, color=run.colour, linewidth=1.6)


def _draw_throughput(axes: Axes, runs: Sequence[_Run]) -> None:
    axes.set_title("Throughput (tokens per second)")
    axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    for run in runs:
        steps, rates = run.series("tokens_per_second")
        axes.plot(steps, rates, color=run.colour, alpha=0.2, linewidth=0.8)
        axes.plot(steps, smooth(rates), color=run.colour, linewidth=1.6, label=run.label)
    axes.set_ylim(bottom=0)
    if len(runs) > 1:
        axes.legend(loc="lower right")


def _routed_layers(run_dir: Path) -> list[int]:
    """Numbers of the R layers in the model, as the last start of the run told them; [] if it did not."""
    told = [event["routed_layers"] for event in read_events(run_dir) if "routed_layers" in event]
    return told[-1] if told else []


def _unigram_entropy(run_dir: Path) -> Optional[float]:
    path = run_dir / "summary.json"
    if not path.exists():
        return None
    try:
        value = json.loads(path.read_text(encoding="utf-8")).get("unigram_entropy_nats")
        return None if value is None else float(value)
    except (ValueError, TypeError, AttributeError) as error:
        raise ChiarError(
            f"{path} is not a JSON object with a number unigram_entropy_nats ({error})"
        ) from error
