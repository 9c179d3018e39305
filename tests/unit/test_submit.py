"""`chiar submit --dry-run`, cluster.yaml, and what follows an attempt, by the command line and real files."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from chiar_megatron.cluster.attempts import LOST, Ending, begin_attempt, end_attempt
from chiar_megatron.cluster.placement import Placement, place, place_on, spread_warnings
from chiar_megatron.cluster.script import pretrain_script
from chiar_megatron.cluster.site import ClusterConfig, load_cluster
from chiar_megatron.config.load import config_from_dict
from chiar_megatron.config.schema import RunConfig
from chiar_megatron.errors import ChiarError, ConfigError
from chiar_megatron.runtime.env import read_process_env

RECIPE = "run_dir: run\nmodel: {hidden_size: 32, vocab_size: 97}\ndata: {train: [text], eod_token: 0}\n"

RUNNING = "JobState=RUNNING StartTime=2000-12-31T00:00:00 EndTime="
# What scontrol says of a job that scancel or its time limit is ending.
ENDING = "JobState=COMPLETING StartTime=2026-01-01T00:00:00 TimeLimit=00:10:00 EndTime=2026-01-01T"


def chiar(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "chiar_megatron.cli", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)


def test_a_dry_run_prints_a_shell_script_and_writes_nothing(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(RECIPE)
    (tmp_path / "cluster.yaml").write_text(
        "partition: gpu\ngpus_per_node: 4\nmodules: [cuda]\nenvironment: {NCCL_IB_HCA: mlx5}\n"
    )
    shown = chiar(tmp_path, "submit", "r.yaml", "--dry-run", "training.steps=7")
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.startswith("#!/bin/bash\n") and "warning: data.train" in shown.stderr
    for line in ("#SBATCH --partition=gpu", "#SBATCH --gres=gpu:1", "module load cuda"):
        assert line in shown.stdout.splitlines()
    assert "PRETRAIN=(pretrain r.yaml training.steps=7)" in shown.stdout
    checked = subprocess.run(["bash", "-n"], input=shown.stdout, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cluster.yaml", "r.yaml"]
    malformed = chiar(tmp_path, "submit", "r.yaml", "model.hiden_size=3", "--dry-run")
    assert malformed.returncode == 2 and "hidden_size" in malformed.stderr and malformed.stdout == ""


def test_a_wrong_cluster_file_names_each_key(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("partitoin: gpu\ngpus_per_node: many\ntime: 1:30:00\n")
    with pytest.raises(ConfigError) as caught:
        load_cluster(path)
    text = str(caught.value)
    assert "nearest: partition" in text and "gpus_per_node: 'many' is not an integer" in text
    assert "quote it" in text


def test_a_variable_has_a_name_that_bash_takes(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text('environment: {"A B": x, "X;touch /tmp/PWN;Y": y, 1A: z, _A1: good}\n')
    with pytest.raises(ConfigError) as caught:
        load_cluster(tmp_path / "c.yaml")
    told = str(caught.value).splitlines()
    assert len(told) == 3 and "environment: 'A B' is not a variable name" in told[0]


def write_exit(run_dir: Path, reason: str, number: int = 1) -> None:
    record = {"attempt": number, "reason": reason, "step": 5, "exit_code": 75}
    (run_dir / "exit.json").write_text(json.dumps(record))


@pytest.mark.parametrize(
    ("said", "facts", "verdict"),
    [
        ("done", "", "stop: done"),
        ("stop file", "", "stop: stop file"),
        ("not finite: loss", "", "stop: not finite"),
        ("hang: rank 1 on n1", "", "requeue: hang"),
        ("SIGTERM", "JobState=CANCELLED", "stop: scancel"),
        ("SIGTERM", "JobState=PREEMPTED", "requeue: preemption"),
        ("SIGTERM", "JobState=PREEMPTED Restarts=1", "wait: preemption"),
        ("SIGTERM", f"{ENDING}00:01:05", "stop: scancel"),
        ("SIGTERM", f"{ENDING}00:10:03", "requeue: time limit"),
        ("SIGTERM", f"{ENDING}00:10:03 Restarts=1", "wait: requeue"),
        ("error: gloo", "JobState=COMPLETING Restarts=1", "wait: requeue"),
        (
            "SIGUSR1",
            f"{RUNNING}2001-01-01T00:00:00",
            "requeue: time limit",
        ),
        (
            "SIGUSR1",
            f"Requeue=0 {RUNNING}2001-01-01T00:00:00",
            "resubmit: time limit",
        ),
        (
            "SIGUSR1",
            f"{RUNNING}2099-01-01T00:00:00",
            "requeue: signal",
        ),
    ],
)
def test_what_follows_an_attempt(tmp_path: Path, said: str, facts: str, verdict: str) -> None:
    number = begin_attempt(tmp_path, 3, {})
    write_exit(tmp_path, said)
    assert str(end_attempt(tmp_path, number, Ending(75, job_facts=facts), 3)) == verdict


def test_a_hang_in_one_place_is_tried_again_once(tmp_path: Path) -> None:
    for action in ("requeue", "stop"):
        number = begin_attempt(tmp_path, 5, {})
        write_exit(tmp_path, "hang: rank 1 on n1", number)
        assert end_attempt(tmp_path, number, Ending(1), 5).action == action


def test_failures_in_one_place_stop_the_run(tmp_path: Path) -> None:
    begin_attempt(tmp_path, 3, {})  # is lost
    assert begin_attempt(tmp_path, 3, {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1"}) == 2
    lines = [json.loads(line) for line in (tmp_path / "attempts.jsonl").read_text().splitlines()]
    assert [line.get("reason") for line in lines] == [None, LOST, None]
    assert end_attempt(tmp_path, 2, Ending(1), 3).action == "requeue"
    begin_attempt(tmp_path, 3, {})
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    assert end_attempt(tmp_path, 3, Ending(1), 3).action == "requeue"  # it got further
    for number in (4, 5):
        assert begin_attempt(tmp_path, 3, {}) == number
        (tmp_path / "metrics.jsonl").write_text("")  # no step of it was logged
        verdict = end_attempt(tmp_path, number, Ending(1), 3)
    assert verdict.action == "stop"
    with pytest.raises(ChiarError, match="3 attempts in a row failed after step 1 or before"):
        begin_attempt(tmp_path, 3, {})


@pytest.mark.parametrize(
    ("job", "restart", "action"),
    [("7", "1", "requeue"), ("7", "0", "stop"), ("8", "0", "stop"), (None, "0", "stop")],
)
def test_a_copy_that_gave_way_records_nothing(
    tmp_path: Path, job: str | None, restart: str, action: str
) -> None:
    """It goes on only if the other is an older start of its own job, which SLURM believes dead."""
    environ = {"SLURM_RESTART_COUNT": restart, **({"SLURM_JOB_ID": job} if job else {})}
    number = begin_attempt(tmp_path, 3, environ)
    begin_attempt(tmp_path, 3, {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "0"})
    before = (tmp_path / "attempts.jsonl").read_text()
    verdict = end_attempt(tmp_path, number, Ending(2), 3, environ)
    assert verdict.action == action and "attempt 1 gives way to attempt 2" in verdict.reason
    assert (tmp_path / "attempts.jsonl").read_text() == before


def recipe_of(**parallel: int | None) -> RunConfig:
    """Replicas of so many processes, a batch of 12 in micro-batches of 1."""
    training = {"global_batch_size": 12, "micro_batch_size": 1}
    return config_from_dict({"parallel": parallel, "training": training, "model": {"num_attention_heads": 4}})


@pytest.mark.parametrize(
    ("tensor", "nodes", "tasks", "placed"),
    [
        (2, 4, 2, (4, 2)),  # 4 replicas divide 12
        (2, 3, 2, (3, 2)),
        (2, 5, 2, (4, 2)),  # 5 do not, 4 fit on fewer nodes
        (1, 2, 4, (2, 3)),  # 8 do not; 6 on both nodes evenly
        (4, 3, 2, (2, 2)),  # a replica over two nodes; the third would not make another
        (1, 1, 5, (1, 4)),
    ],
)
def test_as_many_replicas_as_divide_the_batch(
    tensor: int, nodes: int, tasks: int, placed: tuple[int, int]
) -> None:
    found = place_on(recipe_of(tensor_model_parallel_size=tensor), nodes, tasks)
    assert (found.nodes, found.tasks_per_node) == placed


def test_elastic_needs_a_free_choice_of_replicas(tmp_path: Path) -> None:
    cluster = ClusterConfig(elastic=True, gpus_per_node=2)
    placement = place(recipe_of(tensor_model_parallel_size=4), cluster, 4)
    assert (placement.nodes, placement.tasks_per_node, placement.fewest_nodes) == (4, 2, 2)
    with pytest.raises(ConfigError, match="data_parallel_size 2: elastic .*leave it null"):
        place(recipe_of(data_parallel_size=2), cluster, 4)
    with pytest.raises(ConfigError, match=r"1 node\(s\) x 2 task\(s\) hold no replica of 4 processes"):
        place_on(recipe_of(tensor_model_parallel_size=4), 1, 2)
    (tmp_path / "c.yaml").write_text("elastic: true\nlauncher: torchrun\n")
    with pytest.raises(ConfigError, match="elastic: true needs launcher: srun"):
        load_cluster(tmp_path / "c.yaml")


def test_torchrun_meets_where_srun_would(tmp_path: Path) -> None:
    """At the port of the job's number, as `bash` makes it of the script."""
    cluster = ClusterConfig(launcher="torchrun", gpus_per_node=2)
    script = pretrain_script(tmp_path, "run", ["pretrain", "recipe.yaml"], cluster, Placement(2, 2))
    runner = next(line for line in script.splitlines() if "rdzv-endpoint" in line)
    lines = ["scontrol() { echo n7; }", "SLURM_JOB_ID=61234 PYTHON=python", runner, 'echo "${RUNNER[@]}"']
    done = subprocess.run(["bash", "-c", "\n".join(lines)], capture_output=True, text=True, timeout=60)
    step = {"SLURM_JOB_ID": "61234", "SLURM_STEP_ID": "0", "SLURM_PROCID": "0", "SLURM_NTASKS": "2"}
    step |= {"SLURM_LOCALID": "0", "SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_STEP_NODELIST": "n[7-8]"}
    env = read_process_env(step)
    assert f"--rdzv-endpoint={env.master_addr}:{env.master_port} " in done.stdout, done


def test_layers_that_wait_for_the_network_are_told() -> None:
    def told(tensor: int, nodes: int, tasks: int, *srun: str) -> list[str]:
        config, cluster = recipe_of(tensor_model_parallel_size=tensor), ClusterConfig(srun=srun)
        return spread_warnings(config, cluster, Placement(nodes, tasks))

    assert told(2, 2, 2) == told(4, 1, 4) == told(1, 4, 1, "--distribution=cyclic") == []
    assert "tensor-parallel ranks (4) lie on several nodes of 2 task(s)" in told(4, 2, 2)[0]
    assert len(told(2, 2, 2, "--distribution=cyclic")) == 1
