"""Attempts on one run folder: the newest alone changes it, wherever an older one was paused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from chiar_megatron.checkpoint.claim import Claim, claim_run, join_claim
from chiar_megatron.errors import ChiarError, FencedError
from chiar_megatron.metrics.jsonl import JsonlWriter

REPOSITORY = Path(__file__).resolve().parents[2]


def test_a_save_paused_at_any_point_changes_nothing_after_a_newer_attempt(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.unit.pause_points", str(tmp_path)]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, result.stdout + result.stderr
    points = [line for line in result.stdout.splitlines() if line.startswith("point ")]
    assert len(points) > 30 and all(line.endswith("same") for line in points), result.stdout
    # Only where all that was left to do was to clean up did the older attempt end without an error.
    assert sum("code 7" in line for line in points) > 25
    told = [line for line in result.stdout.splitlines() if not line.startswith("point ")]
    assert set(told) == {
        f"{tmp_path / str(n)}: attempt 1 gives way to attempt 2, which has taken the run over and goes on "
        "with it; nothing needs to be done"
        for n, line in enumerate(points, 1)
        if "code 7" in line
    }


def test_numbers_grow_and_a_claim_is_lost_to_the_next(tmp_path: Path) -> None:
    first = claim_run(tmp_path)
    assert not first.is_lost() and join_claim(tmp_path, first.number) == first
    second = claim_run(tmp_path)
    assert (first.number, second.number) == (1, 2)
    assert first.is_lost() and not second.is_lost()
    with pytest.raises(FencedError, match="attempt 1 gives way to attempt 2"):
        join_claim(tmp_path, 1)
    assert sorted(path.name for path in (tmp_path / "attempts").iterdir()) == ["000002"]


def test_an_attempt_of_another_folder_is_one_line(tmp_path: Path) -> None:
    claim_run(tmp_path / "ran")
    for other in (tmp_path / "no run", tmp_path / "older"):
        with pytest.raises(ChiarError, match=f"attempt 2: begun in another folder than run_dir {other}; set"):
            join_claim(other, 2)
        claim_run(tmp_path / "older")


def test_whoever_claimed_last_has_the_run(tmp_path: Path) -> None:
    code = "import sys; from pathlib import Path; from chiar_megatron.checkpoint.claim import claim_run\n"
    code += "print(*(claim_run(Path(sys.argv[1])).number for _ in range(100)))"
    command = [sys.executable, "-c", code, str(tmp_path)]
    racing = [subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    numbers = [int(word) for process in racing for word in process.communicate(timeout=100)[0].split()]
    assert [process.returncode for process in racing] == [0, 0, 0]
    assert len(set(numbers)) == 300  # no number is given twice
    assert [path.name for path in (tmp_path / "attempts").iterdir()] == [f"{max(numbers):06d}"]


def fenced(tmp_path: Path) -> Claim:
    """A claim whose file lies ready to be published, but a newer attempt has begun."""
    claim = claim_run(tmp_path)
    (claim.folder / "exit.json").write_text("old")
    claim_run(tmp_path).write(tmp_path / "exit.json", "new")
    return claim


def test_an_older_attempt_can_do_none_of_it(tmp_path: Path) -> None:
    old, shared = fenced(tmp_path), tmp_path / "exit.json"
    for change in (
        lambda: old.publish("exit.json", shared),
        lambda: old.write(shared, "old"),
        lambda: old.discard(shared),
        lambda: old.take(shared, "taken"),
        lambda: old.take_over(shared, 3),
    ):
        with pytest.raises(FencedError):
            change()
        assert shared.read_text() == "new"


def test_what_an_older_copy_appends_is_lost(tmp_path: Path) -> None:
    old = JsonlWriter(claim_run(tmp_path), 0)
    for step in (1, 2, 3):
        old.log(step, {"loss": 1.0})
    new = JsonlWriter(claim_run(tmp_path), 2)
    old.log(4, {"loss": 1.0})
    new.log(3, {"loss": 2.0})
    old.log(5, {"loss": 1.0})
    new.log(4, {"loss": 2.0})
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(record["step"], record["loss"]) for record in records] == [(1, 1), (2, 1), (3, 2), (4, 2)]


def test_a_checkpoint_on_its_way_aside_is_kept(tmp_path: Path) -> None:
    step = tmp_path / "checkpoints" / "step_00000001"
    step.mkdir(parents=True)
    claim_run(tmp_path).take(step, "damaged_step_00000001_7")  # and there the attempt was killed
    claim_run(tmp_path)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["damaged_step_00000001_7"]


def test_files_that_nfs_keeps_open_hold_nobody_up(tmp_path: Path) -> None:
    claim = claim_run(tmp_path)
    kept = claim.folder / "step_00000001"
    kept.mkdir()
    (kept / ".nfs0001").touch()

    def keep(event: str, arguments: tuple[object, ...]) -> None:
        if keeping and event == "os.remove" and str(arguments[0]).startswith(".nfs"):
            raise PermissionError

    keeping = True
    sys.addaudithook(keep)
    started = time.monotonic()
    assert claim_run(tmp_path).number == 2 and claim.is_lost()
    assert time.monotonic() - started < 5
    keeping = False
    claim_run(tmp_path)
    assert [path.name for path in (tmp_path / "attempts").iterdir()] == ["000003"]


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ChiarError, match="run_dir .*file/run cannot be written: .*; choose another"):
        claim_run(tmp_path / "file" / "run")
    assert os.listdir(tmp_path) == ["file"]
