"""Launchers inside a job, a hang on the cluster, and job arrays that lose tasks and finish."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from chiar_megatron.data.preprocess import preprocess
from chiar_megatron.data.tokenizer import train_tokenizer
from tests.parallel.launch_probe import check_answers
from tests.parallel.tiny_run import Sections, losses, recipe, write_recipe
from tests.slurm.cluster_run import SITE, ClusterRun, cluster_run, end_job
from tests.slurm.mini_cluster import REPOSITORY, MiniCluster

SUFFIXES = (".bin", ".idx", ".json")


@pytest.mark.timeout(400)
def test_srun_torchrun_and_mpirun_in_a_job(cluster: MiniCluster, tmp_path: Path) -> None:
    """The same programs, one rank on each of two nodes, by every launcher."""
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"line {n} of text, and {n * n} more" for n in range(40_000)))
    model = train_tokenizer([text], 300, tmp_path / "model")
    preprocess([text], model, tmp_path / "alone")
    for name in ("srun", "torchrun", "pmix", "mpirun"):
        (tmp_path / name).mkdir()
    probe = "-m tests.parallel.launch_probe"
    chiar = (
        f"-m chiar_megatron.cli preprocess --input {text} --tokenizer {model} --workers 1 --output {tmp_path}"
    )
    torchrun = "srun {python} -m torch.distributed.run --nproc-per-node=1"
    meeting = '--nnodes=2 --rdzv-backend=c10d --rdzv-endpoint="$first:$((21000 + SLURM_JOB_ID % 9000))"'
    as_root = "--allow-run-as-root --bind-to none -n 2"
    lines = [
        "#!/bin/bash",
        f"export OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES= PYTHONPATH={REPOSITORY}",
        "first=$(scontrol show hostnames | head -n 1)",
        f"srun {{python}} {probe} {tmp_path}/srun || exit",
        f"srun {{python}} {chiar}/by_srun || exit",
        f"{torchrun} {meeting} {probe} {tmp_path}/torchrun || exit",
        f"{torchrun} {probe} {tmp_path}/torchrun && exit 1",  # two runs of one rank each, it would be
    ]
    plugins = subprocess.run(["srun", "--mpi=list"], env=cluster.environment, capture_output=True, text=True)
    if has_pmix := "pmix" in plugins.stdout + plugins.stderr:
        lines += [
            f"srun --mpi=pmix {{python}} {probe} {tmp_path}/pmix || exit",
            f"srun --mpi=pmix {{python}} {chiar}/by_pmix || exit",
        ]
    if shutil.which("mpirun") is not None:
        lines += [
            f"mpirun {as_root} {{python}} {probe} {tmp_path}/mpirun || exit",
            f"mpirun {as_root} {{python}} {chiar}/by_mpirun || exit",
        ]
    script = tmp_path / "job.sh"
    script.write_text("\n".join(lines).replace("{python}", sys.executable) + "\nexit 0\n")
    job = cluster.sbatch("-N2", "--ntasks-per-node=1", "--no-requeue", f"--output={tmp_path}/out", script)
    try:
        cluster.wait_for(job, "COMPLETED", "FAILED", seconds=300)
    finally:
        end_job(cluster, job)
    said = (tmp_path / "out").read_text()
    assert cluster.job(job)["JobState"] == "COMPLETED", said
    nodes = [answer["host"] for answer in check_answers(tmp_path / "srun", "slurm", 2)]
    assert len(set(nodes)) == 2 and set(nodes) <= set(cluster.nodes)
    check_answers(tmp_path / "torchrun", "torchrun", 2)
    assert "Give torchrun --nnodes=2" in said
    ways = ["by_srun"]
    if has_pmix:
        check_answers(tmp_path / "pmix", "slurm", 2)
        ways.append("by_pmix")
    if shutil.which("mpirun") is not None:
        check_answers(tmp_path / "mpirun", "openmpi", 2)
        ways.append("by_mpirun")
    for name in ways:
        for suffix in SUFFIXES:
            expected = Path(f"{tmp_path}/alone{suffix}").read_bytes()
            assert Path(f"{tmp_path}/{name}{suffix}").read_bytes() == expected, (name, suffix)


@pytest.mark.timeout(400)
def test_a_hang_is_told_and_tried_again(cluster: MiniCluster, data: Path, tmp_path: Path) -> None:
    options: Sections = {"runtime": {"hang_seconds": 6.0}, "training": {"steps": 60}}
    run = cluster_run(cluster, tmp_path, data, options)
    try:
        run.submit("--nodes", "2")
        run.wait_for_steps(4)
        second = run.nodes()[1]
        victim = run.ranks_on(second)[0]
        victim.send_signal(signal.SIGSTOP)
        run.wait_until(lambda: (run.run_dir / "exit.json").exists(), "ended by its watchdogs")
        victim.kill()  # srun would, after a minute
        run.finish()
    finally:
        end_job(cluster, run.job)
    ends = run.attempts()
    assert [record["reason"] for record in ends] == ["hang", "done"], run.output()
    assert f" on {second} " in ends[0]["detail"] and "does not answer" in ends[0]["detail"]
    assert losses(run.run_dir).keys() == set(range(1, 61))
    (row,) = status(cluster, run.run_dir)
    assert (row["state"], row["step"], row["restarts"], row["job"]) == ("finished", 60, 1, run.job)
    goodput = json.loads((run.run_dir / "goodput.json").read_text())
    assert row["goodput"] == pytest.approx(goodput["goodput"], abs=1e-3)
    parts = goodput["useful_seconds"] + sum(goodput["lost_seconds"].values())
    assert parts == pytest.approx(goodput["allocated_seconds"], abs=0.1)
    told = [record["unix_seconds"] for event in ("begin", "end") for record in run.attempts(event)]
    spans = (told[2] - told[0]) + (told[3] - told[1])
    assert goodput["allocated_seconds"] == pytest.approx(spans, abs=0.1)


def status(cluster: MiniCluster, folder: Path) -> list[dict[str, object]]:
    """What `chiar status --json` says of a folder."""
    return list(json.loads(chiar(cluster, "status", "--json", str(folder))))


def chiar(cluster: MiniCluster, *arguments: str) -> str:
    """What the command line prints; it starts slowly where much else runs."""
    command = [sys.executable, "-m", "chiar_megatron.cli", *arguments]
    done = subprocess.run(
        command, env=cluster.environment, cwd=REPOSITORY, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.timeout(900)
def test_an_array_of_eight_with_two_failures_completes(
    cluster: MiniCluster, data: Path, tmp_path: Path
) -> None:
    sweep = tmp_path / "sweep"
    options: Sections = {
        "data": {"cache_dir": str(data / "cache")},
        "training": {"steps": 30},
        "checkpoint": {"save_interval_steps": 5},
    }
    path = write_recipe(tmp_path / "recipe.yaml", recipe(f"{data}/text", sweep, options))
    grid = {"product": {"optimizer.lr": [0.01, 0.02, 0.03, 0.04], "training.seed": [1, 2]}}
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(grid))
    # Tasks 2 and 7 lose a rank once, by kill -9, when some steps are done.
    injected = (
        'case "$SLURM_ARRAY_TASK_ID.$SLURM_RESTART_COUNT" in 2.|2.0|7.|7.0) '
        '(until [ "$(wc -l < "$RUN_DIR/metrics.jsonl")" -ge 8 ]; do sleep 0.1; done; '
        'pkill -9 -f "^/[^ ]*python.* pretrain $RUN_DIR/") 2>/dev/null & esac'
    )
    site = {**SITE, "gpus_per_node": 1, "setup": [*SITE["setup"], injected], "srun": []}
    (tmp_path / "cluster.yaml").write_text(yaml.safe_dump(site))
    options_ = [f"--grid={tmp_path}/grid.yaml", "--throttle=3", f"--cluster={tmp_path}/cluster.yaml"]
    submit = ["submit", str(path), *options_]
    told = chiar(cluster, *submit)
    job = told.partition("job ")[2].partition(":")[0]
    most = 0
    try:
        watched = ClusterRun(cluster, tmp_path / "watched", f"{data}/text")  # for what it can show
        watched.run_dir, watched.job = sweep, job

        def is_over() -> bool:
            nonlocal most
            listed = cluster.command("squeue", "-hr", "-t", "all", "-j", job, "-o", "%T", check=False).split()
            most = max(most, listed.count("RUNNING"))
            return len(listed) == 8 and set(listed) <= {"COMPLETED", "FAILED", "CANCELLED"}

        deadline = time.monotonic() + 450
        while not is_over():
            assert time.monotonic() < deadline, watched.output()
            time.sleep(0.3)
    finally:
        end_job(cluster, job)
    rows = status(cluster, sweep)
    assert [row["state"] for row in rows] == ["finished"] * 8, f"{rows}\n{watched.output()}"
    assert [row["restarts"] for row in rows] == [0, 0, 1, 0, 0, 0, 0, 1]
    assert {row["step"] for row in rows} == {30} and 1 <= most <= 3
    assert len({losses(Path(str(row["run"])))[30] for row in rows}) == 8
    again = chiar(cluster, *submit)
    assert "nothing to submit" in again and "is finished: left out" in again
