"""Checkpoints: whole or not there, at whatever point a save is killed; which are kept; which one is meant."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from chiar_megatron.checkpoint.files import (
    complete_steps,
    file_digest,
    find_damage,
    read_manifest,
    resolve_checkpoint,
    step_folder,
    write_durably,
)
from chiar_megatron.checkpoint.retention import choose_deleted, steps_to_delete
from chiar_megatron.config.schema import CheckpointConfig
from chiar_megatron.errors import CheckpointError
from tests.unit.kill_points import read, save, state, store

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module", autouse=True)
def alone() -> Iterator[None]:
    """One process with process groups."""
    from chiar_megatron.runtime.distributed import shutdown, single_process_world

    single_process_world("cpu")
    yield
    shutdown()


def test_a_save_killed_at_any_point_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.unit.kill_points", str(tmp_path)]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=150)
    assert result.returncode == 0, result.stderr
    points = int(result.stdout)
    assert points > 20
    found = []
    for number in range(1, points + 1):
        run_dir, folder = tmp_path / str(number), tmp_path / str(number) / "checkpoints"
        chosen = store(run_dir).find()
        assert chosen.folder is not None and chosen.problems == [], (number, chosen.problems)
        step = int(chosen.folder.name[-1])
        assert read(chosen.folder) == (step, step)
        for kept in complete_steps(folder):
            assert store(run_dir).verify(step_folder(folder, kept)) is None
        assert (folder / "latest").read_text() == f"step_0000000{step}\n"
        assert resolve_checkpoint(folder) == chosen.folder
        save(run_dir, 3)
        assert {p.name for p in folder.iterdir()} == {"latest", "step_00000003"}
        assert {p.name for p in run_dir.iterdir()} == {"checkpoints", "attempts"}
        attempts = [path for path in (run_dir / "attempts").iterdir()]
        assert len(attempts) == 1 and list(attempts[0].iterdir()) == []
        found.append(step)
    assert found == sorted(found) and set(found) == {1, 2}


def test_a_save_replaces_a_torn_folder_of_its_step(tmp_path: Path) -> None:
    save(tmp_path, 1)
    torn = step_folder(tmp_path / "checkpoints", 2)
    torn.mkdir()
    (torn / "common.pt").write_text("half")
    save(tmp_path, 2)
    assert read(torn) == (2, 2)


def test_only_what_was_once_whole_can_be_damaged(tmp_path: Path) -> None:
    """A first save that never came to its end is no reason not to begin."""
    folder = tmp_path / "checkpoints"
    step_folder(folder, 1).mkdir(parents=True)
    (step_folder(folder, 1) / "common.pt").write_text("half")
    found = store(tmp_path).find()
    assert found.folder is None and "manifest.json is missing" in found.problems[0]
    save(tmp_path, 2)
    (step_folder(folder, 2) / "manifest.json").unlink()
    before = sorted(folder.iterdir())
    with pytest.raises(CheckpointError, match="every checkpoint in .* is damaged .step_00000002: manifest"):
        store(tmp_path).find()
    assert sorted(folder.iterdir()) == before


def test_another_tensor_shape_is_one_line(tmp_path: Path) -> None:
    save(tmp_path, 1)
    wanted = state(0.0)["weight"]
    from chiar_megatron.checkpoint.store import load_state

    wanted.global_shape = wanted.local_shape = (4, 3)
    wanted.data = wanted.data[:4]
    with pytest.raises(CheckpointError, match="does not fit this model: .*weight") as error:
        load_state(step_folder(tmp_path / "checkpoints", 1), {"weight": wanted})
    assert len(str(error.value).splitlines()) == 1


def test_one_save_at_a_time_and_the_last_wins(tmp_path: Path) -> None:
    from chiar_megatron.checkpoint.store import make_info

    saves = store(tmp_path)
    assert saves.poll() is None and saves.finish() is None
    tensor = state(7.0)
    saves.start(tensor, make_info(7, 0, False, {}, {}))
    tensor["weight"].data.zero_()  # training goes on
    commit = saves.finish()
    assert commit is not None and commit.step == 7
    assert read(step_folder(tmp_path / "checkpoints", 7)) == (7, 7)


@pytest.mark.parametrize(
    ("keep_last", "every", "deleted"),
    [
        (0, 0.0, []),
        (2, 0.0, [1, 2, 3, 4, 5, 6]),
        (20, 0.0, []),
        (2, 2.0, [2, 4, 5]),  # keeps 1 (minute 0), 3 (minute 2), 6 (minute 5), and the last two
        (1, 100.0, [2, 3, 4, 5, 6, 7]),
    ],
)
def test_which_checkpoints_are_deleted(keep_last: int, every: float, deleted: list[int]) -> None:
    config = CheckpointConfig(keep_last=keep_last, keep_every_minutes=every)
    minutes = {1: 0.0, 2: 1.0, 3: 2.0, 4: 3.0, 5: 3.5, 6: 5.0, 7: 6.0, 8: 7.0}
    times = {step: minute * 60 for step, minute in minutes.items()}
    chosen = choose_deleted(times, config) if keep_last else []
    assert chosen == deleted
    left = {step: at for step, at in times.items() if step not in chosen}
    if keep_last:
        assert choose_deleted(left, config) == []  # the next save deletes no more of them


def test_times_are_the_checkpoints_own_not_the_files(tmp_path: Path) -> None:
    for step, minute in ((1, 0), (2, 10), (3, 20), (4, 30)):
        save(tmp_path / "a", step)
        os.makedirs(tmp_path / "b", exist_ok=True)
        kept = step_folder(tmp_path / "b", step)
        step_folder(tmp_path / "a" / "checkpoints", step).rename(kept)
        info = json.loads((kept / "checkpoint.json").read_text())
        (kept / "checkpoint.json").write_text(json.dumps({**info, "created_unix_seconds": minute * 60.0}))
    config = CheckpointConfig(keep_last=1, keep_every_minutes=15)
    assert steps_to_delete(tmp_path / "b", config) == [2]
    (step_folder(tmp_path / "b", 1) / "checkpoint.json").write_text("torn")
    assert steps_to_delete(tmp_path / "b", config) == [3]  # 1 is left to the user
    assert steps_to_delete(tmp_path / "b", CheckpointConfig(keep_last=0)) == []


def test_which_checkpoint_a_path_means(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    checkpoints = run_dir / "checkpoints"
    with pytest.raises(CheckpointError, match="no such checkpoint folder"):
        resolve_checkpoint(run_dir)
    checkpoints.mkdir(parents=True)
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        resolve_checkpoint(run_dir)
    for step in (1, 2):
        folder = step_folder(checkpoints, step)
        folder.mkdir()
        write_durably(folder / "manifest.json", "{}")
    assert complete_steps(checkpoints) == [1, 2]
    newest = step_folder(checkpoints, 2)
    for pointer, meant in (
        ("step_00000001\n", 1),
        ("step_", 2),
        ("step_00000009\n", 2),
        ("step_00000002", 2),
    ):
        write_durably(checkpoints / "latest", pointer)
        assert (
            resolve_checkpoint(run_dir) == resolve_checkpoint(checkpoints) == step_folder(checkpoints, meant)
        )
    assert resolve_checkpoint(newest) == newest


def test_damage_is_named(tmp_path: Path) -> None:
    file = tmp_path / "a.distcp"
    file.write_bytes(b"0123456789")
    (tmp_path / "checkpoint.json").write_text("{}")
    names = ["a.distcp", "checkpoint.json"]
    manifest = {name: file_digest(tmp_path / name) for name in names}
    assert find_damage(tmp_path, names, manifest) is None
    file.write_bytes(b"0123456780")
    assert find_damage(tmp_path, names, manifest) == "a.distcp has other content than was written"
    file.write_bytes(b"01234")
    assert find_damage(tmp_path, names, manifest) == "a.distcp has 5 bytes, 10 were written"
    file.unlink()
    assert find_damage(tmp_path, names, manifest) == "a.distcp is missing"
    with pytest.raises(CheckpointError, match=r"manifest.json is missing"):
        read_manifest(tmp_path)
    for torn in ("", "{", "[]", '{"a.distcp": {}}'):
        (tmp_path / "manifest.json").write_text(torn)
        with pytest.raises(CheckpointError, match=r"manifest.json is torn"):
            read_manifest(tmp_path)
