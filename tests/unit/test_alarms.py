"""Alarms: raised and cleared once each, and continued from a run's records."""

from __future__ import annotations

from typing import Any

from chiar_megatron.metrics.alarms import RoutingAlarms


def figures(step: int) -> tuple[list[float], list[float], list[float] | None]:
    """Fractions, overflow and imbalance (of every fifth step) of layers 2 and 5; each goes wrong in turn."""
    fraction = 0.995 if 20 <= step < 160 else 0.5
    overflow = 0.03 if 200 <= step < 300 else 0.001
    imbalance = 1.5 if 350 <= step < 500 else 1.05
    return [0.5, fraction], [0.0, overflow], [imbalance, 1.0] if step % 5 == 0 else None


def watch(alarms: RoutingAlarms, first: int, last: int) -> list[tuple[int, str, int, bool]]:
    told = []
    for step in range(first, last):
        told += [(step, c.alarm, c.layer, c.active) for c in alarms.step(step, *figures(step))]
    return told


def test_each_is_told_when_it_begins_and_when_it_ends() -> None:
    told = watch(RoutingAlarms([2, 5]), 1, 600)
    assert [event[1:] for event in told] == [
        ("routed_fraction", 5, True),
        ("routed_fraction", 5, False),
        ("overflow", 5, True),
        ("overflow", 5, False),
        ("imbalance", 2, True),
        ("imbalance", 2, False),
    ]
    steps = [event[0] for event in told]
    assert steps[:2] == [119, 160]  # the hundredth step, and the first in order
    # Means: of 50 steps 0.001 + 0.029·k/50 > 0.01 from k = 16; of 10 readings 1.05 + 0.45·k/10 > 1.2 from 4.
    assert steps[2:] == [215, 334, 365, 530]


def test_a_short_excursion_is_not_told() -> None:
    alarms = RoutingAlarms([2])
    for step in range(1, 400):
        share = 0.0 if step % 100 < 99 else 0.5
        assert alarms.step(step, [share], [0.0]) == []


def test_a_continued_run_tells_what_an_uninterrupted_one_would() -> None:
    """Whether it stops before, during or after each alarm. It logs every fifth step."""
    whole = watch(RoutingAlarms([2, 5]), 1, 600)
    for stop in (15, 60, 118, 130, 210, 250, 310, 360, 400, 510, 560):
        before, records = RoutingAlarms([2, 5]), []
        told = watch(before, 1, stop + 1)
        for step in range(5, stop + 1, 5):
            fractions, overflow, imbalance = figures(step)
            record: dict[str, Any] = {"step": step, "routed_fraction": fractions}
            records.append({**record, "overflow_fraction": overflow, "rank_max_over_mean": imbalance})
        after = RoutingAlarms([2, 5])
        events: list[dict[str, Any]] = [{"event": "start", "step": 0}]
        for at, alarm, layer, active in told:
            event = {"event": "alarm" if active else "alarm_over", "alarm": alarm, "layer": layer}
            events.append({**event, "step": at, "value": 1.0})
        # Of a killed attempt that had gone further:
        events.append({"event": "alarm", "alarm": "overflow", "layer": 2, "step": stop + 1, "value": 1.0})
        after.replay(records, events, stop)
        told += watch(after, stop + 1, 600)
        assert [event[1:] for event in told] == [event[1:] for event in whole], stop
        shifts = [abs(a[0] - b[0]) for a, b in zip(told, whole, strict=True)]
        assert max(shifts) <= 5, stop


def test_records_without_figures_are_passed_over() -> None:
    alarms = RoutingAlarms([2])
    alarms.replay([{"step": 1}, {"step": 2, "routed_fraction": [None], "overflow_fraction": [0.0]}], [], 2)
    alarms.replay([{"step": 3, "routed_fraction": [], "overflow_fraction": []}], [], 3)
    assert alarms.figures() == {} and alarms.step(4, [0.5], [0.0], [2.0]) == []
