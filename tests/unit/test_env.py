"""Who a process is, by the variables of each launcher, and which versions are refused."""

from __future__ import annotations

import socket

import pytest

from chiar_megatron.errors import LaunchError
from chiar_megatron.runtime.env import check_versions, host_names, read_process_env
from chiar_megatron.runtime.launch import free_port

TORCHRUN = {  # the last of two hosts of two
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "GROUP_RANK": "1",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29511",
}
ELASTIC = {"TORCHELASTIC_RUN_ID": "x", "GROUP_WORLD_SIZE": "2"}
SLURM_STEP = {
    "SLURM_JOB_ID": "61234",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "9",
    "SLURM_NTASKS": "10",
    "SLURM_STEP_NUM_TASKS": "10",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "2",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2),2",
    "SLURM_STEP_NODELIST": "gpu[007-008,11]",
    "SLURM_NODELIST": "gpu[001-011]",
}
# A batch script's own shell has ranks of its own kind, but no step.
SLURM_BATCH = {"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_LOCALID": "0"}
OPENMPI = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
MPICH = {"PMI_RANK": "1", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}


@pytest.mark.parametrize(
    ("variables", "launcher", "ranks", "master"),
    [
        ({}, "none", (0, 1, 0, 1, 0), "127.0.0.1:29500"),
        (TORCHRUN, "torchrun", (3, 4, 1, 2, 1), "127.0.0.1:29511"),
        (SLURM_STEP, "slurm", (9, 10, 1, 2, 2), "gpu007:21234"),
        ({**SLURM_STEP, "MASTER_ADDR": "a", "MASTER_PORT": "5"}, "slurm", (9, 10, 1, 2, 2), "a:5"),
        ({**SLURM_STEP, **TORCHRUN, **ELASTIC}, "torchrun", (3, 4, 1, 2, 1), "127.0.0.1:29511"),
        # A script that exports what SLURM says in torchrun's words.
        (
            {**SLURM_STEP, **TORCHRUN, "RANK": "9", "WORLD_SIZE": "10"},
            "torchrun",
            (9, 10, 1, 2, 1),
            "127.0.0.1:29511",
        ),
        (SLURM_BATCH, "none", (0, 1, 0, 1, 0), "127.0.0.1:29500"),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8"}, "none", (0, 1, 0, 1, 0), "127.0.0.1:29500"),
        ({**SLURM_STEP, "SLURM_STEP_NUM_TASKS": "1"}, "none", (0, 1, 0, 1, 0), "127.0.0.1:29500"),
        (OPENMPI, "openmpi", (1, 2, 1, 2, 0), "127.0.0.1:29500"),
        ({**OPENMPI, "PMIX_NAMESPACE": "1525415937"}, "openmpi", (1, 2, 1, 2, 0), "127.0.0.1:31937"),
        ({**OPENMPI, **SLURM_BATCH, "MASTER_PORT": "77"}, "openmpi", (1, 2, 1, 2, 0), "127.0.0.1:77"),
        ({**MPICH, "MASTER_ADDR": "host1"}, "mpich", (1, 4, 1, 2, 0), "host1:29500"),
        # srun --mpi=pmi2 sets both; SLURM knows the local ranks.
        ({**SLURM_STEP, "PMI_RANK": "9", "PMI_SIZE": "10"}, "slurm", (9, 10, 1, 2, 2), "gpu007:21234"),
        # mpiexec inside a job starts one proxy a host through srun.
        ({**MPICH, **SLURM_STEP, "SLURM_PROCID": "0"}, "mpich", (1, 4, 1, 2, 0), "gpu007:21234"),
    ],
)
def test_launchers_variables_are_read(variables, launcher, ranks, master):
    env = read_process_env(variables)
    assert env.launcher == launcher
    assert (env.rank, env.world_size, env.local_rank, env.local_world_size, env.node_rank) == ranks
    assert f"{env.master_addr}:{env.master_port}" == master
    assert env.host == socket.gethostname()


def test_suggested_ports_are_never_those_of_outgoing_connections():
    """Any program's connection may hold one of Linux's 32768 to 60999 (`ip_local_port_range`)."""
    for job in ("11999", "12000", "19999", "4294967295"):
        mpi = read_process_env({**OPENMPI, "PMIX_NAMESPACE": job})
        slurm = read_process_env({**SLURM_STEP, "SLURM_JOB_ID": job})
        assert 20000 <= mpi.master_port == slurm.master_port < 32768
    assert all(20000 <= free_port() < 32768 for _ in range(20))


@pytest.mark.parametrize(
    ("variables", "named"),
    [
        ({"RANK": "0"}, ["WORLD_SIZE is not set"]),
        ({**TORCHRUN, "RANK": "4"}, ["RANK=4", "WORLD_SIZE=4", "contradict"]),
        ({**TORCHRUN, "LOCAL_RANK": "2"}, ["LOCAL_RANK=2", "LOCAL_WORLD_SIZE=2"]),
        ({**TORCHRUN, "WORLD_SIZE": "two"}, ["WORLD_SIZE='two' is no number"]),
        ({**TORCHRUN, "MASTER_PORT": "99999"}, ["MASTER_PORT=99999"]),
        ({**TORCHRUN, "MASTER_ADDR": ""}, ["MASTER_ADDR is not set"]),
        ({**SLURM_STEP, "SLURM_PROCID": "10"}, ["SLURM_PROCID=10", "SLURM_STEP_NUM_TASKS=10"]),
        ({**SLURM_STEP, "SLURM_NODEID": "3"}, ["SLURM_NODEID=3", "4(x2),2"]),
        ({**SLURM_STEP, "SLURM_STEP_NODELIST": "gpu[1"}, ["SLURM_STEP_NODELIST='gpu[1'", "srun"]),
        # One host's torchrun started ten times, and variables left over from another launch.
        ({**SLURM_STEP, **TORCHRUN, **ELASTIC, "GROUP_WORLD_SIZE": "1"}, ["SLURM_PROCID=9", "--nnodes=10"]),
        ({**SLURM_STEP, **TORCHRUN}, ["RANK=3 WORLD_SIZE=4", "SLURM_PROCID=9 SLURM_STEP_NUM_TASKS=10"]),
        ({**OPENMPI, **TORCHRUN}, ["RANK=3", "OMPI_COMM_WORLD_RANK=1 OMPI_COMM_WORLD_SIZE=2", "Unset"]),
        (MPICH, ["PMI_SIZE=4", "MPI_LOCALNRANKS=2", "MASTER_ADDR"]),
    ],
)
def test_contradicting_variables_are_named(variables, named):
    with pytest.raises(LaunchError) as error:
        read_process_env(variables)
    for text in named:
        assert text in str(error.value)
    assert "\n" not in str(error.value)


def test_slurm_restarts_and_jobs_never_share_a_name():
    again = {**SLURM_STEP, "SLURM_RESTART_COUNT": "1"}
    jobs = [read_process_env(variables).job for variables in (SLURM_STEP, again)]
    assert jobs == ["slurm/61234.0/0", "slurm/61234.0/1"]


@pytest.mark.parametrize(
    ("node_list", "hosts"),
    [
        ("n1", "n1"),
        ("n1,n2", "n1 n2"),
        ("gpu[003-005,9],login", "gpu003 gpu004 gpu005 gpu9 login"),
        ("gpu[12,14]", "gpu12 gpu14"),
        ("r[1-2]-node[09-10].site", "r1-node09.site r1-node10.site r2-node09.site r2-node10.site"),
        ("a-b-1,c[1-2]", "a-b-1 c1 c2"),
    ],
)
def test_hosts_of_a_slurm_node_list(node_list, hosts):
    assert host_names(node_list) == hosts.split()


def test_slurm_tells_how_many_tasks_each_host_has():
    env = read_process_env({**SLURM_STEP, "SLURMD_NODENAME": "gpu11"})
    assert env.hosts == (("gpu007", 4), ("gpu008", 4), ("gpu11", 2)) and env.host == "gpu11"


GOOD = {"python": "3.12.1", "torch": "2.13.0+cpu", "megatron-core": "0.16.1"}


def test_versions():
    check_versions()  # those installed here
    check_versions({**GOOD, "torch": "2.11.0a0+git"})
    for name, wrong in [
        ("python", "3.9.18"),
        ("torch", "2.10.1"),
        ("torch", "2.14.0"),
        ("torch", "missing"),
        ("megatron-core", "0.16.0"),
        ("megatron-core", "missing"),
    ]:
        with pytest.raises(LaunchError, match=f"{name} {wrong}".replace("python", "Python")) as error:
            check_versions({**GOOD, name: wrong})
        assert "\n" not in str(error.value)
