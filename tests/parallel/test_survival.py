"""Runs that are killed, signalled, or run out of disk: nothing committed is lost, and the end is the same."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Optional

import psutil
import pytest

from tests.parallel.run_server import REPOSITORY, TIME_LIMIT_SECONDS, Run, RunServer
from tests.parallel.tiny_run import (
    Sections,
    losses,
    recipe,
    records,
    saved_state,
    step_folder,
    write_data,
    write_recipe,
)

SEED = 20261123
KILLS, KILLS_IN_A_SAVE = 10, 4
STEPS, SAVE_EVERY = 100, 3


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_data(tmp_path_factory.mktemp("data"))


def wait_for(condition: Callable[[], bool], run: Run | None = None) -> None:
    """Look often; fail when the time is up."""
    deadline = time.monotonic() + TIME_LIMIT_SECONDS
    while not condition():
        assert time.monotonic() < deadline, run.output() if run else "time is up"
        time.sleep(0.002)


def lines(run_dir: Path, name: str = "metrics") -> int:
    """Finished lines of a record so far."""
    path = run_dir / f"{name}.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def events(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    """Events of one kind."""
    return [record for record in records(run_dir, "events") if record["event"] == kind]


def half_written(run_dir: Path) -> list[str]:
    """Folders of saves under way, or of killed ones."""
    return [path.name for path in (run_dir / "attempts").glob("*/step_*")]


def alive_in_sessions(pids: list[int]) -> list[int]:
    """Processes that the ranks have left behind."""
    found = []
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) in pids and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
        except (ProcessLookupError, psutil.NoSuchProcess):
            pass
    return found


def kill_at(run: Run, run_dir: Path, in_a_save: bool, dice: random.Random, rank: Optional[int]) -> str:
    """Kill -9 a rank (None: all) some steps from now, inside a save or anywhere; returns the phase it hit."""
    begun = lines(run_dir, "events")
    wait_for(lambda: lines(run_dir, "events") > begun, run)  # this attempt has started or resumed
    steps = lines(run_dir) + dice.randrange(2, 10)
    wait_for(lambda: lines(run_dir) >= steps, run)
    if in_a_save:
        wait_for(lambda: bool(half_written(run_dir)), run)
    time.sleep(dice.uniform(0.0, 0.012 if in_a_save else 0.06))
    # Nothing is written by a child, whose death could go unnoticed.
    assert psutil.Process(run.pids[rank or 0]).children() == []
    run.signal(signal.SIGKILL, rank)
    if rank is not None:
        time.sleep(0.05)
        run.signal(signal.SIGKILL)  # its launcher would
    run.wait()
    return "in a save" if half_written(run_dir) else "between saves"


def test_ten_kills_leave_no_trace(server: RunServer, data: str, tmp_path: Path) -> None:
    dice = random.Random(SEED)
    options: Sections = {
        "training": {"steps": STEPS},
        "checkpoint": {"save_interval_steps": SAVE_EVERY, "keep_last": 2},
    }
    calm = write_recipe(tmp_path / "calm.yaml", recipe(data, tmp_path / "calm", options))
    rough = write_recipe(tmp_path / "rough.yaml", recipe(data, tmp_path / "rough", options))
    run_dir = tmp_path / "rough"
    plan = [kill < KILLS_IN_A_SAVE for kill in range(KILLS)]
    dice.shuffle(plan)
    phases: list[str] = []
    for kill, in_a_save in enumerate(plan):
        in_background = kill % 2 == 1
        run = server.start(["pretrain", rough, f"checkpoint.async_save={str(in_background).lower()}"])
        phases.append(kill_at(run, run_dir, in_a_save, dice, rank=None))
        committed = (
            events(run_dir, "save")[-1]["step"] if (run_dir / "checkpoints" / "latest").exists() else 0
        )
        print(f"seed {SEED} kill {kill + 1}: {phases[-1]}, async {in_background}, committed {committed}")
        assert alive_in_sessions(run.pids) == []
        assert not (run_dir / "exit.json").exists()
    assert phases.count("in a save") >= 3, phases

    last = server.start(["pretrain", rough])
    assert last.wait() == [0], last.output()
    undisturbed = server.start(["pretrain", calm])
    assert undisturbed.wait() == [0], undisturbed.output()
    assert losses(run_dir).keys() == set(range(1, STEPS + 1))
    assert losses(run_dir) == losses(tmp_path / "calm")
    assert saved_state(run_dir, STEPS) == saved_state(tmp_path / "calm", STEPS)
    assert half_written(run_dir) == []
    starts = [r for r in records(run_dir, "events") if r["event"] in ("start", "resume")]
    assert len(starts) == KILLS + 1
    saved = 0
    for record in records(run_dir, "events"):
        if record["event"] == "save":
            saved = record["step"]
        elif record["event"] in ("start", "resume"):
            # A kill between the commit and its event may leave one more than was told.
            assert record["step"] >= saved


def test_killed_ranks_of_two(server: RunServer, data: str, tmp_path: Path) -> None:
    dice = random.Random(SEED)
    options: Sections = {
        "training": {"steps": 40},
        "checkpoint": {"save_interval_steps": 2},
        "parallel": {"tensor_model_parallel_size": 2},
    }
    calm = write_recipe(tmp_path / "calm.yaml", recipe(data, tmp_path / "calm", options))
    rough = write_recipe(tmp_path / "rough.yaml", recipe(data, tmp_path / "rough", options))
    for rank, in_a_save in ((0, True), (1, True), (1, False)):
        run = server.start(["pretrain", rough], ranks=2)
        print(f"rank {rank}:", kill_at(run, tmp_path / "rough", in_a_save, dice, rank))
    for path in (rough, calm):
        run = server.start(["pretrain", path], ranks=2)
        assert run.wait() == [0, 0], run.output()
    assert losses(tmp_path / "rough") == losses(tmp_path / "calm")
    assert saved_state(tmp_path / "rough", 40) == saved_state(tmp_path / "calm", 40)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_one_rank_saves_on_all(
    server: RunServer, data: str, tmp_path: Path, number: signal.Signals, rank: int
) -> None:
    content = recipe(data, tmp_path / "run", {"training": {"steps": 5000}})
    run = server.start(["pretrain", write_recipe(tmp_path / "r.yaml", content)], ranks=2)
    wait_for(lambda: lines(tmp_path / "run") >= 2, run)
    run.signal(number, rank)
    assert run.wait() == [75, 75], run.output()
    ending = json.loads((tmp_path / "run" / "exit.json").read_text())
    assert ending["exit_code"] == 75
    assert ending["reason"] == (number.name if rank == 0 else "signal to another rank")
    assert step_folder(tmp_path / "run", ending["step"]).is_dir()
    assert losses(tmp_path / "run").keys() == set(range(1, ending["step"] + 1))


def test_a_signal_to_the_command_saves(data: str, tmp_path: Path) -> None:
    options: Sections = {
        "training": {"steps": 5000},
        "parallel": {"tensor_model_parallel_size": 2},
    }
    path = write_recipe(tmp_path / "r.yaml", recipe(data, tmp_path / "run", options))
    command = [sys.executable, "-m", "chiar_megatron.cli", "pretrain", str(path)]
    process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.DEVNULL)
    try:
        wait_for(lambda: lines(tmp_path / "run") >= 2 or process.poll() is not None)
        process.send_signal(signal.SIGUSR1)
        assert process.wait(timeout=60) == 75
    finally:
        process.kill()
        process.wait()
    ending = json.loads((tmp_path / "run" / "exit.json").read_text())
    assert (ending["reason"], ending["exit_code"]) == ("SIGUSR1", 75)
    assert step_folder(tmp_path / "run", ending["step"]).is_dir()


def test_a_killed_rank_is_no_exit_code_of_its_own(data: str, tmp_path: Path) -> None:
    tensor: Sections = {"parallel": {"tensor_model_parallel_size": 2}, "training": {"steps": 5000}}
    path = write_recipe(tmp_path / "r.yaml", recipe(data, tmp_path / "run", tensor))
    command = [sys.executable, "-m", "chiar_megatron.cli", "pretrain", str(path)]
    core = {min(os.sched_getaffinity(0))}
    process = subprocess.Popen(
        command,
        cwd=REPOSITORY,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: os.sched_setaffinity(0, core),
    )
    try:
        launcher = psutil.Process(process.pid)
        wait_for(lambda: len(launcher.children()) == 2 or process.poll() is not None)
        launcher.children()[-1].kill()
        told = process.communicate(timeout=60)[1]
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 1 and " was ended by SIGKILL" in told, told
    assert "2 processes (the recipe's layout) share 1 core(s) of this host" in told


@pytest.mark.parametrize("in_background", ["false", "true"])
def test_one_rank_that_cannot_write_stops_neither_training_nor_ranks(
    server: RunServer, data: str, tmp_path: Path, in_background: str
) -> None:
    options: Sections = {
        "training": {"steps": 8},
        "checkpoint": {"save_interval_steps": 2},
        "parallel": {"tensor_model_parallel_size": 2},
    }
    run_dir = tmp_path / "run"
    path = write_recipe(tmp_path / "r.yaml", recipe(data, run_dir, options))
    first = server.start(["pretrain", path, "training.exit_after_steps=2"], ranks=2)
    assert first.wait() == [75, 75], first.output()
    before = saved_state(run_dir, 2)
    arguments = ["pretrain", path, f"checkpoint.async_save={in_background}"]
    run = server.start(arguments, ranks=2, file_bytes=20_000)
    assert run.wait() == [2, 2], run.output() + run.output(1)
    assert losses(run_dir).keys() == set(range(1, 9))
    failed = events(run_dir, "save_failed")
    assert [record["step"] for record in failed][-1] == 8 and len(failed) >= 3
    assert "rank 1: [Errno 27] File too large" in run.output()
    assert "earlier ones are untouched" in run.output()
    assert "Traceback" not in run.output() + run.output(1)
    assert json.loads((run_dir / "exit.json").read_text())["exit_code"] == 2
    assert half_written(run_dir) == []
    assert sorted(p.name for p in (run_dir / "checkpoints").iterdir()) == ["latest", "step_00000002"]
    assert saved_state(run_dir, 2) == before


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 3 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(folder)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no right to mount a small file system: {error}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_costs_saves_until_there_is_room(
    server: RunServer, data: str, tmp_path: Path, small_disk: Path
) -> None:
    options: Sections = {
        "training": {"steps": 5000},
        "checkpoint": {"save_interval_steps": 5, "keep_last": 1},
        "data": {"cache_dir": str(tmp_path / "cache")},
    }
    run_dir = small_disk / "run"
    path = write_recipe(tmp_path / "r.yaml", recipe(data, run_dir, options))
    run = server.start(["pretrain", path])
    wait_for(lambda: lines(run_dir) >= 5 and bool(events(run_dir, "save")), run)
    filler = small_disk / "filler"
    usage = os.statvfs(small_disk)
    filler.write_bytes(bytes(max(0, usage.f_bavail * usage.f_frsize - 60_000)))
    wait_for(lambda: bool(events(run_dir, "save_failed")), run)
    committed = events(run_dir, "save")[-1]["step"]
    assert step_folder(run_dir, committed).is_dir()
    filler.unlink()
    wait_for(lambda: events(run_dir, "save")[-1]["step"] > committed, run)
    run.signal(signal.SIGTERM)
    assert run.wait() == [75], run.output()
    error = events(run_dir, "save_failed")[0]["error"]
    assert "No space left on device" in error and "free space, or lower checkpoint.keep_last" in error
    assert error.split(";")[0] in run.output()
