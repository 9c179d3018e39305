"""From a recipe to jobs in the queue, with what was submitted kept in `RUN/submit`."""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from chiar_megatron import __version__
from chiar_megatron.checkpoint.files import write_durably
from chiar_megatron.cluster.placement import Placement, place, spread_warnings
from chiar_megatron.cluster.preflight import (
    check_run,
    estimates,
    find_jobs,
    find_problems,
    submit_script,
    submit_training,
)
from chiar_megatron.cluster.prepare import Unprepared, find_unprepared
from chiar_megatron.cluster.script import prepare_script, pretrain_script
from chiar_megatron.cluster.site import ClusterConfig, load_cluster
from chiar_megatron.cluster.status import JOB_FILE, note_preparation
from chiar_megatron.config.load import dump_config, load_config
from chiar_megatron.config.problems import raise_problems
from chiar_megatron.config.schema import RunConfig
from chiar_megatron.errors import ChiarError
from chiar_megatron.runtime.installed import code_version


@dataclass(frozen=True)
class Submission:
    """A recipe on its way to the queue."""

    recipe: Path
    overrides: tuple[str, ...]
    config: RunConfig
    cluster: ClusterConfig
    placement: Placement
    unprepared: Unprepared
    problems: list[str]
    """What would stop the job; warnings of a dry run."""
    estimates: list[str]

    @property
    def run_dir(self) -> Path:
        """The run folder."""
        return Path(self.config.run_dir)

    @property
    def name(self) -> str:
        """Of the job; singleton chains rest on it, and the search for a job of the same run."""
        return job_name(self.run_dir)

    def script(self, recipe: Path, overrides: Sequence[str]) -> str:
        """The training job's script, for this recipe file."""
        command = ["pretrain", str(recipe), *overrides]
        return pretrain_script(self.run_dir, self.name, command, self.cluster, self.placement)


def job_name(run_dir: Path) -> str:
    """Readable, and no other folder's."""
    path = run_dir.absolute()
    readable = re.sub(r"[^\w.-]", "_", path.name)
    return f"chiar-{readable}-{hashlib.blake2b(str(path).encode(), digest_size=3).hexdigest()}"


def plan_submission(
    recipe: Path, overrides: Sequence[str], cluster_file: Path | None, nodes: int | None
) -> Submission:
    """Read and check everything; nothing is written. Raises ConfigError for a malformed recipe, cluster
    file or layout."""
    config = load_config(recipe, overrides)
    cluster = load_cluster(cluster_file)
    placement = place(config, cluster, nodes)
    check_run(config, placement)
    unprepared = find_unprepared(config)
    problems = find_problems(config, cluster, unprepared) + find_jobs(job_name(Path(config.run_dir)))
    estimated = spread_warnings(config, cluster, placement) + estimates(config, placement)
    return Submission(recipe, tuple(overrides), config, cluster, placement, unprepared, problems, estimated)


def submit(submission: Submission) -> list[str]:
    """Snapshot and submit; returns the lines to tell the user.

    Raises ConfigError for what preflight found, LaunchError if sbatch refuses, ChiarError if the run folder
    cannot be written.
    """
    raise_problems(submission.problems)
    run_dir, folder = submission.run_dir, submission.run_dir / "submit"
    recipe, script = folder / "recipe.yaml", folder / "pretrain.sbatch"
    version = {"chiar_megatron": __version__, "code": code_version(), "unix_seconds": time.time()}
    source = {"recipe": str(submission.recipe), "overrides": list(submission.overrides)}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_durably(recipe, dump_config(submission.config))
        write_durably(folder / "version.json", json.dumps({**version, **source}, indent=1))
        write_durably(script, submission.script(recipe, ()))
        lines, preparation = [], None
        if submission.unprepared:
            preparing = folder / "prepare.sbatch"
            write_durably(preparing, prepare_script(run_dir, submission.name, [recipe], submission.cluster))
            preparation = submit_script(preparing, ())
            lines.append(f"job {preparation} prepares the data on CPUs: {run_dir}/prepare-{preparation}.out")
        note_preparation(run_dir, run_dir, preparation)
    except OSError as error:
        raise ChiarError(f"run_dir {run_dir} cannot be written: {error}; choose another") from None
    job = submit_training(script, preparation)
    write_durably(run_dir / JOB_FILE, f"{job}\n")
    placement = submission.placement
    return [
        *lines,
        f"job {job}: {placement.nodes} node(s) x {placement.tasks_per_node} task(s), run folder {run_dir}",
        f"watch   squeue -j {job}; tail -f {run_dir}/slurm-{job}.out; {run_dir}/metrics.jsonl",
        f"stop    touch {run_dir}/STOP (saves first); scancel {job} saves too if SLURM's KillWait allows",
    ]
