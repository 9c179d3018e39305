"""`chiar scaling submit`: the runs of a sweep, one after another here, or by another back end."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from chiar_megatron.errors import EXIT_DONE, EXIT_RESUMABLE
from chiar_megatron.scaling.collect import collect_run
from chiar_megatron.scaling.manifest import PlannedRun, Sweep

Say = Callable[[str], None]


@dataclass(frozen=True)
class Outcome:
    """What came of one run."""

    run: PlannedRun
    exit_code: int
    seconds: float


class Backend(Protocol):
    """Where runs are started. `submit` hands it those that are not finished."""

    def start(self, sweep: Sweep, runs: Sequence[PlannedRun], say: Say) -> int:
        """Start the runs; returns the exit code of `chiar scaling submit`."""


def submit(sweep: Sweep, backend: Backend, say: Say, *, held_out: bool = False) -> int:
    """Start what is not finished; held_out: the runs planned as such instead of the others.

    Returns the backend's exit code, 0 if there was nothing to start.
    """
    wanted = [run for run in sweep.runs if run.held_out == held_out]
    statuses = {run.name: collect_run(Path(run.run_dir)).status for run in wanted}
    left = [run for run in wanted if statuses[run.name] != "finished"]
    say(f"{len(wanted) - len(left)} of {len(wanted)} runs are finished")
    for run in (run for run in left if statuses[run.name] == "running"):
        say(f"{run.name} looks as if it were running elsewhere (it wrote in the last minutes)")
    return backend.start(sweep, left, say) if left else EXIT_DONE


class Local:
    """One run after another on this machine. A failed run does not stop the others; a stopped one does."""

    def start(self, sweep: Sweep, runs: Sequence[PlannedRun], say: Say) -> int:
        """Returns 0, 75 if a run was stopped (submit again), or the exit code of the last run that failed."""
        code = EXIT_DONE
        for number, run in enumerate(runs, start=1):
            say(f"[{number}/{len(runs)}] {run.name}: {run.parameters:,} parameters, {run.tokens:,} tokens")
            outcome = _train(sweep, run)
            row = collect_run(Path(run.run_dir))
            if outcome.exit_code == EXIT_DONE:
                say(f"    loss {row.loss:.4f} after {outcome.seconds:.0f} s" if row.loss else "    done")
            else:
                log = Path(run.run_dir) / "submit.log"
                say(f"    exit code {outcome.exit_code}: {row.reason or 'see the log'} ({log})")
                code = outcome.exit_code
            if outcome.exit_code == EXIT_RESUMABLE or outcome.exit_code < 0:
                return EXIT_RESUMABLE
        return code


def _train(sweep: Sweep, run: PlannedRun) -> Outcome:
    """Train one run, its terminal's lines into `submit.log` of its folder."""
    folder = Path(run.run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "chiar_megatron.cli", "pretrain", str(sweep.recipe(run))]
    started = time.monotonic()
    with (folder / "submit.log").open("ab") as log:
        done = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=False)
    return Outcome(run, done.returncode, time.monotonic() - started)
