"""`chiar status`: run folders as one table, from their files alone; `squeue` is asked where it answers."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Optional

import yaml

from chiar_megatron.checkpoint.files import write_durably
from chiar_megatron.errors import ConfigError
from chiar_megatron.metrics.goodput import measure_goodput
from chiar_megatron.metrics.jsonl import read_lines
from chiar_megatron.metrics.progress import short_number
from chiar_megatron.metrics.run_state import run_state

# One of these makes a folder a run's.
_MARKS = ("exit.json", "environment.json", "metrics.jsonl", "attempts.jsonl", "submit/recipe.yaml")
_DEPTH = 3  # of folders below one that is named
_TAIL_BYTES = 1 << 18  # of metrics.jsonl that are read
JOB_FILE = "submit/job.txt"  # of the run folder: the job that was submitted for it
PREPARATION_FILE = "submit/prepare.txt"  # and the output of the job that it waits for, if it does
PREPARED = "data is prepared"  # the last line of that output, by slurm/prepare.sbatch
_EXIT_CHARACTERS = 60  # of a reason, in the table
_COLUMNS = ("run", "state", "step", "loss", "tokens/s", "restarts", "goodput", "last exit", "job")


@dataclass(frozen=True)
class RunStatus:
    """One row; None where nothing is known."""

    run: str
    """Path of the run folder."""
    state: str
    """finished, running, stopped, failed, lost (SLURM knows no such job any more), queued, submitted, not
    submitted."""
    step: Optional[int]
    steps: Optional[int]
    """Of the whole recipe."""
    loss: Optional[float]
    """Nats a token, of the last logged step."""
    tokens_per_second: Optional[float]
    restarts: int
    goodput: Optional[float]
    last_exit: str
    """Why the last attempt that has ended did."""
    job: str

    def cells(self) -> list[str]:
        """The row in words."""
        total = "?" if self.steps is None else str(self.steps)
        figures = (
            "" if self.step is None else f"{self.step}/{total}",
            "" if self.loss is None else f"{self.loss:.4f}",
            "" if self.tokens_per_second is None else short_number(self.tokens_per_second),
            str(self.restarts),
            "" if self.goodput is None else f"{self.goodput:.0%}",
        )
        reason = self.last_exit
        if len(reason) > _EXIT_CHARACTERS:
            reason = reason[: _EXIT_CHARACTERS - 1] + "…"
        return [self.run, self.state, *figures, reason, self.job]


def note_preparation(run_dir: Path, folder: Path, job: Optional[str]) -> None:
    """Keep which job prepares a run's data, its output in `folder`; None if none does. Raises OSError."""
    note = run_dir / PREPARATION_FILE
    if job is None:
        note.unlink(missing_ok=True)
    else:
        write_durably(note, f"{(folder / f'prepare-{job}.out').absolute()}\n")


def find_runs(folders: Sequence[Path]) -> list[Path]:
    """The run folders among and below these, in the order of their names. Raises ConfigError if there are
    none."""
    found: list[Path] = []
    for folder in folders:
        found += [path for path in sorted(_below(folder, _DEPTH)) if path not in found]
    if not found:
        listed = ", ".join(map(str, folders))
        raise ConfigError(
            f"no run folder in {listed}; give folders of runs (run_dir of a recipe), or of sweeps"
        )
    return found


def status_of(folder: Path, jobs: Optional[Mapping[str, str]]) -> RunStatus:
    """A run folder's row, whatever is torn or missing. jobs: `jobs_in_queue()`."""
    attempts = [record for record, _ in read_lines(folder / "attempts.jsonl") if record]
    begins = [record for record in attempts if record.get("event") == "begin"]
    ends = [record for record in attempts if record.get("event") == "end"]
    job = str((begins[-1].get("job") if begins else None) or _text(folder / JOB_FILE))
    state, reason = _state(folder, attempts, _in_queue(folder, job, jobs))
    events = [record for record, _ in read_lines(folder / "events.jsonl") if record]
    starts = sum(event.get("event") in ("start", "resume") for event in events)
    last = _last_record(folder / "metrics.jsonl")
    try:
        goodput = measure_goodput(folder).share
    except (KeyError, TypeError, ValueError):  # lines of another format
        goodput = None
    if not reason and ends:
        reason = str(ends[-1].get("reason", ""))
    return RunStatus(
        run=str(folder),
        state=state,
        step=_number(last, "step", int),
        steps=_steps(folder),
        loss=_number(last, "loss", float),
        tokens_per_second=_number(last, "tokens_per_second", float),
        restarts=max(len(begins), starts, 1) - 1,
        goodput=goodput,
        last_exit=reason,
        job=job,
    )


def jobs_in_queue() -> Optional[dict[str, str]]:
    """State of this user's jobs by id, also as `array_task`; None where `squeue` does not answer."""
    command = ["squeue", "-h", "-r", "--me", "-o", "%A|%i|%T"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    rows = [line.strip().split("|") for line in found.stdout.splitlines() if line.count("|") == 2]
    found_states = {array: state for _, array, state in rows}
    # A job array's tasks that have never run share its number.
    alone = [row for row in rows if row[2] != "PENDING" or not row[1].startswith(f"{row[0]}_")]
    return found_states | {job: state for job, _, state in alone}


def table(rows: Sequence[RunStatus]) -> list[str]:
    """Aligned lines, a heading first; paths relative to what they share."""
    shared = os.path.commonpath([row.run for row in rows]) if len(rows) > 1 else ""
    cells = [list(_COLUMNS), *(row.cells() for row in rows)]
    for line in cells[1:]:
        line[0] = os.path.relpath(line[0], shared) if shared else line[0]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)) for line in cells]
    return [line.rstrip() for line in lines]


def as_json(rows: Sequence[RunStatus]) -> str:
    """One JSON list."""
    return json.dumps([asdict(row) for row in rows], indent=1)


def _in_queue(folder: Path, job: str, jobs: Optional[Mapping[str, str]]) -> Optional[str]:
    """The state of a run's job in the queue; empty if it is not there, None if that is not known."""
    if jobs is None or not job:
        return None
    return jobs.get(job) or jobs.get(_text(folder / JOB_FILE), "")


def _state(folder: Path, attempts: Sequence[Mapping[str, Any]], in_queue: Optional[str]) -> tuple[str, str]:
    """What the queue says of a live job counts before the files; the files before a job that is gone."""
    state, reason = run_state(folder)
    if in_queue in ("PENDING", "REQUEUED", "REQUEUE_HOLD", "SUSPENDED"):
        return "queued", "" if state == "missing" else reason
    if in_queue:
        return "running", ""
    begun = bool(attempts) and attempts[-1].get("event") == "begin"
    if state == "missing" and not attempts:
        return _never_begun(folder, in_queue)
    if state == "missing":
        return ("lost" if begun and in_queue == "" else "submitted"), "no step yet"
    if in_queue == "" and (begun or state == "running"):
        return "lost", "its job is gone without a word: its node failed, or it was killed"
    return state, "" if state == "running" else reason


def _never_begun(folder: Path, in_queue: Optional[str]) -> tuple[str, str]:
    """Of a run whose job has left no trace; its job is not in the queue, or that is not known."""
    if not _text(folder / JOB_FILE):
        return "not submitted", "sbatch has taken no job for it"
    if in_queue is None:
        return "submitted", "no step yet"
    output = Path(_text(folder / PREPARATION_FILE))
    if output.name and not _text(output).endswith(PREPARED):
        return "failed", f"preparation job {output.stem.removeprefix('prepare-')} ({output.name})"
    return "lost", "its job is gone and never began: cancelled, or see slurm-*.out"


def _below(folder: Path, depth: int) -> Iterator[Path]:
    if any((folder / mark).exists() for mark in _MARKS):
        yield folder
    elif depth > 0 and folder.is_dir():
        for child in folder.iterdir():
            if child.is_dir() and not child.name.startswith("."):
                yield from _below(child, depth - 1)


def _last_record(path: Path) -> dict[str, Any]:
    """The last whole line of a file of JSON lines, without reading all of a long one."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
            lines = file.read().splitlines(keepends=True)
    except OSError:
        return {}
    for line in reversed(lines):
        try:
            record = json.loads(line) if line.endswith(b"\n") else None
        except ValueError:
            continue
        if isinstance(record, dict):
            return record
    return {}


def _steps(folder: Path) -> Optional[int]:
    for name in ("config.yaml", "submit/recipe.yaml"):
        try:
            return int(yaml.safe_load((folder / name).read_text(encoding="utf-8"))["training"]["steps"])
        except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
            continue
    return None


def _number(record: Mapping[str, Any], key: str, kind: type) -> Any:
    value = record.get(key)
    return kind(value) if isinstance(value, (int, float)) else None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return ""
