"""Two copies of one run at a time: an older one, paused in the middle of its work, gives way to the newer."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.parallel.run_server import RunServer
from tests.parallel.test_survival import half_written, lines, wait_for
from tests.parallel.tiny_run import Sections, losses, recipe, records, saved_state, write_data, write_recipe
from tests.unit.pause_points import contents

STEPS = 20
OPTIONS: Sections = {
    "training": {"steps": STEPS},
    "checkpoint": {"save_interval_steps": 2, "keep_last": 2},
    "parallel": {"tensor_model_parallel_size": 2},
    "logging": {"routing_traces": 24, "tensorboard": True},
}


@pytest.fixture(scope="module")
def second(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunServer]:
    """A server beside the session's, which waits for the older copy."""
    running = RunServer(tmp_path_factory.mktemp("second"))
    yield running
    running.close()


@pytest.fixture(scope="module")
def calm(second: RunServer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of an undisturbed run; its data lies beside it."""
    folder = tmp_path_factory.mktemp("calm")
    path = write_recipe(folder / "r.yaml", recipe(write_data(folder), folder / "run", OPTIONS))
    run = second.start(["pretrain", path], ranks=2)
    assert run.wait() == [0, 0], run.output()
    return folder / "run"


@pytest.mark.parametrize("in_a_save", [True, False])
def test_a_paused_copy_gives_way(
    server: RunServer, second: RunServer, calm: Path, tmp_path: Path, in_a_save: bool
) -> None:
    """The copies are of one machine here, which is to the files what two would be."""
    run_dir = tmp_path / "run"
    path = write_recipe(tmp_path / "r.yaml", recipe(f"{calm.parent}/text", run_dir, OPTIONS))
    old = server.start(["pretrain", path, f"checkpoint.async_save={str(not in_a_save).lower()}"], ranks=2)
    wait_for(lambda: lines(run_dir) >= 5, old)
    ready: Callable[[], bool] = (lambda: bool(half_written(run_dir))) if in_a_save else lambda: True
    wait_for(ready, old)
    old.signal(signal.SIGSTOP)
    new = second.start(["pretrain", path], ranks=2)
    assert new.wait() == [0, 0], new.output()
    after = contents(run_dir)
    old.signal(signal.SIGCONT)
    assert old.wait() == [2, 2], old.output()
    assert contents(run_dir) == after
    errors = [line for line in old.output().splitlines() if line.startswith("chiar: ")]
    assert errors == [
        f"chiar: {run_dir}: attempt 1 gives way to attempt 2, which has taken the run over and goes on "
        "with it; nothing needs to be done"
    ]
    assert "Traceback" not in old.output() + old.output(1)
    assert losses(run_dir) == losses(calm) and len(losses(run_dir)) == STEPS
    assert saved_state(run_dir, STEPS) == saved_state(calm, STEPS)
    resumed = [record for record in records(run_dir, "events") if record["event"] == "resume"]
    assert [record["attempt"] for record in resumed] == [2]
    assert resumed[0]["step"] in range(2 if in_a_save else 0, STEPS, 2)
