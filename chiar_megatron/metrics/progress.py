"""One line per logged step, for a terminal and for a log file."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from typing import Optional

from rich.console import Console
from rich.markup import escape

from chiar_megatron.metrics.jsonl import Metrics, MetricValue


def short_number(value: float) -> str:
    """Three significant digits and a unit prefix: 12345 is `12.3k`."""
    for limit, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit * 0.9995:
            return f"{value / limit:#.3g}".rstrip(".") + suffix
    return f"{value:.3g}"


def short_duration(seconds: float) -> str:
    """The two largest units: `45s`, `3m20s`, `1h02m`, `2d04h`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"


class ProgressLine:
    """Renders and prints the figures of one step; what a record does not have is left out.

    Besides the keys of `metrics.jsonl` (see the package's docstring) it shows `eta_seconds` and `restarts`.
    """

    def __init__(self, total_steps: int, is_tty: bool) -> None:
        self._total_steps = total_steps
        self._is_tty = is_tty

    def render(self, metrics: Metrics) -> str:
        """The line: plain text for a log file, with rich's markup for a terminal."""
        step = _scalar(metrics, "step") or 0
        width = len(str(self._total_steps))
        parts = [self._part("step", f"{step:{width}.0f}/{self._total_steps}")]
        parts += [self._part(label, text) for label, text in _training_figures(metrics)]
        validation = metrics.get("validation")
        if isinstance(validation, Mapping):
            parts += [self._part(f"val {name}", f"{loss:.4f}") for name, loss in validation.items()]
        parts += [self._part(label, text, alarm=True) for label, text in _trouble(metrics)]
        return "  ".join(parts)

    def show(self, metrics: Metrics) -> None:
        """Print the line on standard output, after the time of day if that is a log file."""
        line = self.render(metrics)
        with suppress(OSError):  # a log file on a full disk, or a reader that left, does not stop a run
            if self._is_tty:
                Console(file=sys.stdout, highlight=False).print(line)
            else:
                print(f"{datetime.now():%Y-%m-%d %H:%M:%S}  {line}", flush=True)

    def say(self, text: str) -> None:
        """Print a line of words, like `show`."""
        with suppress(OSError):
            stamp = "" if self._is_tty else f"{datetime.now():%Y-%m-%d %H:%M:%S}  "
            print(stamp + text, flush=True)

    def _part(self, label: str, text: str, alarm: bool = False) -> str:
        if not self._is_tty:
            return f"{label} {text}"
        return f"[dim]{escape(label)}[/dim] [bold {'red' if alarm else 'cyan'}]{escape(text)}[/]"


def _training_figures(metrics: Metrics) -> list[tuple[str, str]]:
    """Label and text of every figure that the record has, in the order of the line."""
    figures: list[tuple[str, str]] = []
    for key, label, form in (
        ("loss", "loss", "{:.4f}"),
        ("tokens_per_second", "tokens/s", ""),
        ("mfu", "MFU", "{:.1%}"),
        ("grad_norm", "grad", "{:.3g}"),
        ("learning_rate", "lr", "{:.2e}"),
    ):
        value = _scalar(metrics, key)
        if value is not None:
            figures.append((label, form.format(value) if form else short_number(value)))
    fractions = _numbers(metrics.get("routed_fraction"))
    if fractions:
        mean = sum(fractions) / len(fractions)
        figures.append(("routed", f"{mean:.2f} ({min(fractions):.2f}-{max(fractions):.2f})"))
    gate = _scalar(metrics, "gate")
    if gate is not None:
        figures.append(("gate", f"{gate:.3f}"))
    eta = _scalar(metrics, "eta_seconds")
    if eta is not None and math.isfinite(eta):
        figures.append(("eta", short_duration(eta)))
    return figures


def _trouble(metrics: Metrics) -> list[tuple[str, str]]:
    """What is shown only once there is any."""
    found = [
        (label, _scalar(metrics, key))
        for key, label in (("restarts", "restarts"), ("bad_steps", "bad steps"))
    ]
    alarms = metrics.get("alarms")
    found.append(("alarms", len(alarms) if isinstance(alarms, Mapping) else None))
    return [(label, f"{count:.0f}") for label, count in found if count]


def _scalar(metrics: Metrics, key: str) -> Optional[float]:
    value = metrics.get(key)
    return value if isinstance(value, (int, float)) else None


def _numbers(value: MetricValue) -> list[float]:
    if not isinstance(value, Sequence):
        return []
    return [number for number in value if isinstance(number, (int, float))]
