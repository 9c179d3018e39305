"""When routing needs its user: a layer that has collapsed, tokens without rows, ranks with unequal work.

- `routed_fraction`: a layer's share of light tokens has been under 1% or over 99% for 100 steps.
- `overflow`: over 1% of a layer's light tokens found no row, mean of the last 50 steps.
- `imbalance`: a layer's light tokens before capacity, largest over mean of the data-parallel ranks, are
  above 1.2, mean of the last 10 logged steps.

Each is told when it begins and when it ends. Nothing is saved: a continued run takes its state from
`metrics.jsonl` (steps between two logged ones count as the later one) and from what `events.jsonl` says was
told.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

LOWEST_FRACTION, HIGHEST_FRACTION, FRACTION_STEPS = 0.01, 0.99, 100
OVERFLOW_LIMIT, OVERFLOW_STEPS = 0.01, 50
IMBALANCE_LIMIT, IMBALANCE_READINGS = 1.2, 10


@dataclass(frozen=True)
class Change:
    """An alarm that begins (`active`) or ends."""

    alarm: str
    layer: int
    value: float
    active: bool

    def __str__(self) -> str:
        where = f"layer {self.layer}: "
        if not self.active:
            return f"{where}{self.alarm} is in order again ({self.value:.3g})"
        if self.alarm == "routed_fraction":
            return (
                f"{where}{self.value:.2%} of the tokens have gone to attention for {FRACTION_STEPS} steps: "
                "set model.router.target, or the threshold by `chiar calibrate`"
            )
        if self.alarm == "overflow":
            return (
                f"{where}{self.value:.1%} of the light tokens found no row in the last {OVERFLOW_STEPS} "
                "steps (choosing them sees the future): raise model.router.slack"
            )
        return (
            f"{where}the data-parallel rank with the most light tokens has {self.value:.2f} times the mean: "
            "mix the text of ranks. With model.router.target and capacity auto their work is equal all the "
            "same, and what exceeds a rank's rows overflows"
        )


class RoutingAlarms:
    """Watches the routed layers of a run."""

    def __init__(self, layers: Sequence[int]) -> None:
        """layers: numbers of the routed layers, in the order of per-layer lists."""
        self.layers = list(layers)
        self.active: dict[tuple[str, int], float] = {}
        self._extreme_since: dict[int, int] = {}
        self._overflow = {layer: deque[float](maxlen=OVERFLOW_STEPS) for layer in layers}
        self._imbalance = {layer: deque[float](maxlen=IMBALANCE_READINGS) for layer in layers}

    def step(
        self,
        step: int,
        fractions: Sequence[float],
        overflow: Sequence[float],
        imbalance: Sequence[float] | None = None,
        steps: int = 1,
    ) -> list[Change]:
        """Take one step's figures, imbalance where it is known; `steps` that they stand for. What changed."""
        if len(fractions) != len(self.layers):
            return []  # a step in which not every layer counted tokens
        changes = []
        for index, layer in enumerate(self.layers):
            fraction = fractions[index]
            if LOWEST_FRACTION <= fraction <= HIGHEST_FRACTION:
                self._extreme_since.pop(layer, None)
            else:
                self._extreme_since.setdefault(layer, step - steps + 1)
            since = self._extreme_since.get(layer, step + 1)
            changes += self._set("routed_fraction", layer, fraction, step + 1 - since >= FRACTION_STEPS)
            lost = self._overflow[layer]
            lost.extend([overflow[index]] * min(steps, OVERFLOW_STEPS))
            mean = sum(lost) / len(lost)
            changes += self._set("overflow", layer, mean, len(lost) == lost.maxlen and mean > OVERFLOW_LIMIT)
            if imbalance is not None:
                seen = self._imbalance[layer]
                seen.append(imbalance[index])
                mean = sum(seen) / len(seen)
                full = len(seen) == seen.maxlen
                changes += self._set("imbalance", layer, mean, full and mean > IMBALANCE_LIMIT)
        return changes

    def replay(
        self, records: Iterable[Mapping[str, Any]], events: Iterable[Mapping[str, Any]], step: int
    ) -> None:
        """Take the state that a run's metrics and events leave after `step`, without telling anybody."""
        before = 0
        for record in records:
            fractions, overflow = record.get("routed_fraction"), record.get("overflow_fraction")
            if fractions and overflow and None not in (*fractions, *overflow):
                imbalance = record.get("rank_max_over_mean") or None
                self.step(record["step"], fractions, overflow, imbalance, record["step"] - before)
            before = record["step"]
        # What the user was told counts, not what logged steps alone would have told.
        self.active.clear()
        for event in events:
            if event["event"] in ("alarm", "alarm_over") and event["step"] <= step:
                self._set(event["alarm"], event["layer"], event["value"], event["event"] == "alarm")

    def figures(self) -> dict[str, float]:
        """What is out of order now: `imbalance/layer_3` and its value."""
        return {f"{kind}/layer_{layer}": value for (kind, layer), value in sorted(self.active.items())}

    def _set(self, kind: str, layer: int, value: float, active: bool) -> list[Change]:
        was = (kind, layer) in self.active
        if active:
            self.active[kind, layer] = value
        else:
            self.active.pop((kind, layer), None)
        return [] if was == active else [Change(kind, layer, value, active)]
