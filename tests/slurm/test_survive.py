"""A run whose layers are shared by two nodes is disturbed in every way, and ends as an undisturbed one."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.parallel.tiny_run import records
from tests.slurm.cluster_run import ClusterRun, cluster_run, end_job, same_as
from tests.slurm.mini_cluster import MiniCluster

pytestmark = pytest.mark.timeout(900)  # the cluster and the calm run count for whoever needs them first


def disturb(run: ClusterRun, how: str, node: int) -> None:
    """Do it to the running job, and wait until its next attempt has begun."""
    cluster, begun = run.cluster, len(run.attempts("begin"))
    run.wait_for_steps(4)
    nodes = run.nodes()
    if how == "crash":
        cluster.crash(nodes[node])
    elif how == "preempt":
        end = cluster.sbatch("-p", "urgent", "-N4", "--exclusive", "--wrap=sleep 1", "--output=/dev/null")
    elif how == "requeue":
        cluster.command("scontrol", "requeue", run.job)
    else:
        cluster.command("scancel", f"--signal={how}", run.job)
    run.wait_until(lambda: len(run.attempts("begin")) > begun, f"started again after {how}")
    if how == "crash":
        cluster.bring_up(nodes[node])
    elif how == "preempt":
        cluster.wait_for(end, "COMPLETED")


def test_every_disturbance_is_told_and_leaves_no_trace(
    cluster: MiniCluster, calm: ClusterRun, data: Path, tmp_path: Path
) -> None:
    run = cluster_run(cluster, tmp_path, data, {"logging": {"wandb_project": "m", "wandb_mode": "offline"}})
    ways = [
        ("crash", 1, "node failure"),
        ("preempt", 0, "preemption"),
        ("requeue", 0, "requeue"),
        ("USR1", 0, "signal"),
    ]
    try:
        told = run.submit("--nodes", "2")
        assert "prepares the data" in calm.told and "prepares the data" not in told
        with pytest.raises(
            AssertionError, match=rf"run_dir: job {run.job} is \w+ for it; wait, or `scancel`"
        ):
            run.submit("--nodes", "2")
        for how, node, _ in ways:
            disturb(run, how, node)
        run.finish()
    finally:
        end_job(cluster, run.job)
    assert [record["reason"] for record in run.attempts()] == [*(reason for *_, reason in ways), "done"]
    assert [record["attempt"] for record in run.attempts("begin")] == [1, 2, 3, 4, 5]
    same_as(run, calm)
    # A node that is lost costs steps, but all others had time to save.
    resumed: list[Any] = [r["step"] for r in records(run.run_dir, "events") if r["event"] == "resume"]
    stopped = [record["step"] for record in run.attempts()][:-1]
    assert resumed[1:] == stopped[1:] and resumed[0] <= stopped[0]
    # Two nodes share each layer, and wandb's run is one.
    assert "tensor-parallel" in told
    assert len({path.name.rpartition("-")[2] for path in (run.run_dir / "wandb").glob("offline-run-*")}) == 1


def stands_still(rank: psutil.Process) -> bool:
    """Whether it is suspended."""
    try:
        return bool(rank.status() == psutil.STATUS_STOPPED)
    except psutil.NoSuchProcess:
        return False


@pytest.mark.long
def test_its_time_limit(cluster: MiniCluster, calm: ClusterRun, data: Path, tmp_path: Path) -> None:
    """SLURM counts limits in minutes, the run takes seconds: it is suspended until SLURM, which wakes whom it
    signals, tells it to save."""
    run = cluster_run(cluster, tmp_path, data)
    try:
        run.submit("--nodes", "2", time="2:00", signal_seconds=60)
        run.wait_for_steps(4)
        ranks = [rank for node in run.nodes() for rank in run.ranks_on(node)]
        assert len(ranks) == 4
        for rank in ranks:
            rank.suspend()
        run.wait_until(lambda: all(map(stands_still, ranks)), "suspended")
        run.wait_until(lambda: not any(map(stands_still, ranks)), "told to save")
        run.finish()
    finally:
        end_job(cluster, run.job)
    reasons = [record["reason"] for record in run.attempts()]
    assert len(reasons) > 1 and reasons == ["time limit"] * (len(reasons) - 1) + ["done"]
    same_as(run, calm)


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_five_random_kills(cluster: MiniCluster, calm: ClusterRun, data: Path, tmp_path: Path) -> None:
    dice = random.Random(20261127)
    run = cluster_run(cluster, tmp_path, data)
    try:
        run.submit("--nodes", "2")
        for _ in range(5):
            disturb(run, "crash", dice.randrange(2))
        run.finish()
    finally:
        end_job(cluster, run.job)
    same_as(run, calm)
    reasons = [record["reason"] for record in run.attempts()]
    assert reasons[-1] == "done" and set(reasons[:-1]) <= {"node failure", "lost with its node"}
