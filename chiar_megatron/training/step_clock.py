"""When each step ended, whatever the host was doing then."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol, TypeAlias

import torch


class TimingEvent(Protocol):
    """What is needed of a `torch.cuda.Event` with timing."""

    def record(self) -> None:
        """Place it behind what the current stream has yet to do."""

    def synchronize(self) -> None:
        """Wait until it has passed."""

    def elapsed_time(self, end_event: Any) -> float:
        """Milliseconds from here to another event; both have passed."""


StepEnd: TypeAlias = TimingEvent | float


class StepClock:
    """The times at which steps end, in seconds of the host's monotonic clock.

    On a CPU a step has ended when the call that does it returns. On CUDA the host looks at a step when it may
    have been over for long, or just now, as its own work has it: there an event ends every step, and the time
    between two of them is the device's own. Only the first step's begin is told by the host's clock.
    """

    def __init__(
        self,
        device: torch.device,
        new_event: Callable[[], TimingEvent] | None = None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        """new_event: makes the events; None takes CUDA's on CUDA, and needs none on a CPU."""
        if new_event is None and device.type == "cuda":
            new_event = partial(torch.cuda.Event, enable_timing=True)
        self._new_event = new_event
        self._now = now
        self._last: tuple[TimingEvent, float] | None = None

    def begin(self) -> None:
        """A step begins."""
        if self._new_event is not None and self._last is None:
            event = self._new_event()
            event.record()
            self._last = event, self._now()

    def end(self) -> StepEnd:
        """A step's work has all been begun. Never waits."""
        if self._new_event is None:
            return self._now()
        event = self._new_event()
        event.record()
        return event

    def wait(self, end: StepEnd) -> float:
        """Wait for the end of a step, in the order of steps; returns its time."""
        if isinstance(end, float):
            return end
        assert self._last is not None, "no step has begun"
        end.synchronize()
        last, last_time = self._last
        # The two clocks do not run quite alike, but no step ends after it has been seen to be over.
        ended = min(last_time + last.elapsed_time(end) / 1e3, self._now())
        self._last = end, ended
        return ended
