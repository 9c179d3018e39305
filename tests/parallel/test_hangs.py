"""A rank that stands still is named within the limit, with its stack, and the run ends resumable."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import pytest

from chiar_megatron.runtime.watchdog import Status, find_stuck
from tests.parallel.run_server import RunServer
from tests.parallel.test_survival import lines, wait_for
from tests.parallel.tiny_run import Sections, losses, recipe, write_data, write_recipe

HANG_SECONDS = 6.0  # three were too few on a very busy machine
LIMIT_SECONDS = 30.0


@pytest.mark.parametrize(
    ("victim", "number"),
    [(1, signal.SIGSTOP), (0, signal.SIGSTOP), (1, signal.SIGUSR2)],
    ids=["stopped", "rank 0 stopped", "asleep in Python"],
)
def test_a_rank_that_stands_still_is_named(
    server: RunServer, tmp_path: Path, victim: int, number: signal.Signals
) -> None:
    options: Sections = {
        "training": {"steps": 5000, "global_batch_size": 4},
        "parallel": {"tensor_model_parallel_size": 2},
        "runtime": {"hang_seconds": HANG_SECONDS},
        "checkpoint": {"save_interval_steps": 10},
    }
    run_dir = tmp_path / "run"
    content = recipe(write_data(tmp_path), run_dir, options)
    run = server.start(["pretrain", write_recipe(tmp_path / "r.yaml", content)], ranks=2)
    wait_for(lambda: lines(run_dir) > 12, run)
    run.signal(number, victim)
    began = time.monotonic()
    witness = 1 - victim
    wait_for(lambda: "hang:" in run.output(witness), run)
    assert time.monotonic() - began < LIMIT_SECONDS, run.output(witness)
    wait_for(lambda: (run_dir / "exit.json").exists(), run)
    if number == signal.SIGSTOP:
        run.signal(signal.SIGKILL, victim)
    codes = run.wait(30)
    assert codes[witness] == 1, run.output(witness)
    said = json.loads((run_dir / "exit.json").read_text())
    assert said["exit_code"] == 1 and said["step"] >= 13
    (folder,) = (run_dir / "hangs").iterdir()
    assert f"hang: {(folder / 'verdict.txt').read_text().strip()}" == said["reason"]
    if number == signal.SIGUSR2:
        assert codes[victim] == 1, run.output(victim)
        assert f"hang: rank {victim} on " in said["reason"] and "in stand_still" in said["reason"]
        assert "in stand_still" in (folder / f"rank_{victim}.txt").read_text()
        # The other only waited: its stack is there, it is not named.
        assert f"rank {witness} on" not in said["reason"]
        assert "distributed" in (folder / f"rank_{witness}.txt").read_text()
    elif victim == 1:
        assert "hang: rank 1 on " in said["reason"] and "does not answer" in said["reason"]
        assert "step " in said["reason"] and "rank 0 on" not in said["reason"]
    else:
        assert "hang: rank 0 at 127.0.0.1" in said["reason"] and "has not answered" in said["reason"]


def test_a_calm_run_ends_as_ever(server: RunServer, tmp_path: Path) -> None:
    """Also with a limit that its start alone takes longer than."""
    options: Sections = {
        "training": {"steps": 20, "eval_interval_steps": 5, "eval_steps": 2},
        "data": {"split": "80,10,10"},
        "parallel": {"tensor_model_parallel_size": 2},
        "runtime": {"hang_seconds": 2.0},
    }
    content = recipe(write_data(tmp_path), tmp_path / "run", options)
    run = server.start(["pretrain", write_recipe(tmp_path / "r.yaml", content)], ranks=2)
    assert run.wait() == [0, 0], run.output()
    assert len(losses(tmp_path / "run")) == 20 and not (tmp_path / "run" / "hangs").exists()


def test_who_holds_up_the_others() -> None:
    def status(rank: int, step: int = 5, waiting: bool = True, answers: bool = True) -> Status:
        return Status(rank, "h", pid=1, step=step, waiting=waiting, answers=answers)

    def ranks(*statuses: Status) -> list[int]:
        return [found.rank for found in find_stuck(statuses)]

    assert ranks(status(0), status(1, answers=False), status(2, waiting=False)) == [1]
    assert ranks(status(0), status(1), status(2, step=9, waiting=False)) == [2]
    assert ranks(status(0), status(1, step=4), status(2)) == [1]
    assert ranks(status(0), status(1)) == [0, 1]
    assert ranks(status(0, waiting=False)) == [0]
