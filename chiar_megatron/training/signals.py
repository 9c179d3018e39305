"""SIGTERM and SIGUSR1 as a request to save and stop; light, for it is the first thing a rank needs."""

from __future__ import annotations

import signal
import time
from types import FrameType


class StopSignals:
    """Notes SIGTERM and SIGUSR1, so that a step is finished and saved before the exit."""

    def __init__(self) -> None:
        self.received: str | None = None
        self.started = time.monotonic()
        """When this process began, nearly: what `training.exit_after_minutes` counts from."""
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number).name
