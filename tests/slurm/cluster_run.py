"""One run on the mini cluster: submitted by `chiar submit`, watched through its run folder."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Optional

import psutil
import yaml

from tests.parallel.tiny_run import Sections, losses, recipe, saved_state, write_recipe
from tests.slurm.mini_cluster import REPOSITORY, MiniCluster, processes_of

LIMIT_SECONDS = 240.0  # for anything that is waited for
SITE: dict[str, Any] = {
    "partition": "batch",
    "gpus_per_node": 2,
    "gpu_option": "none",
    "time": "10:00",
    "signal_seconds": 20,
    # Ranks 0 and 1 lie on two nodes, and so do the two halves of every tensor-parallel layer.
    "srun": ["--distribution=cyclic"],
    # All nodes are one host here: attempts that live at the same time need ports of their own.
    "setup": ["export MASTER_PORT=$((12000 + (7 * SLURM_JOB_ID + ${SLURM_RESTART_COUNT:-0}) % 8000))"],
    "environment": {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(REPOSITORY)},
}


STEPS = 90
OPTIONS: Sections = {
    "training": {"steps": STEPS},
    "checkpoint": {"save_interval_steps": 3, "keep_last": 2},
    "parallel": {"tensor_model_parallel_size": 2},
    "runtime": {"device": "cpu", "threads_per_process": 1, "collective_timeout_seconds": 240.0},
}


class ClusterRun:
    """A recipe with its site settings, and the job that it became."""

    def __init__(self, cluster: MiniCluster, folder: Path, prefix: str, *parts: Sections) -> None:
        self.cluster = cluster
        self.folder = folder
        self.run_dir = folder / "a run"
        folder.mkdir(parents=True, exist_ok=True)
        self.recipe = write_recipe(folder / "recipe.yaml", recipe(prefix, self.run_dir, *parts))
        self.job, self.told = "", ""

    def submit(self, *options: str, **site: Any) -> str:
        """`chiar submit`; keeps the training job's id, and returns what was printed."""
        settings = self.folder / "cluster.yaml"
        settings.write_text(yaml.safe_dump({**SITE, **site}))
        command = [sys.executable, "-m", "chiar_megatron.cli", "submit", str(self.recipe), *options]
        self.told = self.cluster.command(*command, f"--cluster={settings}", cwd=REPOSITORY)
        self.job = self.told.rpartition("\njob ")[2].partition(":")[0]
        return self.told

    def lines(self, name: str = "metrics") -> int:
        """Finished lines of a record so far."""
        path = self.run_dir / f"{name}.jsonl"
        return path.read_bytes().count(b"\n") if path.exists() else 0

    def attempts(self, event: str = "end") -> list[dict[str, Any]]:
        """Lines of `attempts.jsonl`."""
        path = self.run_dir / "attempts.jsonl"
        records = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return [record for record in records if record["event"] == event]

    def wait_until(self, condition: Callable[[], bool], what: str) -> None:
        """Look often; fails, with what the job wrote, when the time is up."""
        deadline = time.monotonic() + LIMIT_SECONDS
        while not condition():
            assert time.monotonic() < deadline, f"not {what} after {LIMIT_SECONDS:g} s\n{self.output()}"
            time.sleep(0.05)

    def wait_for_steps(self, count: int) -> None:
        """Until so many more steps of the present attempt have been logged."""
        self.wait_until(lambda: self.starts() >= len(self.attempts("begin")) > 0, "started")
        steps = self.lines() + count
        self.wait_until(lambda: self.lines() >= steps, f"at step {steps}")

    def starts(self) -> int:
        """How often ranks have started or resumed."""
        path = self.run_dir / "events.jsonl"
        kinds = [json.loads(line)["event"] for line in path.read_text().splitlines()] if path.exists() else []
        return sum(kind in ("start", "resume") for kind in kinds)

    def nodes(self) -> list[str]:
        """Of the running job; the batch script's first."""
        node_list = self.cluster.wait_for(self.job, "RUNNING")["NodeList"]
        return self.cluster.command("scontrol", "show", "hostnames", node_list).split()

    def ranks_on(self, node: str) -> list[psutil.Process]:
        """Living ranks of a node."""
        found = []
        for process in processes_of(self.cluster.environment["SLURM_CONF"], node):
            with suppress(psutil.Error):
                if "pretrain" in process.cmdline() and process.name().startswith("python"):
                    found.append(process)
        return found

    def finish(self) -> dict[str, str]:
        """Wait until the job has come to its end."""
        return self.cluster.wait_for(self.job, "COMPLETED", seconds=LIMIT_SECONDS)

    def output(self) -> str:
        """What scripts and ranks have printed, and what SLURM says of the job."""
        logs = [path.read_text()[-5000:] for path in self.run_dir.glob("slurm-*.out")]
        shown = subprocess.run(
            ["scontrol", "show", "job", self.job or "0"],
            env=self.cluster.environment,
            capture_output=True,
            text=True,
        )
        return "\n".join([*logs, shown.stdout])


def end_job(cluster: MiniCluster, job: Optional[str]) -> None:
    """Cancel what is left of a job; of all, where its number was not told."""
    which = job or "--user=root"
    cluster.command("scancel", "--signal=KILL", "--full", which, check=False)
    cluster.command("scancel", which, check=False)


def cluster_run(cluster: MiniCluster, folder: Path, data: Path, *parts: Sections) -> ClusterRun:
    """A run of two nodes with two tasks each."""
    cached: Sections = {"data": {"cache_dir": str(data / "cache"), "train": [f"{data}/text"], "eod_token": 0}}
    return ClusterRun(cluster, folder, f"{data}/text", OPTIONS, cached, *parts)


def same_as(run: ClusterRun, calm: ClusterRun) -> None:
    """Losses, gradient norms and the last checkpoint's bytes are equal; every step is there once."""
    assert losses(run.run_dir) == losses(calm.run_dir)
    assert losses(run.run_dir).keys() == set(range(1, STEPS + 1))
    assert saved_state(run.run_dir, STEPS) == saved_state(calm.run_dir, STEPS)
