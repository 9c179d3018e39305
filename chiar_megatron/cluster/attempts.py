"""The attempts of a run under SLURM: how each ended, and what comes after it.

`RUN/attempts.jsonl` has a line when an attempt begins and one when it ends, each with the attempt's number
(see `checkpoint/claim.py`), job and restart. One that began and never ended was lost with its node. Only the
newest attempt can write there: what becomes of an older copy, cut off by a partition, counts no more.
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

from chiar_megatron.checkpoint.claim import Claim, claim_run
from chiar_megatron.errors import EXIT_BAD_INPUT, EXIT_DONE, ChiarError, FencedError
from chiar_megatron.metrics.goodput import GOODPUT_FILE, measure_goodput
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


def begin_attempt(run_dir: Path, max_tries: int, environ: Mapping[str, str] = os.environ) -> int:
    """Claim the run folder, and note that an attempt begins; one before it that never ended is noted as lost.

    Returns its number, for `pretrain` and `end_attempt`. Raises ChiarError if the run failed too often in one
    place, or its folder cannot be written.
    """
    claim = claim_run(run_dir)
    earlier = _read(run_dir)
    if earlier and earlier[-1]["event"] == "begin":
        begun = {key: earlier[-1].get(key) for key in ("attempt", "job", "restart")}
        lost = {"event": "end", **begun, "reason": LOST, "step": last_step(run_dir), "exit_code": None}
        _append(claim, lost)
    problem = _fails_in_place(run_dir, max_tries)
    if problem is not None:
        raise ChiarError(problem)
    job, restart = _job(environ)
    _append(claim, {"event": "begin", "attempt": claim.number, "job": job, "restart": restart})
    return claim.number


@dataclass(frozen=True)
class Ending:
    """What the batch script knows when its step has ended."""

    exit_code: int
    """Of the job step."""

    signal_name: str = ""
    """That the batch script got; empty for none."""

    job_facts: str = ""
    """The line of `scontrol show job -o`; empty if it did not answer."""

    node_states: str = ""
    """Of the job's nodes, by `sinfo -o %T`; empty if it did not answer."""

    signal_seconds: int = 120
    """Before the time limit, when the run is told to save."""


def end_attempt(
    run_dir: Path, number: int, ending: Ending, max_tries: int, environ: Mapping[str, str] = os.environ
) -> Verdict:
    """Note how an attempt ended, and say what comes next.

    number: of the attempt. max_tries: failures without a new step before the run stops.
    """
    told = _exit_record(run_dir, number)
    facts = _parse(ending.job_facts)
    job, restart = _job(environ)
    queued_again = int(facts.get("Restarts", "0")) > restart  # by SLURM itself
    reason = _reason(ending, told, facts, queued_again)
    record = {"event": "end", "attempt": number, "job": job, "restart": restart, "reason": reason}
    step = told.get("step", last_step(run_dir))
    record |= {"detail": told.get("reason"), "step": step, "exit_code": ending.exit_code}
    claim = Claim(run_dir, number)
    try:
        _append(claim, record)
        claim.write(run_dir / GOODPUT_FILE, json.dumps(measure_goodput(run_dir).record(), indent=1))
    except FencedError as error:
        return _superseded(run_dir, job, restart, str(error))
    again: Action = "requeue" if facts.get("Requeue", "1") == "1" else "resubmit"
    if reason in ("done", "scancel", "stop file", "bad input", "not finite", "exit_after_steps"):
        return Verdict("stop", reason)
    problem = _fails_in_place(run_dir, min(max_tries, HANG_TRIES) if reason == HANG else max_tries)
    if problem is not None:
        return Verdict("stop", problem)
    return Verdict("wait" if queued_again else again, reason)


def _superseded(run_dir: Path, job: Optional[str], restart: int, why: str) -> Verdict:
    """A copy that gave way is at its end, unless the other is an older start of this very job: that one was
    cut off from SLURM, and will be ended by it."""
    begins = [record for record in _read(run_dir) if record["event"] == "begin"]
    if begins and job is not None and begins[-1]["job"] == job and begins[-1]["restart"] < restart:
        return Verdict("requeue", why)
    return Verdict("stop", why)


def _fails_in_place(run_dir: Path, max_tries: int) -> Optional[str]:
    """Why the run should not be tried again: its last `max_tries` attempts failed, and none got further."""
    ends = [record for record in _read(run_dir) if record["event"] == "end"][-max_tries:]
    steps = [record["step"] for record in ends]
    if len(ends) < max_tries or max(steps) > steps[0] or any(r["reason"] not in FAILURES for r in ends):
        return None
    return (
        f"{run_dir}: {max_tries} attempts in a row failed after step {steps[0]} or before; see its output, "
        f"mend the cause, and remove {FILE} (or raise max_tries in cluster.yaml) to try again"
    )


def last_step(run_dir: Path) -> int:
    """The last step that was logged; 0 before the first."""
    steps = [r["step"] for r, _ in read_lines(run_dir / "metrics.jsonl") if r and "step" in r]
    return steps[-1] if steps else 0


def _reason(ending: Ending, told: Mapping[str, Any], facts: Mapping[str, str], queued_again: bool) -> str:
    said = str(told.get("reason", ""))
    if ending.exit_code == EXIT_DONE or said == "done":
        return "done"
    if said in ("stop file", "exit_after_steps"):
        return said
    if said == "exit_after_minutes":
        return "time limit"
    if queued_again:
        if any(state.startswith(("down", "fail")) for state in ending.node_states.split(",")):
            return "node failure"
        return "preemption" if _is_preempted(facts) else "requeue"
    if ending.signal_name or said in ("SIGTERM", "SIGUSR1", "signal to another rank"):
        return _who_signalled(facts, ending.signal_seconds)
    if said.startswith("not finite"):
        return "not finite"
    if said.startswith("hang:"):
        return HANG
    return "bad input" if ending.exit_code == EXIT_BAD_INPUT else "failure"


def _who_signalled(facts: Mapping[str, str], lead: int) -> str:
    state = facts.get("JobState", "")
    if _is_preempted(facts):
        return "preemption"
    try:
        start, end = (datetime.fromisoformat(facts[name]).timestamp() for name in ("StartTime", "EndTime"))
    except (KeyError, ValueError):
        return "scancel" if state in ("CANCELLED", "COMPLETING") else "signal"
    if state in ("CANCELLED", "COMPLETING", "TIMEOUT"):  # it is ending, and EndTime is when that began
        limit = _seconds(facts.get("TimeLimit", ""))
        at_limit = state == "TIMEOUT" or (limit is not None and end - start >= limit)
        return "time limit" if at_limit and state != "CANCELLED" else "scancel"
    return "time limit" if end - time.time() <= lead + LIMIT_MARGIN_SECONDS else "signal"


def _is_preempted(facts: Mapping[str, str]) -> bool:
    return facts.get("JobState") == "PREEMPTED" or facts.get("PreemptTime", "None") not in ("None", "Unknown")


def _seconds(limit: str) -> Optional[float]:
    """Of a time limit as scontrol writes it, `1-02:03:04`; None for UNLIMITED."""
    matched = re.fullmatch(r"(?:(\d+)-)?(\d+):(\d+):(\d+)", limit)
    if matched is None:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in matched.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60.0 + seconds


def _parse(job_facts: str) -> dict[str, str]:
    return dict(re.findall(r"(?:^|\s)(\w+)=(\S*)", job_facts))


def _exit_record(run_dir: Path, number: int) -> dict[str, Any]:
    """`exit.json`, if this attempt has written it."""
    try:
        record = json.loads((run_dir / "exit.json").read_text())
        return dict(record) if record["attempt"] == number else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _read(run_dir: Path) -> list[dict[str, Any]]:
    return [r for r, _ in read_lines(run_dir / FILE) if r and r.get("event") in ("begin", "end")]


def _job(environ: Mapping[str, str]) -> tuple[Optional[str], int]:
    return environ.get("SLURM_JOB_ID"), int(environ.get("SLURM_RESTART_COUNT") or 0)


def _append(claim: Claim, record: Mapping[str, Any]) -> None:
    """Add a line. Raises FencedError if a newer attempt has begun, ChiarError."""
    path = claim.run_dir / FILE
    try:
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        claim.write(path, "".join([*lines, json.dumps({**record, "unix_seconds": time.time()}) + "\n"]))
    except OSError as error:
        raise ChiarError(f"{path} cannot be written: {error.strerror}; check the folder") from None
