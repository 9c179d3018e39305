"""The cluster that other tests stand on: it runs steps, loses a node, gets it back, and leaves nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.slurm.mini_cluster import REPOSITORY, MiniCluster, processes_of


def test_a_step_runs_on_all_nodes_and_a_job_survives_a_crash(cluster: MiniCluster, tmp_path: Path) -> None:
    script = tmp_path / "job.sh"
    script.write_text(
        f"#!/bin/bash\nsrun --ntasks-per-node=1 hostname > {tmp_path}/hosts.$SLURM_RESTART_COUNT\n"
        f"srun -N1 -n1 getent hosts n3 > {tmp_path}/address\n"
        f'[ -n "$SLURM_RESTART_COUNT" ] || sleep 300\n'
    )
    job = cluster.sbatch("-N2", "--requeue", f"--output={tmp_path}/out", script)
    cluster.wait_for(job, "RUNNING")
    deadline = time.monotonic() + 30
    while not (tmp_path / "address").exists() or not (tmp_path / "address").read_text():
        assert time.monotonic() < deadline, (tmp_path / "out").read_text()
        time.sleep(0.1)
    assert len((tmp_path / "hosts.").read_text().split()) == 2
    assert "127.0.0.1" in (tmp_path / "address").read_text()
    nodes = cluster.command("scontrol", "show", "hostnames", cluster.job(job)["NodeList"]).split()
    cluster.crash(nodes[1], noticed=False)
    assert not list(processes_of(cluster.environment["SLURM_CONF"], nodes[1]))
    facts = cluster.wait_for(job, "COMPLETED")
    assert facts["Restarts"] == "1" and nodes[1] not in facts["NodeList"]
    assert len((tmp_path / "hosts.1").read_text().split()) == 2
    cluster.bring_up(nodes[1])
    cluster.wait_until_idle()


def test_a_killed_test_run_leaves_no_daemon(cluster: MiniCluster, tmp_path: Path) -> None:
    folder = tmp_path / "second"
    folder.mkdir()
    code = (
        "import sys, time; from pathlib import Path; from tests.slurm.mini_cluster import MiniCluster\n"
        "cluster = MiniCluster(Path(sys.argv[1]), nodes=1); cluster.start()\n"
        "cluster.sbatch('--wrap=sleep 300', '--output=/dev/null'); print('up', flush=True); time.sleep(300)"
    )
    command = [sys.executable, "-c", code, str(folder)]
    running = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, start_new_session=True)
    assert running.stdout is not None and running.stdout.readline() == b"up\n"
    os.killpg(running.pid, signal.SIGKILL)
    running.wait()
    deadline = time.monotonic() + 20
    while list(processes_of(str(folder / "slurm.conf"))):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert cluster.idle() == len(cluster.nodes)
