"""`chiar scaling submit`: the runs of a sweep, one after another here, or by another back end."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from chiar_megatron.errors import EXIT_DONE, EXIT_RESUMABLE
from chiar_megatron.scaling.analysis import Analysis
from chiar_megatron.scaling.collect import collect_run
from chiar_megatron.scaling.manifest import PlannedRun, Sweep, planned_size
from chiar_megatron.scaling.predict import predict_run

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

    Returns the backend's exit code, 0 if there was nothing to start. Raises ConfigError if none is planned.
    """
    wanted = sweep.wanted(held_out)
    statuses = {run.name: collect_run(Path(run.run_dir)).status for run in wanted}
    left = [run for run in wanted if statuses[run.name] != "finished"]
    say(f"{len(wanted) - len(left)} of {len(wanted)} runs are finished")
    for run in (run for run in left if statuses[run.name] == "running"):
        say(f"{run.name} looks as if it were running elsewhere (it wrote in the last minutes)")
    return backend.start(sweep, left, say) if left else EXIT_DONE


class Local:
    """One run after another on this machine. A failed run does not stop the others; a stopped one does."""

    def __init__(self, analysis: Analysis | None = None) -> None:
        """analysis: a fit whose prediction of a run is printed, and kept in `predictions.jsonl`, before it
        starts."""
        self.analysis = analysis

    def start(self, sweep: Sweep, runs: Sequence[PlannedRun], say: Say) -> int:
        """Returns 0, 75 if a run was stopped (submit again), or the exit code of the last run that failed."""
        code = EXIT_DONE
        for number, run in enumerate(runs, start=1):
            say(f"[{number}/{len(runs)}] {run.name}: {run.parameters:,} parameters, {run.tokens:,} tokens")
            prediction = announce(self.analysis, sweep, run, say)
            outcome = _train(sweep, run)
            row = collect_run(Path(run.run_dir))
            if outcome.exit_code == EXIT_DONE:
                beside = f"; predicted {prediction}" if prediction else ""
                loss = "" if row.loss is None else f", loss {row.loss:.4f}"
                say(f"    done in {outcome.seconds:.0f} s{loss}{beside}")
            else:
                log = Path(run.run_dir) / "submit.log"
                say(f"    exit code {outcome.exit_code}: {row.reason or 'see the log'} ({log})")
                code = outcome.exit_code
            if outcome.exit_code == EXIT_RESUMABLE or outcome.exit_code < 0:
                return EXIT_RESUMABLE
        return code


def announce(analysis: Analysis | None, sweep: Sweep, run: PlannedRun, say: Say) -> str:
    """Say what a fit predicts of a run that has not begun, and keep it in `predictions.jsonl`; returns it in
    words, empty without a fit."""
    if analysis is None:
        return ""
    rho = 1.0 if analysis.law.gamma is None else run.attention_share
    n = planned_size(run, analysis.n_column)
    prediction = predict_run(analysis, n=n, d=run.tokens, flops=None, rho=rho)
    words = str(prediction.loss)
    if prediction.run_interval is not None:
        low, high = prediction.run_interval
        words = f"{prediction.loss.value:.4f}, {analysis.settings.level:.0%} {low:.4f} to {high:.4f}"
    say(f"    predicted before it starts: loss {words}")
    record = {
        "run": run.name,
        "unix_seconds": time.time(),
        "loss": prediction.loss.value,
        "interval": prediction.loss.interval,
        "run_interval": prediction.run_interval,
    }
    with (sweep.folder / "predictions.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
    return words


def _train(sweep: Sweep, run: PlannedRun) -> Outcome:
    """Train one run, its terminal's lines into `submit.log` of its folder."""
    folder = Path(run.run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "chiar_megatron.cli", "pretrain", str(sweep.recipe(run))]
    started = time.monotonic()
    with (folder / "submit.log").open("ab") as log:
        done = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=False)
    return Outcome(run, done.returncode, time.monotonic() - started)
