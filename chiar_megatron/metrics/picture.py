"""The picture of a run: loss, routed fraction of each layer, MetaRouter gate and throughput over steps."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Optional

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from chiar_megatron.errors import ChiarError
from chiar_megatron.metrics.jsonl import read_events, read_metrics

# Okabe and Ito's colours, which colour-blind readers tell apart: the run, then what it is compared with.
_RUN_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")
_REFERENCE_COLOUR = "#555555"
_LEGEND_LAYERS = 6  # more layers than this are told apart by a colour bar

_STYLE: dict[Any, Any] = {
    "font.size": 9.5,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "legend.fontsize": 8.5,
    "legend.frameon": False,
    "svg.hashsalt": "chiar",  # the same run gives the same bytes
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
    with matplotlib.rc_context(_STYLE):
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
    figure = Figure(figsize=(9.0, 6.2), layout="constrained")
    FigureCanvasAgg(figure)
    (loss, routed), (gate, throughput) = figure.subplots(2, 2, sharex=True)
    _draw_loss(loss, runs, _unigram_entropy(run_dir))
    _draw_routed(figure, routed, runs[0], _routed_layers(run_dir))
    _draw_gate(gate, runs[0])
    _draw_throughput(throughput, runs)
    for axes in (loss, routed, gate, throughput):
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
        axes.plot(steps, _smooth(losses), color=run.colour, linewidth=1.6, label=f"{prefix}training")
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
            color=_REFERENCE_COLOUR,
            linestyle="--",
            linewidth=1.2,
            label=f"unigram entropy {unigram_entropy:.2f}",
        )
    axes.legend(loc="upper right")


def _draw_routed(figure: Figure, axes: Axes, run: _Run, routed_layers: Sequence[int]) -> None:
    axes.set_title("Routed fraction (share sent to attention)")
    axes.set_ylim(-0.02, 1.02)
    records = [r for r in run.records if r.get("routed_fraction")]
    if not records:
        _say(axes, "no routed layers")
        return
    count = len(records[-1]["routed_fraction"])
    layers = routed_layers if len(routed_layers) == count else range(1, count + 1)
    colours = matplotlib.colormaps["viridis"]([0.88 * i / max(count - 1, 1) for i in range(count)])
    for index, layer in enumerate(layers):
        points = [(r["step"], r["routed_fraction"][index]) for r in records]
        steps = [step for step, value in points if value is not None]
        fractions = [value for _, value in points if value is not None]
        if count <= _LEGEND_LAYERS:  # of many layers the raw lines would hide each other
            axes.plot(steps, fractions, color=colours[index], alpha=0.2, linewidth=0.8)
        axes.plot(steps, _smooth(fractions), color=colours[index], linewidth=1.4, label=f"layer {layer}")
    if count <= _LEGEND_LAYERS:
        axes.legend(loc="best", ncols=2 if count > 3 else 1)
        return
    scale = ScalarMappable(BoundaryNorm(range(count + 1), count), ListedColormap(colours))
    shown = sorted({round(i * (count - 1) / 4) for i in range(5)})
    bar = figure.colorbar(scale, ax=axes, ticks=[index + 0.5 for index in shown], pad=0.02)
    bar.ax.set_yticklabels([str(layers[index]) for index in shown])
    bar.ax.minorticks_off()
    bar.set_label("layer")


def _draw_gate(axes: Axes, run: _Run) -> None:
    axes.set_title("MetaRouter gate g (share of layer 1)")
    axes.set_ylim(-0.02, 1.02)
    steps, gates = run.series("gate")
    if not steps:
        _say(axes, "no MetaRouter (g = 1)")
        return
    axes.plot(steps, gates, color=run.colour, linewidth=1.6)


def _draw_throughput(axes: Axes, runs: Sequence[_Run]) -> None:
    axes.set_title("Throughput (tokens per second)")
    axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    for run in runs:
        steps, rates = run.series("tokens_per_second")
        axes.plot(steps, rates, color=run.colour, alpha=0.2, linewidth=0.8)
        axes.plot(steps, _smooth(rates), color=run.colour, linewidth=1.6, label=run.label)
    axes.set_ylim(bottom=0)
    if len(runs) > 1:
        axes.legend(loc="lower right")


def _say(axes: Axes, text: str) -> None:
    """Explain an empty panel."""
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color=_REFERENCE_COLOUR)


def _smooth(values: Sequence[float]) -> list[float]:
    """Average over a twentieth of the run around each value; less at its steep start, not to shift it."""
    sums = [0.0, *accumulate(values)]
    half_width = len(values) // 40
    smoothed = []
    for index in range(len(values)):
        first = index - min(half_width, index)
        last = min(index + min(half_width, index), len(values) - 1)
        smoothed.append((sums[last + 1] - sums[first]) / (last + 1 - first))
    return smoothed


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
