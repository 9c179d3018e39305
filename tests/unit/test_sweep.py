"""Grid files, and the arrays that come of them, by the command line and real files."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from chiar_megatron.cluster.site import ClusterConfig
from chiar_megatron.cluster.sweep import grid_tasks, plan_arrays
from chiar_megatron.errors import ConfigError
from tests.unit.test_submit import RECIPE, chiar

GRID = """\
list:
  - {model.schedule: "A*4"}
  - {model.schedule: "D R*2 A", model.router.target: 0.5}
product:
  optimizer.lr: [1e-3, 0.002]
  training.seed: [1, 2]
"""


def write(folder: Path, grid: str = GRID) -> tuple[Path, Path]:
    (folder / "r.yaml").write_text(RECIPE.replace("run_dir: run", f"run_dir: {folder}/sweep"))
    (folder / "grid.yaml").write_text(grid)
    return folder / "r.yaml", folder / "grid.yaml"


def test_a_grid_is_every_entry_of_the_list_with_every_combination(tmp_path: Path) -> None:
    recipe, grid = write(tmp_path)
    tasks = grid_tasks(recipe, ["training.steps=7"], grid)
    found = [
        (t.config.model.schedule, t.config.model.router.target, t.config.optimizer.lr, t.config.training.seed)
        for t in tasks
    ]
    points = [(lr, seed) for lr in (0.001, 0.002) for seed in (1, 2)]
    kinds = [("A*4", None), ("D R*2 A", 0.5)]
    assert found == [(*kind, *point) for kind in kinds for point in points]
    assert {task.config.training.steps for task in tasks} == {7}
    assert len({task.run_dir for task in tasks}) == 8
    assert tasks[5].run_dir == tmp_path / "sweep" / "0005_schedule=DR2A_target=0.5_lr=1e-3_seed=2"


@pytest.mark.parametrize(
    ("grid", "named"),
    [
        ("product: {optimizer.lr: 3}", "`product` maps fields to lists"),
        ("lists: []", "it needs `product` or `list`"),
        ("product: {optimizer.lrr: [1]}", "task 0 (optimizer.lrr=1)"),
        ("product: {run_dir: [a]}", "run_dir is each task's own"),
        ("{product: {training.seed: [1]}, list: [{training.seed: 2}]}", "training.seed stands in both"),
        ("list: []", "0 tasks"),
        ("[", "is not YAML"),
    ],
)
def test_a_wrong_grid_is_named(tmp_path: Path, grid: str, named: str) -> None:
    recipe, path = write(tmp_path, grid)
    with pytest.raises(ConfigError) as caught:
        grid_tasks(recipe, [], path)
    assert named in str(caught.value) and len(str(caught.value).splitlines()) <= 12


def test_layouts_that_differ_become_arrays_of_their_own_and_finished_tasks_are_left_out(
    tmp_path: Path,
) -> None:
    recipe, grid = write(
        tmp_path, "product: {parallel.tensor_model_parallel_size: [1, 2], training.seed: [1, 2]}"
    )
    tasks = grid_tasks(recipe, [], grid)
    tasks[3].run_dir.mkdir(parents=True)
    (tasks[3].run_dir / "exit.json").write_text('{"reason": "done", "exit_code": 0, "step": 1}')
    cluster = ClusterConfig(gpus_per_node=2, gpu_option="none")
    plan = plan_arrays(tmp_path / "sweep", tasks, cluster, None, 1)
    assert [[task.name[:4] for task in array.tasks] for array in plan.arrays] == [["0000", "0001"], ["0002"]]
    assert [array.placement.tasks_per_node for array in plan.arrays] == [1, 2]
    assert plan.notes == [f"{tasks[3].name} is finished: left out"]
    assert "--array=0-1%1" in plan.arrays[0].script() and "--array=0-0%1" in plan.arrays[1].script()
    assert plan.problems and all("data.train" in problem for problem in plan.problems)


def test_a_dry_run_prints_a_throttled_array_and_writes_nothing(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "cluster.yaml").write_text("gpus_per_node: 1\nrequeue: false\n")
    shown = chiar(tmp_path, "submit", "r.yaml", "--grid", "grid.yaml", "--throttle", "3", "--dry-run")
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.startswith("#!/bin/bash\n") and "warning: data.train" in shown.stderr
    lines = shown.stdout.splitlines()
    assert "#SBATCH --array=0-7%3" in lines and 'PRETRAIN=(pretrain "$RUN_DIR/submit/recipe.yaml")' in lines
    assert "RUN_DIR=${RUN_DIRS[SLURM_ARRAY_TASK_ID]}" in lines
    checked = subprocess.run(["bash", "-n"], input=shown.stdout, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr
    assert not (tmp_path / "sweep").exists()
    alone = chiar(tmp_path, "submit", "r.yaml", "--throttle", "3", "--dry-run")
    assert alone.returncode == 2 and "--grid" in alone.stderr
