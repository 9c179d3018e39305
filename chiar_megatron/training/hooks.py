"""When a run should stop or save: signals, time limits, intervals. The step's reduction makes ranks agree."""

from __future__ import annotations

import time
from pathlib import Path

from chiar_megatron.checkpoint.claim import Claim
from chiar_megatron.config.schema import RunConfig
from chiar_megatron.training.signals import StopSignals
from chiar_megatron.training.step import Requests

STOP_FILE = "STOP"  # `touch RUN/STOP` saves and stops the run
LOOK_SECONDS = 1.0  # between looks into the run folder: a busy shared file system shall not slow the steps


class Schedule:
    """What this rank asks for after a step."""

    def __init__(self, config: RunConfig, claim: Claim, is_main: bool, signals: StopSignals) -> None:
        self.config = config
        self.claim = claim
        self.stop_file = Path(config.run_dir) / STOP_FILE
        self.stop_seen, self.looked = False, -LOOK_SECONDS
        self.fenced = False
        self.is_main = is_main
        self.signals = signals
        self.last_save = time.monotonic()

    def requests(self) -> Requests:
        """Clocks differ between ranks: only rank 0's counts."""
        every = self.config.checkpoint.save_interval_minutes
        save = self.is_main and every > 0 and time.monotonic() - self.last_save >= every * 60
        return Requests(
            stop=self.signals.received is not None or self._out_of_time() or self._asked(), save=save
        )

    def _asked(self) -> bool:
        """Whether the run folder says so: by the stop file, or for a newer attempt, which fails the save."""
        now = time.monotonic()
        if self.is_main and not self.stop_seen and now - self.looked >= LOOK_SECONDS:
            self.stop_seen, self.looked = self.stop_file.exists(), now
            self.fenced = self.claim.is_lost()
        return self.stop_seen or self.fenced

    def obeyed(self) -> None:
        """Take the stop file away once the run is saved: one `touch` stops one attempt."""
        if self.is_main and self.stop_seen:
            self.stop_file.unlink(missing_ok=True)

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
        if self.stop_seen:
            return "stop file"
        return "exit_after_minutes" if self._out_of_time() else "signal to another rank"
