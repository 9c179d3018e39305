"""When a run should stop or save: signals, time limits, intervals. The step's reduction makes ranks agree."""

from __future__ import annotations

import signal
import time
from types import FrameType

from chiar_megatron.config.schema import RunConfig
from chiar_megatron.training.step import Requests


class StopSignals:
    """Turns SIGTERM and SIGUSR1 into a request, so that a step is finished and saved before the exit."""

    def __init__(self) -> None:
        self.received: str | None = None
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number).name


class Schedule:
    """What this rank asks for after a step."""

    def __init__(self, config: RunConfig, is_main: bool, signals: StopSignals) -> None:
        self.config = config
        self.is_main = is_main
        self.signals = signals
        self.started = self.last_save = time.monotonic()

    def requests(self) -> Requests:
        """Clocks differ between ranks: only rank 0's counts."""
        now = time.monotonic()
        limit = self.config.training.exit_after_minutes
        every = self.config.checkpoint.save_interval_minutes
        out_of_time = self.is_main and limit is not None and now - self.started >= limit * 60
        save = self.is_main and every > 0 and now - self.last_save >= every * 60
        return Requests(stop=self.signals.received is not None or out_of_time, save=save)

    def saved(self) -> None:
        """Start the interval anew."""
        self.last_save = time.monotonic()

    def save_due(self, step: int) -> bool:
        """Whether the recipe wants a checkpoint after this many steps."""
        every = self.config.checkpoint.save_interval_steps
        return every > 0 and step % every == 0

    def validation_due(self, step: int) -> bool:
        """Whether the recipe wants a validation after this many steps."""
        every = self.config.training.eval_interval_steps
        last = step == self.config.training.steps
        return self.config.training.eval_steps > 0 and (last or (every > 0 and step % every == 0))

    def stop_reason(self) -> str:
        """Why this rank asked to stop, if it did."""
        return self.signals.received or "time_limit"
