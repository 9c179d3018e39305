"""Where a run goes on from: past damaged checkpoints, back on request, away from NaN, in time."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from chiar_megatron.training.verify_resume import Verdict, compare_runs
from tests.parallel.run_server import REPOSITORY, RunServer
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

STEPS = 6
SAVES: Sections = {"checkpoint": {"save_interval_steps": 2}, "training": {"steps": STEPS}}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def finished(server: RunServer, data: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two replicas with checkpoints of steps 2, 4 and 6."""
    folder = tmp_path_factory.mktemp("finished")
    path = write_recipe(folder / "r.yaml", recipe(data, folder / "run", SAVES))
    run = server.start(["pretrain", path], ranks=2)
    assert run.wait() == [0, 0], run.output()
    return folder / "run"


def truncate(newest: Path) -> None:
    file = next(newest.glob("*.distcp"))
    file.write_bytes(file.read_bytes()[:-100])


def flip_a_byte(newest: Path) -> None:
    file = next(newest.glob("*.distcp"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def tear_the_manifest(newest: Path) -> None:
    (newest / "manifest.json").write_text((newest / "manifest.json").read_text()[:100])


DAMAGES: dict[str, tuple[Callable[[Path], Any], int, str]] = {
    "truncated": (truncate, 4, "bytes, "),
    "flipped": (flip_a_byte, 4, "__0_0.distcp has other content than was written"),
    "file gone": (lambda newest: (newest / "common.pt").unlink(), 4, "common.pt is missing"),
    "info gone": (lambda newest: (newest / "checkpoint.json").unlink(), 4, "checkpoint.json is missing"),
    "manifest gone": (lambda newest: (newest / "manifest.json").unlink(), 4, "manifest.json is missing"),
    "manifest torn": (tear_the_manifest, 4, "manifest.json is torn"),
    "pointer torn": (lambda newest: (newest.parent / "latest").write_text("step_0"), 6, "latest is torn"),
    "folder gone": (shutil.rmtree, 4, "names a checkpoint that is gone"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_newest_checkpoint_is_passed_over(
    server: RunServer, data: str, finished: Path, tmp_path: Path, name: str
) -> None:
    damage, taken, words = DAMAGES[name]
    run_dir = Path(shutil.copytree(finished, tmp_path / "run"))
    damage(step_folder(run_dir, STEPS))
    path = write_recipe(tmp_path / "r.yaml", recipe(data, run_dir, SAVES))
    run = server.start(["pretrain", path], ranks=2)
    assert run.wait() == [0, 0], run.output() + run.output(1)
    assert [r["step"] for r in records(run_dir, "events") if r["event"] == "resume"] == [taken]
    problems = [r["error"] for r in records(run_dir, "events") if r["event"] == "checkpoint_problem"]
    assert len(problems) == 1 and words in problems[0]
    assert run.output().count(problems[0]) == 1 and problems[0] not in run.output(1)
    assert losses(run_dir) == losses(finished)
    assert saved_state(run_dir, STEPS) == saved_state(finished, STEPS)
    assert (run_dir / "checkpoints" / "latest").read_text() == f"step_{STEPS:08d}\n"


def test_nothing_whole_is_refused_on_all_ranks_and_nothing_is_lost(
    server: RunServer, data: str, finished: Path, tmp_path: Path
) -> None:
    run_dir = Path(shutil.copytree(finished, tmp_path / "run"))
    for step in (2, 4, 6):
        flip_a_byte(step_folder(run_dir, step))
    kept = sorted((run_dir / "checkpoints").rglob("*"))
    run = server.start(["pretrain", write_recipe(tmp_path / "r.yaml", recipe(data, run_dir, SAVES))], ranks=2)
    assert run.wait() == [2, 2], run.output()
    (line,) = [line for line in run.output().splitlines() if line.startswith("chiar: ")]
    assert f"every checkpoint in {run_dir}/checkpoints is damaged (step_00000006: " in line
    assert "restore one, or start in another run_dir" in line
    assert losses(run_dir) == losses(finished) and sorted((run_dir / "checkpoints").rglob("*")) == kept


def test_tokenised_files_may_have_moved_but_not_become_others(
    server: RunServer, data: str, finished: Path, tmp_path: Path
) -> None:
    run_dir = Path(shutil.copytree(finished, tmp_path / "run"))
    elsewhere = Path(shutil.copytree(Path(data).parent, tmp_path / "elsewhere"))
    longer: Sections = {"training": {"steps": STEPS + 1}}
    path = write_recipe(tmp_path / "r.yaml", recipe(str(elsewhere / "text"), run_dir, SAVES, longer))
    run = server.start(["pretrain", path], ranks=2)
    assert run.wait() == [0, 0], run.output()
    assert list(losses(run_dir)) == list(range(1, STEPS + 2))
    for suffix in ("bin", "idx"):
        (elsewhere / f"text.{suffix}").rename(elsewhere / f"other.{suffix}")
    path = write_recipe(tmp_path / "r.yaml", recipe(str(elsewhere / "other"), run_dir, SAVES))
    run = server.start(["pretrain", path], ranks=2)
    assert run.wait() == [2, 2]
    assert "data.train is" in run.output()


def test_going_back_skips_samples_and_happens_once(
    server: RunServer, data: str, finished: Path, tmp_path: Path
) -> None:
    run_dir = Path(shutil.copytree(finished, tmp_path / "run"))
    path = write_recipe(tmp_path / "r.yaml", recipe(data, run_dir, SAVES))
    # Steps 3 and 4 took samples 8 to 15: go back to before them, and leave them out.
    back = ["pretrain", path, "checkpoint.load_step=2", 'data.skip_samples=["8:16"]']
    first = server.start([*back, "training.exit_after_steps=4"], ranks=2)
    assert first.wait() == [75, 75], first.output()
    assert [r["step"] for r in records(run_dir, "events") if r["event"] == "resume"] == [2]
    aside = [p.name.rpartition("_")[0] for p in (run_dir / "checkpoints").glob("aside_*")]
    assert sorted(aside) == ["aside_step_00000004", "aside_step_00000006"]
    assert losses(run_dir)[3] != losses(finished)[3]
    # Restarted by the same command, it goes on from step 4.
    again = server.start([*back, "training.exit_after_steps=5"], ranks=2)
    assert again.wait() == [75, 75], again.output()
    assert [r["step"] for r in records(run_dir, "events") if r["event"] == "resume"] == [2, 4]
    assert losses(run_dir).keys() == {1, 2, 3, 4, 5}
    # Samples that step 5 has trained on can no longer be left out.
    late = server.start(["pretrain", path, 'data.skip_samples=["8:16", "26:30"]'], ranks=2)
    assert late.wait() == [2, 2]
    assert "up to sample 28: only samples after that can still be left out" in late.output()


def test_what_is_skipped_is_not_trained_on(
    server: RunServer, data: str, finished: Path, tmp_path: Path
) -> None:
    """Skipping all that step 3 would take makes step 3 what step 4 was to a model that had not moved."""
    still: Sections = {"optimizer": {"lr": 1e-30}, "model": {"dropout": 0.0}}
    plain = write_recipe(tmp_path / "a.yaml", recipe(data, tmp_path / "a", SAVES, still))
    skipping = write_recipe(tmp_path / "b.yaml", recipe(data, tmp_path / "b", SAVES, still))
    for arguments in ([plain], [skipping, 'data.skip_samples=["8:12"]']):
        run = server.start(["pretrain", *arguments])
        assert run.wait() == [0], run.output()
    # MetaRouter's average moves with what it has seen, by less than 1e-3 here.
    for step in (3, 4, 5):
        assert losses(tmp_path / "b")[step][0] == pytest.approx(losses(tmp_path / "a")[step + 1][0], abs=1e-3)
    assert losses(tmp_path / "b")[2] == losses(tmp_path / "a")[2]


def test_what_rank_0_finds_wrong_with_the_data_ends_all_ranks(
    server: RunServer, data: str, tmp_path: Path
) -> None:
    """It alone writes the index; two runs may share its cache, so word of it does not go through files."""
    (tmp_path / "file").touch()
    shared: Sections = {"data": {"cache_dir": f"{tmp_path}/file/cache", "train": [data], "eod_token": 0}}
    path = write_recipe(tmp_path / "r.yaml", recipe(data, tmp_path / "run", shared))
    run = server.start(["pretrain", path], ranks=2)
    assert run.wait() == [2, 2], run.output() + run.output(1)
    (line,) = [line for line in run.output().splitlines() if line.startswith("chiar: ")]
    assert "data.cache_dir" in line and "cannot be written" in line and line in run.output(1)


def test_undefined_numbers_stop_the_run_and_keep_older_checkpoints(
    server: RunServer, data: str, tmp_path: Path
) -> None:
    options: Sections = {
        "training": {"steps": 30, "max_bad_steps": 4},
        "checkpoint": {"save_interval_steps": 1, "keep_last": 2},
    }
    run_dir = tmp_path / "run"
    path = write_recipe(tmp_path / "r.yaml", recipe(data, run_dir, options))
    first = server.start(["pretrain", path, "training.exit_after_steps=4"], ranks=2)
    assert first.wait() == [75, 75], first.output()
    good = saved_state(run_dir, 4)
    # One update of this size, and no product of weights is finite any more.
    run = server.start(["pretrain", path, "optimizer.lr=1e30", "checkpoint.keep_last=1"], ranks=2)
    assert run.wait() == [2, 2], run.output() + run.output(1)
    bad = [r["step"] for r in records(run_dir, "events") if r["event"] == "bad_step"]
    assert bad == list(range(bad[0], bad[0] + 4)) and bad[0] in (6, 7)
    assert "not finite in 4 steps in a row (training.max_bad_steps)" in run.output()
    assert run.output().count("skipped on all ranks") == 4
    assert "Traceback" not in run.output()
    ending = json.loads((run_dir / "exit.json").read_text())
    assert (ending["exit_code"], ending["step"]) == (2, bad[-1])
    # The last save is of the weights before the bad steps, and took no other's place.
    last_good_step = step_folder(run_dir, bad[0] - 1)
    assert step_folder(run_dir, bad[-1]).is_dir() and last_good_step.is_dir()
    distcp = {name: content for name, content in saved_state(run_dir, bad[-1]).items() if "distcp" in name}
    assert distcp.items() <= saved_state(run_dir, bad[0] - 1).items()
    assert good.keys() == saved_state(run_dir, bad[-1]).keys()


def test_a_run_that_never_took_a_step_is_not_done(server: RunServer, data: str, tmp_path: Path) -> None:
    options: Sections = {"training": {"steps": 3}, "model": {"init_std": 1e30}}
    path = write_recipe(tmp_path / "r.yaml", recipe(data, tmp_path / "run", options))
    for _ in range(2):  # again: nothing of it counts as done
        run = server.start(["pretrain", path], ranks=2)
        assert run.wait() == [2, 2], run.output()
        assert "not finite in all 3 step(s) of this attempt, up to the last, 3;" in run.output()
        ending = json.loads((tmp_path / "run" / "exit.json").read_text())
        assert ending["exit_code"] == 2 and ending["reason"].startswith("not finite: ")
    mended = server.start(["pretrain", path, "model.init_std=0.02"], ranks=2)
    assert mended.wait() == [0, 0], mended.output()


def test_a_rate_that_was_lowered_counts_after_a_resume(server: RunServer, data: str, tmp_path: Path) -> None:
    """Both kinds of optimizer load their groups with the checkpoint's rate: the recipe's must win."""
    for name, sharded in (("a", "false"), ("b", "true")):
        path = write_recipe(tmp_path / f"{name}.yaml", recipe(data, tmp_path / name, SAVES))
        for rate, last in ((1e-2, 3), (1e-3, 5)):
            run = server.start(
                ["pretrain", path, f"parallel.distributed_optimizer={sharded}", f"optimizer.lr={rate}",
                 f"training.exit_after_steps={last}", "optimizer.schedule=constant"], ranks=2
            )  # fmt: skip
            assert run.wait() == [75, 75], run.output()
        assert [r["learning_rate"] for r in records(tmp_path / name)][2:] == [1e-2, 1e-3, 1e-3]
    assert losses(tmp_path / "a") == {
        step: pytest.approx(pair, rel=1e-5) for step, pair in losses(tmp_path / "b").items()
    }


def test_minutes_save_and_stop(server: RunServer, data: str, tmp_path: Path) -> None:
    options: Sections = {
        "training": {"steps": 3000, "exit_after_minutes": 4 / 60},
        "checkpoint": {"save_interval_minutes": 0.5 / 60},
    }
    run_dir = tmp_path / "run"
    started = time.monotonic()
    run = server.start(["pretrain", write_recipe(tmp_path / "r.yaml", recipe(data, run_dir, options))])
    assert run.wait() == [75], run.output()
    assert time.monotonic() - started >= 4
    saves = [r for r in records(run_dir, "events") if r["event"] == "save"]
    ending = json.loads((run_dir / "exit.json").read_text())
    assert (ending["reason"], ending["exit_code"]) == ("exit_after_minutes", 75)
    assert len(saves) >= 2 and saves[-1]["step"] == ending["step"]
    assert len(saves) <= 10  # by the clock, not at every step
    kept = sorted(p.name for p in (run_dir / "checkpoints").glob("step_*"))
    assert kept == [f"step_{r['step']:08d}" for r in saves[-3:]]  # keep_last


def test_steps_stop(server: RunServer, data: str, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    path = write_recipe(tmp_path / "r.yaml", recipe(data, run_dir, SAVES))
    for _ in range(2):  # the second time there is nothing left to do
        run = server.start(["pretrain", path, "training.exit_after_steps=3"])
        assert run.wait() == [75], run.output()
        assert json.loads((run_dir / "exit.json").read_text())["reason"] == "exit_after_steps"
    assert losses(run_dir).keys() == {1, 2, 3}


def test_a_run_folder_that_cannot_be_written_is_one_line_on_all_ranks(
    server: RunServer, data: str, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    started = time.monotonic()
    path = write_recipe(tmp_path / "r.yaml", recipe(data, tmp_path / "file" / "run"))
    run = server.start(["pretrain", path], ranks=2)
    assert run.wait() == [2, 2], run.output()
    for rank in (0, 1):
        lines = run.output(rank).splitlines()
        assert len(lines) == 1 and lines[0].startswith("chiar: run_dir ") and "cannot be written" in lines[0]
    assert time.monotonic() - started < 60
    # The launcher itself keeps logs there.
    command = [sys.executable, "-m", "chiar_megatron.cli", "pretrain", str(path)]
    two = "parallel.tensor_model_parallel_size=2"
    alone = subprocess.run([*command, two], cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    assert alone.returncode == 2
    assert len(alone.stderr.splitlines()) == 1 and "cannot be written" in alone.stderr


def test_verify_resume_names_what_differs(
    server: RunServer, data: str, finished: Path, tmp_path: Path
) -> None:
    twin = Path(shutil.copytree(finished, tmp_path / "twin"))
    assert compare_runs(finished, twin, STEPS)[0] == []
    path = write_recipe(tmp_path / "r.yaml", recipe(data, twin, SAVES, {"optimizer": {"beta2": 0.9}}))
    run = server.start(["pretrain", path, "checkpoint.load_step=4"], ranks=2)
    assert run.wait() == [0, 0], run.output()
    differences, tensors = compare_runs(finished, twin, STEPS)
    assert tensors > 50
    assert any(text.startswith("step 6: loss ") for text in differences)
    assert "saved after the last step: embedding.word_embeddings.weight differs" in differences
    moment = "saved after the last step: optimizer.state.exp_avg_sq.decoder.final_layernorm.weight differs"
    assert moment in differences
    assert Verdict(6, 3, tensors, differences, "hint").lines()[0].startswith("resume is NOT exact")


def test_verify_resume_by_its_command(data: str, tmp_path: Path) -> None:
    path = write_recipe(tmp_path / "r.yaml", recipe(data, tmp_path / "run"))
    command = [sys.executable, "-m", "chiar_megatron.cli", "verify-resume", str(path), "--steps", "4"]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.startswith("resume is exact: 4 steps against 2 + 2")
    assert list((tmp_path / "run").iterdir()) == []
