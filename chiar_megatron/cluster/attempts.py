"""The attempts of a run under SLURM: how each ended, and what comes after it.

`RUN/attempts.jsonl` has a line when an attempt begins and one when it ends. One that began and never ended
was lost with its node.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, Optional

from chiar_megatron.checkpoint.files import write_durably
from chiar_megatron.errors import EXIT_BAD_INPUT, EXIT_DONE, ChiarError
from chiar_megatron.metrics.goodput import measure_goodput
from chiar_megatron.metrics.jsonl import read_lines

FILE = "attempts.jsonl"
LOST = "lost with its node"
HANG = "hang"
FAILURES = ("failure", HANG, LOST)
HANG_TRIES = 2  # a hang at the same step is tried again once
LIMIT_MARGIN_SECONDS = 90.0  # SLURM sends the signal up to a minute early, and the save took its time

Action = Literal["stop", "requeue", "resubmit", "wait"]


@dataclass(frozen=True)
class Verdict:
    """What comes after an attempt; wait: SLURM itself requeues it."""

    action: Action
    reason: str

    def __str__(self) -> str:
        return f"{self.action}: {self.reason}"


def begin_attempt(run_dir: Path, max_tries: int, environ: Mapping[str, str] = os.environ) -> None:
    """Note that an attempt begins; one before it that never ended is noted as lost.

    Raises ChiarError if the run failed too often in one place, or its folder cannot be written.
    """
    earlier = _read(run_dir)
    if earlier and earlier[-1]["event"] == "begin":
        lost = {"event": "end", "reason": LOST, "step": last_step(run_dir), "exit_code": None}
        _append(run_dir, {**lost, "unix_seconds": time.time()})
    problem = _fails_in_place(run_dir, max_tries)
    if problem is not None:
        raise ChiarError(problem)
    job, restart = environ.get("SLURM_JOB_ID"), int(environ.get("SLURM_RESTART_COUNT") or 0)
    _append(run_dir, {"event": "begin", "job": job, "restart": restart, "unix_seconds": time.time()})


def end_attempt(
    run_dir: Path, exit_code: int, signal_name: str, job_facts: str, signal_seconds: int, max_tries: int
) -> Verdict:
    """Note how an attempt ended, and say what comes next.

    Args:
        run_dir: the run folder.
        exit_code: of the job step.
        signal_name: that the batch script got; empty for none.
        job_facts: the line of `scontrol show job -o`; empty if it did not answer.
        signal_seconds: before the time limit, when the run is told to save.
        max_tries: failures without a new step before the run stops.
    """
    records = _read(run_dir)
    began = records[-1]["unix_seconds"] if records and records[-1]["event"] == "begin" else 0.0
    ending = _ending(run_dir, began)
    facts = _parse(job_facts)
    reason = _reason(exit_code, signal_name, ending, facts, signal_seconds)
    step = ending.get("step", last_step(run_dir))
    detail = ending.get("reason")
    record = {"event": "end", "reason": reason, "detail": detail, "step": step, "exit_code": exit_code}
    _append(run_dir, {**record, "unix_seconds": time.time()})
    write_durably(run_dir / "goodput.json", json.dumps(measure_goodput(run_dir).record(), indent=1))
    again: Action = "requeue" if facts.get("Requeue", "1") == "1" else "resubmit"
    if reason in ("done", "scancel", "stop file", "bad input", "not finite", "exit_after_steps"):
        return Verdict("stop", reason)
    problem = _fails_in_place(run_dir, min(max_tries, HANG_TRIES) if reason == HANG else max_tries)
    if problem is not None:
        return Verdict("stop", problem)
    return Verdict("wait" if reason in ("preemption", "node failure or requeue") else again, reason)


def _fails_in_place(run_dir: Path, max_tries: int) -> Optional[str]:
    """Why the run should not be tried again: its last `max_tries` attempts failed without a new step."""
    ends = [record for record in _read(run_dir) if record["event"] == "end"][-max_tries:]
    steps = {record["step"] for record in ends}
    if len(ends) < max_tries or len(steps) > 1 or any(r["reason"] not in FAILURES for r in ends):
        return None
    return (
        f"{run_dir}: {max_tries} attempts in a row failed after step {steps.pop()}; see its output, mend "
        f"the cause, and remove {FILE} (or raise max_tries in cluster.yaml) to try again"
    )


def last_step(run_dir: Path) -> int:
    """The last step that was logged; 0 before the first."""
    steps = [r["step"] for r, _ in read_lines(run_dir / "metrics.jsonl") if r and "step" in r]
    return steps[-1] if steps else 0


def _reason(
    exit_code: int, signal_name: str, ending: Mapping[str, Any], facts: Mapping[str, str], lead: int
) -> str:
    said = str(ending.get("reason", ""))
    if exit_code == EXIT_DONE or said == "done":
        return "done"
    if said in ("stop file", "exit_after_steps"):
        return said
    if said == "exit_after_minutes":
        return "time limit"
    if signal_name or said in ("SIGTERM", "SIGUSR1", "signal to another rank"):
        return _who_signalled(facts, lead)
    if said.startswith("not finite"):
        return "not finite"
    if said.startswith("hang:"):
        return HANG
    return "bad input" if exit_code == EXIT_BAD_INPUT else "failure"


def _who_signalled(facts: Mapping[str, str], lead: int) -> str:
    state = facts.get("JobState", "")
    if state == "PREEMPTED" or facts.get("PreemptTime", "None") not in ("None", "Unknown"):
        return "preemption"
    if state in ("NODE_FAIL", "PENDING"):  # SLURM has queued it again: a node went, or `scontrol requeue`
        return "node failure or requeue"
    try:
        start, end = (datetime.fromisoformat(facts[name]).timestamp() for name in ("StartTime", "EndTime"))
    except (KeyError, ValueError):
        return "scancel" if state in ("CANCELLED", "COMPLETING") else "signal"
    if state in ("CANCELLED", "COMPLETING", "TIMEOUT"):  # it is ending, and EndTime is when that began
        limit = _seconds(facts.get("TimeLimit", ""))
        at_limit = state == "TIMEOUT" or (limit is not None and end - start >= limit)
        return "time limit" if at_limit and state != "CANCELLED" else "scancel"
    return "time limit" if end - time.time() <= lead + LIMIT_MARGIN_SECONDS else "signal"


def _seconds(limit: str) -> Optional[float]:
    """Of a time limit as scontrol writes it, `1-02:03:04`; None for UNLIMITED."""
    matched = re.fullmatch(r"(?:(\d+)-)?(\d+):(\d+):(\d+)", limit)
    if matched is None:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in matched.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60.0 + seconds


def _parse(job_facts: str) -> dict[str, str]:
    return dict(re.findall(r"(?:^|\s)(\w+)=(\S*)", job_facts))


def _ending(run_dir: Path, began: float) -> dict[str, Any]:
    """`exit.json`, if this attempt has written it."""
    try:
        record = json.loads((run_dir / "exit.json").read_text())
        return dict(record) if record["unix_seconds"] >= began else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _read(run_dir: Path) -> list[dict[str, Any]]:
    return [r for r, _ in read_lines(run_dir / FILE) if r and r.get("event") in ("begin", "end")]


def _append(run_dir: Path, record: Mapping[str, Any]) -> None:
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        with (run_dir / FILE).open("a") as file:
            file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise ChiarError(f"{run_dir / FILE} cannot be written: {error.strerror}; check the folder") from None
