"""Sweeps as job arrays: a grid file's tasks, or those of `chiar scaling plan`, one run folder each."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import yaml

from chiar_megatron.checkpoint.files import write_durably
from chiar_megatron.cluster.placement import Placement, place
from chiar_megatron.cluster.preflight import check_run, find_problems, submit_script, submit_training
from chiar_megatron.cluster.prepare import Unprepared, find_unprepared
from chiar_megatron.cluster.script import Array, prepare_script, pretrain_script
from chiar_megatron.cluster.site import ClusterConfig
from chiar_megatron.cluster.status import JOB_FILE, jobs_in_queue, note_preparation, status_of
from chiar_megatron.config.load import dump_config, load_config
from chiar_megatron.config.problems import raise_problems, shown
from chiar_megatron.config.schema import RunConfig
from chiar_megatron.errors import EXIT_DONE, ChiarError, ConfigError
from chiar_megatron.scaling.analysis import Analysis
from chiar_megatron.scaling.manifest import PlannedRun
from chiar_megatron.scaling.manifest import Sweep as PlannedSweep
from chiar_megatron.scaling.submit import announce

MAX_TASKS = 10_000
_NAME_CHARACTERS = 60


@dataclass(frozen=True)
class Task:
    """One run of a sweep."""

    name: str
    config: RunConfig

    @property
    def run_dir(self) -> Path:
        """The run folder."""
        return Path(self.config.run_dir)

    @property
    def recipe(self) -> Path:
        """Where its recipe is kept for the job."""
        return self.run_dir / "submit" / "recipe.yaml"


def grid_tasks(recipe: Path, overrides: Sequence[str], grid: Path) -> list[Task]:
    """The tasks of a grid file: every entry of `list` with every combination of `product`'s values.

    Each is the recipe with those fields overruled, in a folder of its own below the recipe's run_dir. Raises
    ConfigError for a malformed grid or a task that is no valid recipe, naming it.
    """
    folder = Path(load_config(recipe, overrides).run_dir)
    tasks = []
    points = _grid_points(grid)
    width = max(4, len(str(len(points) - 1)))
    for number, point in enumerate(points):
        name = f"{number:0{width}d}{_slug(point)}"
        own = [f"{field}={_as_text(value)}" for field, value in point.items()]
        try:
            config = load_config(recipe, [*overrides, *own, f"run_dir={folder / name}"])
        except ConfigError as error:
            raise ConfigError(f"{grid}, task {number} ({', '.join(own)}): {error}") from None
        tasks.append(Task(name, config))
    return tasks


def _grid_points(path: Path) -> list[dict[str, Any]]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"grid file {path} cannot be read: {error.strerror}; give a YAML file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"grid file {path} is not YAML: {' '.join(str(error).split())}") from None
    example = "`product: {optimizer.lr: [1.0e-3, 3.0e-3]}` or `list: [{optimizer.lr: 1.0e-3}]`"
    if not isinstance(content, dict) or not content or set(content) - {"product", "list"}:
        raise ConfigError(f"{path}: holds {shown(content)}; it needs `product` or `list`, or both: {example}")
    product, entries = content.get("product", {}), content.get("list", [{}])
    good = isinstance(product, dict) and all(isinstance(v, list) and v for v in product.values())
    if not good or not isinstance(entries, list) or not all(isinstance(e, dict) for e in entries):
        raise ConfigError(
            f"{path}: `product` maps fields to lists of values, `list` lists mappings: {example}"
        )
    twice = [field for field in product if any(field in entry for entry in entries)]
    if twice or "run_dir" in product or any("run_dir" in entry for entry in entries):
        field = twice[0] if twice else "run_dir"
        raise ConfigError(f"{path}: {field} stands in both `product` and `list`" if twice else
                          f"{path}: {field} is each task's own; set it in the recipe, for all")  # fmt: skip
    combined = [
        {**entry, **dict(zip(product, values, strict=True))}
        for entry in entries
        for values in itertools.product(*product.values())
    ]
    if not 0 < len(combined) <= MAX_TASKS:
        raise ConfigError(f"{path}: {len(combined)} tasks; from 1 to {MAX_TASKS:,} are taken")
    return combined


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _slug(point: Mapping[str, Any]) -> str:
    """What is seen of a task in its folder's name."""
    parts = [f"{field.rpartition('.')[2]}={_as_text(value)}" for field, value in point.items()]
    text = re.sub(r"[^\w.=+-]+", "", "_".join(parts))[:_NAME_CHARACTERS]
    return f"_{text}" if text else ""


@dataclass(frozen=True)
class JobArray:
    """Tasks that share nodes, tasks a node and site settings: one array."""

    folder: Path
    """Of the sweep: scripts and output of the jobs."""
    name: str
    tasks: tuple[Task, ...]
    cluster: ClusterConfig
    placement: Placement
    throttle: Optional[int]

    def script(self) -> str:
        """The array's script. Task i of the array is the i-th of `tasks`."""
        array = Array(tuple(task.run_dir for task in self.tasks), self.throttle)
        return pretrain_script(self.folder, f"chiar-{self.name}", (), self.cluster, self.placement, array)


@dataclass(frozen=True)
class SweepSubmission:
    """A sweep on its way to the queue."""

    folder: Path
    arrays: tuple[JobArray, ...]
    unprepared: dict[Path, Unprepared]
    """By the recipe of the first task that needs it: texts to tokenise first."""
    problems: list[str]
    """What would stop a job; warnings of a dry run."""
    notes: list[str]


def plan_arrays(
    folder: Path, tasks: Sequence[Task], cluster: ClusterConfig, nodes: Optional[int], throttle: Optional[int]
) -> SweepSubmission:
    """Check every task, and leave out what is finished or in the queue; nothing is written.

    Raises ConfigError for a layout that does not fit, naming the task.
    """
    jobs = jobs_in_queue()
    left, notes = [], []
    for task in tasks:
        state = status_of(task.run_dir, jobs).state if task.run_dir.is_dir() else "missing"
        if state == "finished" or (jobs is not None and state in ("running", "queued")):
            notes.append(f"{task.name} is {state}: left out")
        else:
            left.append(task)
    if len(notes) > 5:
        notes = [*notes[:4], f"... and {len(notes) - 4} more tasks"]
    groups: dict[Placement, list[Task]] = {}
    unprepared: dict[Path, Unprepared] = {}
    found: set[str] = set()
    problems: list[str] = []
    for task in left:
        try:
            placement = place(task.config, cluster, nodes)
            check_run(task.config, placement)
        except ConfigError as error:
            raise ConfigError(f"task {task.name}: {error}") from None
        groups.setdefault(placement, []).append(task)
        missing = find_unprepared(task.config)
        if set(missing.texts) - found:
            unprepared[task.recipe] = missing
            found |= set(missing.texts)
    if left:  # what they share is asked of SLURM once
        for number, task in enumerate(left):
            quiet = cluster if number == 0 else ClusterConfig()
            problems += find_problems(task.config, quiet, find_unprepared(task.config))
    # Scripts of earlier arrays stay as they are: their tasks may submit them anew.
    first, base = len(list((folder / "submit").glob("*-*.sbatch"))), folder.absolute().name
    arrays = [
        JobArray(folder, f"{base}-{number}", tuple(group), cluster, placement, throttle)
        for number, (placement, group) in enumerate(groups.items(), start=first)
    ]
    return SweepSubmission(folder, tuple(arrays), unprepared, list(dict.fromkeys(problems)), notes)


def submit_arrays(submission: SweepSubmission) -> list[str]:
    """Write the tasks' recipes and the scripts, and submit; returns the lines to tell the user.

    Raises ConfigError for what preflight found, LaunchError if sbatch refuses, ChiarError if a folder cannot
    be written.
    """
    raise_problems(submission.problems)
    scripts = submission.folder / "submit"
    lines, preparation = list(submission.notes), None
    try:
        scripts.mkdir(parents=True, exist_ok=True)
        for task in (task for array in submission.arrays for task in array.tasks):
            task.recipe.parent.mkdir(parents=True, exist_ok=True)
            write_durably(task.recipe, dump_config(task.config))
        if submission.unprepared and submission.arrays:
            first, preparing = submission.arrays[0], scripts / "prepare.sbatch"
            recipes = list(submission.unprepared)
            write_durably(
                preparing, prepare_script(submission.folder, f"chiar-{first.name}", recipes, first.cluster)
            )
            preparation = submit_script(preparing, ())
            output = f"{submission.folder}/prepare-{preparation}.out"
            lines.append(f"job {preparation} prepares the data on CPUs: {output}")
        for array in submission.arrays:
            script = scripts / f"{array.name}.sbatch"
            write_durably(script, array.script())
            job = submit_training(script, preparation, alone=array is submission.arrays[0])
            for number, task in enumerate(array.tasks):
                note_preparation(task.run_dir, submission.folder, preparation)
                write_durably(task.run_dir / JOB_FILE, f"{job}_{number}\n")
            at_once = "" if array.throttle is None else f", {array.throttle} at once"
            placement = array.placement
            lines.append(
                f"job {job}: {len(array.tasks)} task(s){at_once}, each {placement.nodes} node(s) x "
                f"{placement.tasks_per_node} task(s)"
            )
    except OSError as error:
        raise ChiarError(f"{submission.folder} cannot be written: {error}; choose another run_dir") from None
    if not submission.arrays:
        return [*lines, "nothing to submit"]
    return [
        *lines,
        f"watch   chiar status {submission.folder}",
        "stop    touch RUN/STOP, or scancel JOB_TASK",
    ]


class SlurmArrays:
    """The back end of `chiar scaling submit` that sends what is not finished to SLURM."""

    def __init__(
        self,
        cluster: ClusterConfig,
        nodes: Optional[int],
        throttle: Optional[int],
        analysis: Optional[Analysis],
    ) -> None:
        """analysis: a fit whose prediction of each run is told and kept before it is submitted."""
        self._cluster, self._nodes, self._throttle = cluster, nodes, throttle
        self._analysis = analysis

    def plan(self, sweep: PlannedSweep, runs: Sequence[PlannedRun]) -> SweepSubmission:
        """What would be submitted."""
        tasks = [Task(run.name, load_config(sweep.recipe(run))) for run in runs]
        return plan_arrays(sweep.folder, tasks, self._cluster, self._nodes, self._throttle)

    def start(self, sweep: PlannedSweep, runs: Sequence[PlannedRun], say: Callable[[str], None]) -> int:
        """Returns 0 once the jobs are in the queue."""
        submission = self.plan(sweep, runs)
        for run in runs if self._analysis is not None else ():
            say(f"{run.name}: {run.parameters:,} parameters, {run.tokens:,} tokens")
            announce(self._analysis, sweep, run, say)
        for line in submit_arrays(submission):
            say(line)
        return EXIT_DONE
