"""Goodput: the share of the allocated time that went into useful steps, and where the rest went.

Rank 0 leaves a `times` event in `events.jsonl` now and then: seconds of its attempt by cause, so far. With
`attempts.jsonl`, which tells from when to when SLURM had given nodes, they account for every second.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

from chiar_megatron.metrics.jsonl import read_events, read_lines

EVENT = "times"
GOODPUT_FILE = "goodput.json"  # of the run folder
CAUSES = ("start", "restart", "save", "evaluation", "lost_steps", "end")
# Between `times` events, which a killed attempt may not have told of: a share of its age, within limits.
_EVERY_SHARE, _EVERY_MIN_SECONDS, _EVERY_MAX_SECONDS = 0.005, 1.0, 60.0


class WorkClock:
    """Seconds of one attempt by what they went into, from when its process began."""

    def __init__(self, began: float, now: float) -> None:
        """began, now: seconds of the monotonic clock."""
        self._began = began
        self._began_unix = time.time() - (now - began)
        self._first_step_done: Optional[float] = None
        self._paused = {"save": 0.0, "evaluation": 0.0}
        self._paused_before = 0.0
        self._told = now

    def pause(self, seconds: float, cause: str) -> None:
        """So many seconds went into "save" or "evaluation"."""
        self._paused[cause] += seconds

    def step_done(self, now: float) -> None:
        """The first step ends the start: compilation and loading are part of it."""
        if self._first_step_done is None:
            self._first_step_done = now
            self._paused_before = sum(self._paused.values())

    def is_due(self, now: float) -> bool:
        """Whether it is time for a `times` event."""
        every = _EVERY_SHARE * (now - self._began)
        return now - self._told >= min(max(every, _EVERY_MIN_SECONDS), _EVERY_MAX_SECONDS)

    def times(self, now: float) -> dict[str, float]:
        """The fields of a `times` event."""
        self._told = now
        first = self._first_step_done
        start_end = now if first is None else first
        before = sum(self._paused.values()) if first is None else self._paused_before
        start = start_end - self._began - before
        train = now - self._began - start - sum(self._paused.values())
        seconds = {"start": start, "train": train, **self._paused}
        return {"began": self._began_unix, **{name: round(value, 3) for name, value in seconds.items()}}


@dataclass
class _Process:
    """One process attempt, as `events.jsonl` tells it."""

    resume_step: int
    times: list[dict[str, Any]] = field(default_factory=list)

    @property
    def began(self) -> float:
        return float(self.times[0]["began"])

    @property
    def last_seen(self) -> float:
        last = self.times[-1]
        return self.began + sum(float(last[name]) for name in ("start", "train", "save", "evaluation"))

    def train_seconds(self, step: Optional[int] = None) -> float:
        """Seconds in steps, up to a step."""
        known = [t for t in self.times if step is None or t["step"] <= step]
        return float(known[-1]["train"]) if known else 0.0


@dataclass(frozen=True)
class Goodput:
    """Where a run's allocated time went, in seconds."""

    allocated: float
    """From when each attempt got its nodes, or its process began, to its end."""
    useful: float
    """In steps whose result the run still has; those since the last save are counted on trust."""
    losses: dict[str, float]
    """start: of the first attempt, to the end of its first step; restart: of later ones; save: training stood
    still; evaluation; lost_steps: steps that had to be done again; end: from the last record to the end."""
    waiting: float
    """Between attempts, not allocated: the queue."""
    attempts: int

    @property
    def share(self) -> Optional[float]:
        """Goodput, in [0, 1]; None where no time was allocated."""
        return self.useful / self.allocated if self.allocated > 0 else None

    def record(self) -> dict[str, Any]:
        """What `goodput.json` holds."""
        return {
            "goodput": None if self.share is None else round(self.share, 4),
            "allocated_seconds": round(self.allocated, 3),
            "useful_seconds": round(self.useful, 3),
            "lost_seconds": {cause: round(self.losses[cause], 3) for cause in CAUSES},
            "waiting_seconds": round(self.waiting, 3),
            "attempts": self.attempts,
        }


def measure_goodput(run_dir: Path) -> Goodput:
    """Account for the time of all attempts so far. Torn lines and missing files are left out."""
    processes = list(_processes(run_dir))
    losses = dict.fromkeys(CAUSES, 0.0)
    useful = 0.0
    for number, process in enumerate(processes):
        last = process.times[-1]
        losses["restart" if number else "start"] += float(last["start"])
        losses["save"] += float(last["save"])
        losses["evaluation"] += float(last["evaluation"])
        lost = 0.0
        if number + 1 < len(processes):
            kept = process.train_seconds(processes[number + 1].resume_step)
            lost = process.train_seconds() - kept
        losses["lost_steps"] += lost
        useful += process.train_seconds() - lost
    spans = _spans(run_dir, processes)
    for number, (begin, _, inside) in enumerate(spans):
        if inside:
            losses["restart" if number else "start"] += max(0.0, inside[0].began - begin)
    allocated = sum(end - begin for begin, end, _ in spans)
    losses["end"] = allocated - useful - sum(losses.values())
    waiting = sum(max(0.0, later[0] - earlier[1]) for earlier, later in zip(spans, spans[1:], strict=False))
    return Goodput(allocated, useful, losses, waiting, len(spans))


def _processes(run_dir: Path) -> Iterator[_Process]:
    found: Optional[_Process] = None
    for event in read_events(run_dir):
        kind = event.get("event")
        if kind in ("start", "resume"):
            if found is not None and found.times:
                yield found
            found = _Process(int(event.get("step") or 0))
        elif kind == EVENT and found is not None:
            found.times.append(event)
    if found is not None and found.times:
        yield found


def _spans(run_dir: Path, processes: Sequence[_Process]) -> list[tuple[float, float, list[_Process]]]:
    """Begin and end of each allocation, with the processes in it; a process outside SLURM is its own."""
    records = [r for r, _ in read_lines(run_dir / "attempts.jsonl") if r and "unix_seconds" in r]
    begins = [i for i, record in enumerate(records) if record.get("event") == "begin"]
    spans: list[tuple[float, float, list[_Process]]] = []
    left = list(processes)
    for place, index in enumerate(begins):
        begin = float(records[index]["unix_seconds"])
        later = float(records[begins[place + 1]]["unix_seconds"]) if place + 1 < len(begins) else float("inf")
        spans += [(p.began, p.last_seen, [p]) for p in left if p.began < begin]
        inside = [p for p in left if begin <= p.began < later]
        left = [p for p in left if p.began >= later]
        seen = max([begin, *(p.last_seen for p in inside)])
        following = records[index + 1] if index + 1 < len(records) else {}
        # The end of a lost attempt was noted by the next one: how long it lived on is not known.
        told = following.get("event") == "end" and following.get("exit_code") is not None
        spans.append((begin, max(seen, float(following["unix_seconds"])) if told else seen, inside))
    return spans + [(p.began, p.last_seen, [p]) for p in left]
