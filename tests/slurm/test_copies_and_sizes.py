"""Two copies of one run at a time, fewer nodes than before, sites without requeue, runs that keep failing."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.parallel.tiny_run import Sections, losses, records, step_folder
from tests.slurm.cluster_run import STEPS, ClusterRun, cluster_run, end_job, same_as
from tests.slurm.mini_cluster import MiniCluster, alive
from tests.slurm.test_fleet import status

pytestmark = pytest.mark.timeout(900)  # the cluster and the calm run count for whoever needs them first


def test_a_partitioned_copy_gives_way_and_mixes_nothing(
    cluster: MiniCluster, calm: ClusterRun, data: Path, tmp_path: Path
) -> None:
    """The job's nodes are cut off from SLURM, which starts it elsewhere while the old ranks train on."""
    run = cluster_run(cluster, tmp_path, data)
    cut_off: list[str] = []
    try:
        run.submit("--nodes", "2")
        run.wait_for_steps(4)
        cut_off = run.nodes()
        for node in cut_off:
            cluster.partition(node)
        old = [rank for node in cut_off for rank in run.ranks_on(node)]
        assert len(old) == 4
        for node in cut_off:
            cluster.command("scontrol", "update", f"nodename={node}", "state=down", "reason=partition")
        lines = run.lines()
        run.wait_until(lambda: run.lines() > lines, "still training, cut off")
        run.wait_until(lambda: len(run.attempts("begin")) == 2, "started elsewhere")
        # Nobody can end the old ranks; they learn of the newer attempt from the run folder.
        run.wait_until(lambda: not any(map(alive, old)), "given way")
        for node in cut_off:
            cluster.heal(node)  # and the old batch script goes on
        run.finish()
    finally:
        for node in cut_off:
            cluster.heal(node)
        end_job(cluster, run.job)
    same_as(run, calm)
    begins = run.attempts("begin")
    assert [(b["attempt"], b["job"], b["restart"]) for b in begins] == [(1, run.job, 0), (2, run.job, 1)]
    assert [end["reason"] for end in run.attempts()] == ["lost with its node", "done"]
    resumed = [record["step"] for record in records(run.run_dir, "events") if record["event"] == "resume"]
    assert len(resumed) == 1
    assert list((run.run_dir / "attempts").iterdir()) == [run.run_dir / "attempts" / "000002"]


def test_an_elastic_run_goes_on_with_what_is_left(cluster: MiniCluster, data: Path, tmp_path: Path) -> None:
    cluster.wait_until_idle()
    plain = {"model": {"dropout": 0.0}}  # its masks are those of a layout
    calm = cluster_run(cluster, tmp_path / "calm", data, plain)
    calm.submit("--nodes", "2")
    calm.finish()
    run = cluster_run(cluster, tmp_path / "elastic", data, plain)
    nodes: list[str] = []
    cluster.command("scontrol", "update", "nodename=n[2-3]", "state=drain", "reason=no spare")
    try:
        run.submit("--nodes", "2", elastic=True)
        run.wait_for_steps(4)
        nodes = run.nodes()
        assert nodes == ["n0", "n1"]
        cluster.crash("n0")
        run.wait_until(lambda: len(run.attempts("begin")) == 2, "started on one node")
        assert run.nodes() == ["n1"]
        run.finish()
    finally:
        end_job(cluster, run.job)
        if nodes:
            cluster.bring_up("n0")
        cluster.command("scontrol", "update", "nodename=n[2-3]", "state=resume")
    resume = next(r["step"] for r in records(run.run_dir, "events") if r["event"] == "resume")
    found, expected = losses(run.run_dir), losses(calm.run_dir)
    assert found.keys() == expected.keys() == set(range(1, STEPS + 1))
    for step in range(1, resume + 1):
        assert found[step] == expected[step]
    # The same weights and samples in another order of additions; then the weights drift apart by rounding.
    assert abs(found[resume + 1][0] - expected[resume + 1][0]) < 1e-5
    assert max(abs(found[s][0] - expected[s][0]) for s in range(resume + 1, resume + 6)) < 1e-4
    output = "".join(path.read_text() for path in run.run_dir.glob("slurm-*.out"))
    assert "tensor 2, pipeline 1, data 2" in output and "tensor 2, pipeline 1, data 1" in output


def test_a_successor_is_submitted_where_requeue_is_forbidden(
    cluster: MiniCluster, calm: ClusterRun, data: Path, tmp_path: Path
) -> None:
    run = cluster_run(cluster, tmp_path, data)
    jobs: list[str] = []
    try:
        jobs.append(run.submit("--nodes", "2", requeue=False) and run.job)
        run.wait_for_steps(4)
        assert cluster.job(run.job)["Requeue"] == "0"
        cluster.command("scancel", "--signal=USR1", run.job)
        run.wait_until(lambda: len(run.attempts("begin")) == 2, "a successor")
        run.job = run.attempts("begin")[1]["job"]
        jobs.append(run.job)
        run.finish()
    finally:
        for job in jobs:
            end_job(cluster, job)
    assert len(set(jobs)) == 2 and [end["reason"] for end in run.attempts()] == ["signal", "done"]
    same_as(run, calm)


def test_a_user_stops_it(cluster: MiniCluster, calm: ClusterRun, data: Path, tmp_path: Path) -> None:
    """By the stop file, goes on by a second submission, and by scancel; each time it is saved."""
    one_rank: Sections = {"parallel": {"tensor_model_parallel_size": 1}, "training": {"steps": 5000}}
    run = cluster_run(cluster, tmp_path, data, one_rank)
    try:
        run.submit("--nodes", "1", gpus_per_node=1)
        run.wait_for_steps(2)
        (run.run_dir / "STOP").touch()
        cluster.wait_for(run.job, "FAILED")  # not done
        run.submit("--nodes", "1", gpus_per_node=1)
        run.wait_for_steps(2)
        cluster.command("scancel", run.job)
        run.wait_until(lambda: len(run.attempts()) == 2, "ended")
    finally:
        end_job(cluster, run.job)
    ends = run.attempts()
    assert [end["reason"] for end in ends] == ["stop file", "scancel"]
    assert not (run.run_dir / "STOP").exists()
    assert step_folder(run.run_dir, ends[1]["step"]).is_dir()
    assert [r["step"] for r in records(run.run_dir, "events") if r["event"] == "resume"] == [ends[0]["step"]]
    assert losses(run.run_dir).keys() == set(range(1, ends[1]["step"] + 1))


def test_a_run_that_keeps_failing_stops(cluster: MiniCluster, data: Path, tmp_path: Path) -> None:
    """Its Python cannot start a rank; no allocation is burnt on it for ever."""
    run = cluster_run(cluster, tmp_path, data)
    python = tmp_path / "python"
    real = f'exec "{sys.executable}" "$@"'
    python.write_text(f'#!/bin/bash\n[ "$3" = pretrain ] && exit 3\n{real}\n')
    python.chmod(0o755)
    try:
        run.submit("--nodes", "1", python=str(python), max_tries=2)
        facts = cluster.wait_for(run.job, "FAILED")
    finally:
        end_job(cluster, run.job)
    assert facts["Restarts"] == "1"
    assert [(end["reason"], end["step"]) for end in run.attempts()] == [("failure", 0)] * 2
    assert "2 attempts in a row failed after step 0" in run.output()


def test_what_keeps_a_run_from_beginning_is_told(cluster: MiniCluster, data: Path, tmp_path: Path) -> None:
    """sbatch refuses, and leaves no job; then the preparation job fails, and ends the run's."""
    run = cluster_run(cluster, tmp_path, data, {"data": {"cache_dir": str(tmp_path / "none")}})
    refused = r"chiar: sbatch refused .*; job \d+, which prepares the data, is cancelled too\n?$"
    with pytest.raises(AssertionError, match=refused):
        run.submit("--nodes", "1", sbatch=["--bogus"])
    cluster.wait_until_idle()
    assert cluster.command("squeue", "-h") == ""
    assert [row["state"] for row in status(cluster, run.run_dir)] == ["not submitted"]
    python = tmp_path / "python"
    python.write_text(f'#!/bin/bash\n[ "$3" = prepare ] && exit 3\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    try:
        run.submit("--nodes", "1", python=str(python))
        cluster.wait_for(run.job, "CANCELLED")
    finally:
        end_job(cluster, run.job)
    (row,) = status(cluster, run.run_dir)
    job = run.told.partition("\njob ")[2].partition(" prepares")[0]
    assert (row["state"], row["last_exit"]) == ("failed", f"preparation job {job} (prepare-{job}.out)")


def test_a_rank_that_does_not_come_is_no_bad_input(cluster: MiniCluster, data: Path, tmp_path: Path) -> None:
    """A node where nothing starts costs an attempt, not the run."""
    run = cluster_run(cluster, tmp_path, data, {"runtime": {"start_timeout_seconds": 20.0}})
    python = tmp_path / "python"
    missing = '[ "$3.$SLURM_PROCID.${SLURM_RESTART_COUNT:-0}" = pretrain.1.0 ] && exit 0'
    python.write_text(f'#!/bin/bash\n{missing}\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    try:
        run.submit("--nodes", "2", python=str(python))
        second = run.nodes()[1]
        run.finish()
    finally:
        end_job(cluster, run.job)
    assert [(end["reason"], end["exit_code"]) for end in run.attempts()] == [("failure", 1), ("done", 0)]
    (log,) = run.run_dir.glob("slurm-*.out")
    assert f"rank 1 of 4 (came from {second} 1 of 2) did not appear within 20 s" in log.read_text()


def test_a_run_that_diverges_is_not_tried_again(cluster: MiniCluster, data: Path, tmp_path: Path) -> None:
    options: Sections = {
        "parallel": {"tensor_model_parallel_size": 1},
        "optimizer": {"lr": 1e30},
        "training": {"max_bad_steps": 4},
    }
    run = cluster_run(cluster, tmp_path, data, options)
    try:
        run.submit("--nodes", "1", gpus_per_node=1)
        facts = cluster.wait_for(run.job, "FAILED")
    finally:
        end_job(cluster, run.job)
    assert facts["Restarts"] == "0" and [end["reason"] for end in run.attempts()] == ["not finite"]
    assert "not finite in 4 steps in a row (training.max_bad_steps)" in run.output()
