"""Where the time of a run went, after it was killed and went on: the parts are the whole."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import pytest

from chiar_megatron.metrics.goodput import CAUSES, measure_goodput
from tests.parallel.run_server import RunServer
from tests.parallel.test_survival import lines, wait_for
from tests.parallel.tiny_run import Sections, recipe, write_data, write_recipe

SAVED, LAST = 20, 30


def test_a_killed_and_resumed_runs_time_is_accounted_for(server: RunServer, tmp_path: Path) -> None:
    options: Sections = {
        "training": {"steps": 100_000, "eval_interval_steps": 10, "eval_steps": 2},
        "data": {"split": "80,20,0"},
    }
    run_dir = tmp_path / "run"
    path = write_recipe(tmp_path / "r.yaml", recipe(write_data(tmp_path), run_dir, options))
    began = time.time()
    first = server.start(["pretrain", path, f"training.exit_after_steps={SAVED}"])
    assert first.wait() == [75], first.output()
    outside = time.time() - began
    killed_began = time.time()
    second = server.start(["pretrain", path])
    wait_for(lambda: measure_goodput(run_dir).attempts == 2, second)
    wait_for(lambda: lines(run_dir) >= SAVED + 20, second)
    time.sleep(2.5)
    second.signal(signal.SIGKILL)
    second.wait()
    outside += time.time() - killed_began
    killed = time.time()
    time.sleep(1.0)  # in the queue
    third_began = time.time()
    third = server.start(["pretrain", path, f"training.exit_after_steps={LAST}"])
    assert third.wait() == [75], third.output()
    ended = time.time()
    outside += ended - third_began

    measured = measure_goodput(run_dir)
    assert json.loads((run_dir / "goodput.json").read_text()) == measured.record()
    assert set(measured.losses) == set(CAUSES) and min(measured.losses.values()) > -1e-6
    assert measured.useful + sum(measured.losses.values()) == pytest.approx(measured.allocated)
    # Against the clock of whoever started it, which also sees what comes before a process counts and after.
    assert 0.3 * outside < measured.allocated <= outside
    whole = ended - began
    assert 1.0 <= measured.waiting <= whole - measured.allocated and measured.attempts == 3
    assert min(measured.losses[cause] for cause in ("start", "restart", "save", "evaluation")) > 0.0
    assert measured.losses["lost_steps"] > 1.0 and measured.losses["end"] < 0.2
    assert 0.0 < measured.share < 1.0

    # As of a job whose script began a second before its process, and noted its end.
    attempts = [
        {"event": "begin", "unix_seconds": began - 1.0},
        {"event": "end", "unix_seconds": killed_began - 0.01, "exit_code": 75, "step": SAVED},
        {"event": "begin", "unix_seconds": killed_began - 0.01},
        {"event": "end", "unix_seconds": killed + 0.5, "exit_code": None, "step": 70},
        {"event": "begin", "unix_seconds": third_began - 0.5},
        {"event": "end", "unix_seconds": ended + 2.0, "exit_code": 75, "step": LAST},
    ]
    with (run_dir / "attempts.jsonl").open("w") as file:
        file.writelines(json.dumps(record) + "\n" for record in attempts)
        file.write('{"event": "beg')  # torn
    inside = measure_goodput(run_dir)
    assert inside.useful == measured.useful and inside.attempts == 3
    grown = {cause: inside.losses[cause] - measured.losses[cause] for cause in CAUSES}
    assert grown["start"] >= 1.0 and grown["restart"] >= 0.5 and grown["end"] >= 2.0
    # The jobs' whole time, but for what the killed one did not live to tell.
    assert inside.allocated == pytest.approx(outside + 1.0 + 0.5 + 2.0, abs=3.0)
    assert grown["lost_steps"] == grown["save"] == grown["evaluation"] == 0.0
    assert inside.useful + sum(inside.losses.values()) == pytest.approx(inside.allocated)


def times(step: int, train: float, **more: float) -> dict[str, object]:
    """A `times` event of an attempt that began at 100."""
    base = {"began": 100.0, "start": 5.0, "save": 0.0, "evaluation": 0.0}
    return {"event": "times", "step": step, "train": train, **base, **more}


def test_lost_steps_are_those_after_the_step_that_the_next_attempt_begins_with(tmp_path: Path) -> None:
    events = [
        {"event": "start", "step": 0},
        times(0, 0.0),
        times(10, 20.0, save=1.0),
        times(14, 28.0, save=1.0),
        {"event": "resume", "step": 10},
        times(10, 0.0, began=200.0),
        times(20, 19.0, began=200.0, evaluation=2.0),
    ]
    (tmp_path / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    measured = measure_goodput(tmp_path)
    assert measured.useful == 20.0 + 19.0
    assert measured.losses == {
        "start": 5.0, "restart": 5.0, "save": 1.0, "evaluation": 2.0, "lost_steps": 8.0, "end": 0.0,
    }  # fmt: skip
    assert measured.allocated == 34.0 + 26.0 and measured.waiting == 200.0 - 134.0
    assert measure_goodput(tmp_path / "nothing").record()["goodput"] is None
