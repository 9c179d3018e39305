"""Who this process is, from the variables of torchrun, SLURM or MPI, and whether versions were tested."""

from __future__ import annotations

import importlib.metadata
import os
import re
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Optional

from chiar_megatron.errors import LaunchError

PYTHON_MIN = (3, 10)
TORCH_MIN, TORCH_END = (2, 11), (2, 14)
MEGATRON_CORE = "0.16.1"

DEFAULT_PORT = 29500  # torchrun's own
SLURM_PORTS = range(20000, 40000)  # jobs that share a host get different ports by their job id

Launcher = Literal["torchrun", "slurm", "openmpi", "mpich", "none"]


@dataclass(frozen=True)
class ProcessEnv:
    """One process's place among the processes of its launch."""

    rank: int = 0
    """Number of this process, 0 to world_size - 1."""

    world_size: int = 1
    """Processes of the launch, over all hosts."""

    local_rank: int = 0
    """Number of this process on its host."""

    local_world_size: int = 1
    """Processes of the launch on this host."""

    node_rank: int = 0
    """Number of this host."""

    host: str = "localhost"
    """Name of this host."""

    master_addr: str = "127.0.0.1"
    """Host of rank 0."""

    master_port: int = DEFAULT_PORT
    """TCP port of the rendezvous store."""

    launcher: Launcher = "none"
    """Who started this process; none: nobody, it is alone."""

    job: str = "local"
    """Name that all ranks of this launch share, so that two launches never mix in one store."""

    agent_hosts_store: bool = False
    """torchrun's agent already listens at the port: rank 0 connects to it and does not open it."""


def read_process_env(environ: Mapping[str, str] = os.environ) -> ProcessEnv:
    """Read this process's place; the innermost launcher counts (torchrun, then MPI, then `srun`).

    A SLURM shell or batch script outside `srun`, and a step of one task, are no launch: world size 1,
    launcher "none". MASTER_ADDR and MASTER_PORT overrule what SLURM or MPI suggest.

    Raises:
        LaunchError: variables are missing, no numbers, or contradict each other; it names them.
    """
    if "RANK" in environ:
        names: tuple[str, ...] = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        return _checked(_from_torchrun(environ), environ, names)
    if "OMPI_COMM_WORLD_RANK" in environ:
        names = tuple(f"OMPI_COMM_WORLD_{end}" for end in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE"))
        return _checked(_from_mpi(environ, names, "openmpi"), environ, names)
    in_slurm_step = "SLURM_PROCID" in environ and ("SLURM_STEP_ID" in environ or "SLURM_STEPID" in environ)
    # `srun --mpi=pmi2` sets PMI_RANK too, but without the local ranks that SLURM tells.
    if "PMI_RANK" in environ and not (in_slurm_step and environ["PMI_RANK"] == environ["SLURM_PROCID"]):
        names = ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS")
        return _checked(_from_mpi(environ, names, "mpich"), environ, names)
    if in_slurm_step:
        size_name = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environ else "SLURM_NTASKS"
        if _integer(environ, size_name) > 1:
            names = ("SLURM_PROCID", size_name, "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE")
            return _checked(_from_slurm(environ, size_name), environ, names)
    return ProcessEnv(host=socket.gethostname())


def check_versions(versions: Optional[Mapping[str, str]] = None) -> None:
    """Refuse versions this code was not tested with.

    Args:
        versions: version strings of "python", "torch" and "megatron-core"; None reads those installed.

    Raises:
        LaunchError: one line that names each wrong version and what is needed.
    """
    found = _installed_versions() if versions is None else versions
    problems = []
    if _major_minor(found["python"]) < PYTHON_MIN:
        problems.append(f"Python {found['python']} (needs >= {_dotted(PYTHON_MIN)})")
    torch = found["torch"]
    if not TORCH_MIN <= _major_minor(torch) < TORCH_END:
        problems.append(f"torch {torch} (needs >= {_dotted(TORCH_MIN)} and < {_dotted(TORCH_END)})")
    if found["megatron-core"] != MEGATRON_CORE:
        problems.append(f"megatron-core {found['megatron-core']} (needs exactly {MEGATRON_CORE})")
    if problems:
        raise LaunchError(f"Untested versions: {', '.join(problems)}. Install what setup.py asks for.")


def first_host(node_list: str) -> str:
    """First host of a SLURM node list: `"gpu[003-005,9],login"` gives `"gpu003"`.

    Raises:
        LaunchError: the list is empty or its brackets do not match.
    """
    matched = re.match(r"^((?:[^,\[\]]|\[[^\[\]]+\])+)(?:,|$)", node_list.strip())
    if matched is None:
        raise LaunchError(f"SLURM_STEP_NODELIST={node_list!r} has no first host. Set MASTER_ADDR to it.")
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", matched.group(1))


def _from_torchrun(environ: Mapping[str, str]) -> ProcessEnv:
    run, attempt = environ.get("TORCHELASTIC_RUN_ID", "none"), environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return ProcessEnv(
        rank=_integer(environ, "RANK"),
        world_size=_integer(environ, "WORLD_SIZE"),
        local_rank=_integer(environ, "LOCAL_RANK"),
        local_world_size=_integer(environ, "LOCAL_WORLD_SIZE"),
        node_rank=_integer(environ, "GROUP_RANK", default=0),
        host=socket.gethostname(),
        master_addr=_text(environ, "MASTER_ADDR"),
        master_port=_port(environ, None),
        launcher="torchrun",
        job=f"torchrun/{run}/{attempt}",
        agent_hosts_store=environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
    )


def _from_slurm(environ: Mapping[str, str], size_name: str) -> ProcessEnv:
    job, step = _integer(environ, "SLURM_JOB_ID"), environ.get("SLURM_STEP_ID") or environ["SLURM_STEPID"]
    world_size = _integer(environ, size_name)
    node_rank = _integer(environ, "SLURM_NODEID", default=0)
    counts = environ.get("SLURM_STEP_TASKS_PER_NODE") or environ.get("SLURM_TASKS_PER_NODE", "")
    return ProcessEnv(
        rank=_integer(environ, "SLURM_PROCID"),
        world_size=world_size,
        local_rank=_integer(environ, "SLURM_LOCALID"),
        local_world_size=_tasks_on_node(counts, node_rank),
        node_rank=node_rank,
        host=socket.gethostname(),
        master_addr=environ.get("MASTER_ADDR") or first_host(_slurm_node_list(environ)),
        master_port=_port(environ, SLURM_PORTS[job % len(SLURM_PORTS)]),
        launcher="slurm",
        # A requeued job keeps its id; the old copy may still run on a node that lost its network.
        job=f"slurm/{job}.{step}/{environ.get('SLURM_RESTART_COUNT', '0')}",
    )


def _from_mpi(environ: Mapping[str, str], names: tuple[str, ...], launcher: Launcher) -> ProcessEnv:
    rank, size, local_rank, local_size = (_integer(environ, name) for name in names)
    master = environ.get("MASTER_ADDR")
    if not master and size == local_size:
        master = "127.0.0.1"
    elif not master and "SLURM_JOB_ID" in environ:
        master = first_host(_slurm_node_list(environ))
    elif not master:
        raise LaunchError(
            f"{names[1]}={size} but {names[3]}={local_size}: several hosts, and MPI does not tell the first. "
            f"Set MASTER_ADDR to the host of rank 0 for all ranks (mpirun -x MASTER_ADDR, mpiexec -genv)."
        )
    return ProcessEnv(
        rank=rank,
        world_size=size,
        local_rank=local_rank,
        local_world_size=local_size,
        node_rank=rank // max(1, local_size),  # MPI tells no node number; right where hosts are alike
        host=socket.gethostname(),
        master_addr=master,
        master_port=_port(environ, DEFAULT_PORT),
        launcher=launcher,
        job=f"{launcher}/{environ.get('SLURM_JOB_ID', 'none')}",
    )


def _checked(env: ProcessEnv, environ: Mapping[str, str], names: tuple[str, ...]) -> ProcessEnv:
    consistent = (
        0 <= env.rank < env.world_size
        and 0 <= env.local_rank < env.local_world_size <= env.world_size
        and env.local_rank <= env.rank
    )
    if not consistent:
        found = " ".join(f"{name}={environ[name]}" for name in names if name in environ)
        raise LaunchError(
            f"{found} contradict each other (ranks count from 0 and lie below their size). "
            f"Unset what an earlier launch left in the environment, or start with torchrun, srun or mpiexec."
        )
    return env


def _slurm_node_list(environ: Mapping[str, str]) -> str:
    for name in ("SLURM_STEP_NODELIST", "SLURM_NODELIST", "SLURM_JOB_NODELIST"):
        if environ.get(name):
            return environ[name]
    raise LaunchError("SLURM_STEP_NODELIST is not set. Start with `srun`, or set MASTER_ADDR.")


def _tasks_on_node(counts: str, node_rank: int) -> int:
    """SLURM writes tasks a node as `"4(x3),2"`: three nodes of 4, one of 2."""
    tasks: list[int] = []
    for part in counts.split(","):
        matched = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        if matched is None:
            raise LaunchError(f"SLURM_STEP_TASKS_PER_NODE={counts!r} is not like '4(x3),2'. Use `srun`.")
        tasks += [int(matched.group(1))] * int(matched.group(2) or 1)
    if node_rank >= len(tasks):
        raise LaunchError(f"SLURM_NODEID={node_rank} lies outside SLURM_STEP_TASKS_PER_NODE={counts}.")
    return tasks[node_rank]


def _text(environ: Mapping[str, str], name: str) -> str:
    if not environ.get(name):
        raise LaunchError(f"{name} is not set, although RANK is. Start with torchrun, srun or mpiexec.")
    return environ[name]


def _integer(environ: Mapping[str, str], name: str, default: Optional[int] = None) -> int:
    if default is not None and not environ.get(name):
        return default
    text = environ.get(name, "")
    if not re.fullmatch(r"\d+", text):
        state = f"{name}={text!r} is no number" if text else f"{name} is not set"
        raise LaunchError(
            f"{state}, although other variables of its launcher are there. Start with torchrun, srun or "
            f"mpiexec, or unset what an earlier launch left in the environment."
        )
    return int(text)


def _port(environ: Mapping[str, str], default: Optional[int]) -> int:
    port = _integer(environ, "MASTER_PORT", default)
    if not 0 < port < 65536:
        raise LaunchError(f"MASTER_PORT={port} is no TCP port: choose one from 1024 to 65535.")
    return port


def _installed_versions() -> dict[str, str]:
    found = {"python": ".".join(map(str, sys.version_info[:3]))}
    for name in ("torch", "megatron-core"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "missing"
    return found


def _major_minor(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))
