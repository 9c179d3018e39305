"""When a run should stop or save: signals, time limits, intervals. The step's reduction makes ranks agree."""

from __future__ import annotations

import time

from chiar_megatron.config.schema import RunConfig
from chiar_megatron.training.signals import StopSignals
from chiar_megatron.training.step import Requests


class Schedule:
    """What this rank asks for after a step."""

    def __init__(self, config: RunConfig, is_main: bool, signals: StopSignals) -> None:
        self.config = config
        self.is_main = is_main
        self.signals = signals
        self.last_save = time.monotonic()

    def requests(self) -> Requests:
        """Clocks differ between ranks: only rank 0's counts."""
        every = self.config.checkpoint.save_interval_minutes
        save = self.is_main and every > 0 and time.monotonic() - self.last_save >= every * 60
        return Requests(stop=self.signals.received is not None or self._out_of_time(), save=save)

    def _out_of_time(self) -> bool:
        limit = self.config.training.exit_after_minutes
        return self.is_main and limit is not None and time.monotonic() - self.signals.started >= limit * 60

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

    def waits_for(self, step: int) -> bool:
        """Whether a save or a validation follows this step."""
        return self.save_due(step) or self.validation_due(step)

    def stop_reason(self) -> str:
        """Why the run stops, as far as this rank knows."""
        if self.signals.received is not None:
            return self.signals.received
        return "exit_after_minutes" if self._out_of_time() else "signal to another rank"
