"""The panels of a run's picture that show routing: layer by layer, and over ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure

from chiar_megatron.routing.statistics import BIN_WIDTH, BINS, FIRST_EDGE

LEGEND_LAYERS = 6  # more layers than this are told apart by a colour bar
REFERENCE_COLOUR = "#555555"
_BLUE, _ORANGE, _GREEN = "#0072B2", "#D55E00", "#009E73"

Record = dict[str, Any]


def say(axes: Axes, text: str) -> None:
    """Explain an empty panel."""
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color=REFERENCE_COLOUR)


def smooth(values: Sequence[float]) -> list[float]:
    """Average over a twentieth of the run around each value; less at its steep start, not to shift it."""
    sums = [0.0, *accumulate(values)]
    half_width = len(values) // 40
    smoothed = []
    for index in range(len(values)):
        first = index - min(half_width, index)
        last = min(index + min(half_width, index), len(values) - 1)
        smoothed.append((sums[last + 1] - sums[first]) / (last + 1 - first))
    return smoothed


def draw_layers(
    figure: Figure, axes: Axes, records: Sequence[Record], key: str, layers: Sequence[int]
) -> None:
    """A line for each routed layer over steps; layers: their numbers in the model."""
    records = [record for record in records if record.get(key)]
    if not records:
        say(axes, "no routed layers")
        return
    count = len(records[-1][key])
    layers = layers if len(layers) == count else range(1, count + 1)
    for index, colour in enumerate(_colours(count)):
        points = [(r["step"], r[key][index]) for r in records if r[key][index] is not None]
        steps, values = [step for step, _ in points], [value for _, value in points]
        if count <= LEGEND_LAYERS:  # of many layers the raw lines would hide each other
            axes.plot(steps, values, color=colour, alpha=0.2, linewidth=0.8)
        axes.plot(steps, smooth(values), color=colour, linewidth=1.4, label=f"layer {layers[index]}")
    _name_layers(figure, axes, layers)


def draw_scores(figure: Figure, axes: Axes, records: Sequence[Record], layers: Sequence[int]) -> None:
    """The last score histogram of each layer, and where its threshold stands in it (dotted)."""
    records = [r for r in records if r.get("score_histogram")]
    if not records:
        say(axes, "no scores recorded")
        return
    record = records[-1]
    axes.set_title(f"Scores at step {record['step']} (shares of tokens by bin)")
    count = len(record["score_histogram"])
    layers = layers if len(layers) == count else range(1, count + 1)
    edges = [FIRST_EDGE + BIN_WIDTH * index for index in range(-1, BINS)]
    for index, colour in enumerate(_colours(count)):
        counts = record["score_histogram"][index]
        shares = [value / max(sum(counts), 1) for value in counts]
        axes.stairs(shares, edges, color=colour, linewidth=1.2, label=f"layer {layers[index]}")
        deviation = (record.get("score_std") or [0.0] * count)[index]
        if record.get("threshold") and deviation:
            place = (record["threshold"][index] - record["score_mean"][index]) / deviation
            axes.axvline(max(edges[0], min(place, edges[-1])), color=colour, linestyle=":", linewidth=1.0)
    axes.set_xlabel("standard deviations from the mean")
    _name_layers(figure, axes, layers)


def draw_rows(axes: Axes, records: Sequence[Record]) -> None:
    """Useful over executed rows and overflow over light tokens: mean of the layers, and the worst one."""
    axes.set_title("Attention's rows (mean of layers; thin: worst)")
    for key, label, colour, worst in (
        ("useful_over_executed", "useful ÷ executed", _BLUE, min),
        ("overflow_fraction", "overflow ÷ light", _ORANGE, max),
    ):
        _draw_worst(axes, records, key, (label, colour), worst)
    axes.set_ylim(-0.02, 1.04)
    axes.legend(loc="center right")


def draw_balance(axes: Axes, records: Sequence[Record]) -> None:
    """Largest over mean of the ranks: light tokens, executed rows, and time."""
    axes.set_title("Over ranks, largest ÷ mean (worst layer)")
    for key, label, colour in (
        ("rank_max_over_mean", "light tokens before capacity", _ORANGE),
        ("executed_max_over_mean", "executed rows", _BLUE),
    ):
        steps, values = _points(records, key, max)
        axes.plot(steps, smooth(values), color=colour, linewidth=1.6, label=label)
    timed = [(r["step"], r["rank_seconds"]["max_over_mean"]) for r in records if r.get("rank_seconds")]
    axes.plot(
        [step for step, _ in timed], smooth([value for _, value in timed]),
        color=_GREEN, linewidth=1.2, linestyle="--", label="own work, seconds",
    )  # fmt: skip
    axes.set_ylim(bottom=0.98)
    axes.legend(loc="upper right")


def _draw_worst(
    axes: Axes, records: Sequence[Record], key: str, style: tuple[str, str], worst: Callable[..., float]
) -> None:
    label, colour = style
    steps, means = _points(records, key, lambda values: sum(values) / len(values))
    axes.plot(steps, smooth(means), color=colour, linewidth=1.6, label=label)
    steps, extremes = _points(records, key, worst)
    axes.plot(steps, smooth(extremes), color=colour, linewidth=0.8, alpha=0.6)


def _points(
    records: Sequence[Record], key: str, reduce: Callable[[Sequence[float]], float]
) -> tuple[list[int], list[float]]:
    """Steps, and one number of all layers for each, where every layer has one."""
    held = [r for r in records if r.get(key) and None not in r[key]]
    return [r["step"] for r in held], [reduce(r[key]) for r in held]


def _colours(count: int) -> Any:
    return matplotlib.colormaps["viridis"]([0.88 * i / max(count - 1, 1) for i in range(count)])


def _name_layers(figure: Figure, axes: Axes, layers: Sequence[int]) -> None:
    """A legend, or of many layers a colour bar."""
    count = len(layers)
    if count <= LEGEND_LAYERS:
        axes.legend(loc="best", ncols=2 if count > 3 else 1)
        return
    scale = ScalarMappable(BoundaryNorm(range(count + 1), count), ListedColormap(_colours(count)))
    shown = sorted({round(i * (count - 1) / 4) for i in range(5)})
    bar = figure.colorbar(scale, ax=axes, ticks=[index + 0.5 for index in shown], pad=0.02)
    bar.ax.set_yticklabels([str(layers[index]) for index in shown])
    bar.ax.minorticks_off()
    bar.set_label("layer")
