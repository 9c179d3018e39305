"""`chiar status`: one row a run folder, whatever the run has left there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from chiar_megatron.cluster.status import (
    JOB_FILE,
    PREPARED,
    find_runs,
    note_preparation,
    status_of,
    table,
)

REPOSITORY = Path(__file__).resolve().parents[2]


def write_run(folder: Path, **files: Any) -> Path:
    """A run folder; a list becomes JSON lines, a dict JSON, a text itself. `a__b` is the file a/b."""
    for name, content in {"environment_json": {}, **files}.items():
        stem, _, suffix = name.rpartition("_")
        path = folder / f"{stem.replace('__', '/')}.{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, list):
            path.write_text("".join(json.dumps(line) + "\n" for line in content))
        else:
            path.write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


METRICS = [{"step": n, "loss": 5.0 / n, "tokens_per_second": 12345.0} for n in range(1, 5)]
CONFIG = "training: {steps: 8}\n"


def age(folder: Path, seconds: float) -> None:
    """Make every file so old."""
    for path in folder.iterdir():
        os.utime(path, (time.time() - seconds,) * 2)


def test_states_follow_from_files_and_from_the_queue(tmp_path: Path) -> None:
    begun = [{"event": "begin", "job": "17", "unix_seconds": time.time()}]
    run = write_run(tmp_path / "a", metrics_jsonl=METRICS, config_yaml=CONFIG, attempts_jsonl=begun)
    row = status_of(run, None)
    assert (row.state, row.step, row.steps, row.loss, row.job) == ("running", 4, 8, 1.25, "17")
    assert status_of(run, {"17": "RUNNING"}).state == "running"
    assert status_of(run, {"17": "PENDING"}).state == "queued"
    assert status_of(run, {"18": "RUNNING"}).state == "lost"
    age(run, 3600)
    assert status_of(run, None).state == "stopped" and "silent" in status_of(run, None).last_exit
    assert status_of(run, {"17": "RUNNING"}).state == "running"  # a long step

    ended = [*begun, {"event": "end", "reason": "time limit", "exit_code": 75, "unix_seconds": time.time()}]
    (run / "exit.json").write_text(json.dumps({"reason": "SIGUSR1", "step": 4, "exit_code": 75}))
    write_run(run, attempts_jsonl=[*ended, *begun, *ended[1:]])
    row = status_of(run, {})
    assert (row.state, row.restarts, row.last_exit) == ("stopped", 1, "SIGUSR1")
    (run / "exit.json").write_text(json.dumps({"reason": "done", "step": 8, "exit_code": 0}))
    assert (status_of(run, {}).state, status_of(run, {}).last_exit) == ("finished", "time limit")


def test_a_run_that_has_not_begun(tmp_path: Path) -> None:
    waiting = write_run(tmp_path / "b", submit__recipe_yaml=CONFIG, submit__job_txt="20_3\n")
    (waiting / "environment.json").unlink()
    assert (waiting / JOB_FILE).is_file()
    assert status_of(waiting, {"20_3": "PENDING"}).state == "queued"
    assert status_of(waiting, {"20_3": "PENDING"}).last_exit == ""
    assert (status_of(waiting, None).state, status_of(waiting, None).steps) == ("submitted", 8)
    assert status_of(waiting, {}).state == "lost"
    note_preparation(waiting, tmp_path, "19")
    row = status_of(waiting, {})
    assert (row.state, row.last_exit) == ("failed", "preparation job 19 (prepare-19.out)")
    assert status_of(waiting, None).state == "submitted"
    (tmp_path / "prepare-19.out").write_text(f"index cache\n{PREPARED}\n")
    assert status_of(waiting, {}).state == "lost"
    assert f'echo "{PREPARED}"' in (REPOSITORY / "slurm" / "prepare.sbatch").read_text()
    (waiting / JOB_FILE).unlink()
    assert status_of(waiting, {}).state == "not submitted"


def test_a_long_reason_is_cut_in_the_table_alone(tmp_path: Path) -> None:
    ended = {"reason": "error: " + 30 * "all is lost ", "step": 4, "exit_code": 1}
    row = status_of(write_run(tmp_path, exit_json=ended), None)
    assert row.last_exit == ended["reason"] and max(map(len, table([row]))) < 200 + len(str(tmp_path))


def test_torn_and_missing_files_are_no_error(tmp_path: Path) -> None:
    torn = json.dumps(METRICS[0]) + "\n" + json.dumps(METRICS[1])[:-9]
    run = write_run(
        tmp_path / "a",
        metrics_jsonl=torn,
        config_yaml="training: [",
        exit_json='{"reas',
        events_jsonl='{"event": "start"}\n{"event": "times"}\nnonsense\n{"eve',
        attempts_jsonl='{"event": "begin", "jo',
    )
    row = status_of(run, None)
    assert (row.step, row.steps, row.loss, row.goodput) == (1, None, 5.0, None)
    assert (row.state, row.last_exit) == ("failed", "exit.json cannot be read")
    bare = status_of(write_run(tmp_path / "b"), None)
    assert (bare.state, bare.step, bare.restarts) == ("running", None, 0)


def test_the_command_line_finds_runs_and_prints_a_table_or_json(tmp_path: Path) -> None:
    done = {"reason": "done", "step": 4, "exit_code": 0, "unix_seconds": 0}
    for name in ("sweep/0000", "sweep/0001"):
        write_run(tmp_path / "runs" / name, metrics_jsonl=METRICS, config_yaml=CONFIG, exit_json=done)
    (tmp_path / "runs" / "notes").mkdir()
    assert [path.name for path in find_runs([tmp_path])] == ["0000", "0001"]

    def chiar(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "chiar_megatron.cli", "status", *arguments]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)

    shown = chiar()
    assert shown.returncode == 0, shown.stderr
    heading, first, second = shown.stdout.splitlines()
    assert heading.split()[:3] == ["run", "state", "step"]
    assert first.split() == ["0000", "finished", "4/8", "1.2500", "12.3k", "0"] and second.startswith("0001")
    assert [row["step"] for row in json.loads(chiar("--json", "runs/sweep/0000").stdout)] == [4]
    nothing = chiar("runs/notes")
    assert nothing.returncode == 2 and "no run folder in runs/notes" in nothing.stderr
    assert table([status_of(tmp_path / "runs/sweep/0000", None)])[1].startswith(str(tmp_path))
