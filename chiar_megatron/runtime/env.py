"""Who this process is, from the variables of torchrun, SLURM or MPI, and whether versions were tested."""

from __future__ import annotations

import importlib.metadata
import itertools
import os
import re
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Optional

from chiar_megatron.errors import LaunchError
from chiar_megatron.runtime.mpi import first_host_by_mpi

PYTHON_MIN = (3, 10)
TORCH_MIN, TORCH_END = (2, 11), (2, 14)
MEGATRON_CORE = "0.16.1"

DEFAULT_PORT = 29500  # torchrun's own
# Jobs that share a host get different ports by their job id, all below those that Linux gives to outgoing
# connections (32768 to 60999): any program's connection could hold one of those when rank 0 wants to listen.
JOB_PORTS = range(20000, 32000)

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

    hosts: tuple[tuple[str, int], ...] = ()
    """Every host of the launch and how many of its processes run there; empty where the launcher does not
    tell."""

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
    launcher "none". MASTER_ADDR and MASTER_PORT overrule what SLURM or MPI suggest. Where MPI spans several
    hosts outside SLURM and MASTER_ADDR is not set, mpi4py is asked for the first host.

    Raises:
        LaunchError: variables are missing, no numbers, or contradict each other; it names them.
    """
    if "RANK" in environ:
        names: tuple[str, ...] = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        env = _checked(_from_torchrun(environ), environ, names)
        _check_outer(env, environ)
        return env
    if "OMPI_COMM_WORLD_RANK" in environ:
        names = tuple(f"OMPI_COMM_WORLD_{end}" for end in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE"))
        return _checked(_from_mpi(environ, names, "openmpi"), environ, names)
    in_slurm_step = _in_slurm_step(environ)
    # `srun --mpi=pmi2` sets PMI_RANK too, but without the local ranks that SLURM tells.
    if "PMI_RANK" in environ and not (in_slurm_step and environ["PMI_RANK"] == environ["SLURM_PROCID"]):
        names = ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS")
        return _checked(_from_mpi(environ, names, "mpich"), environ, names)
    if in_slurm_step:
        size_name = _slurm_size_name(environ)
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


def host_names(node_list: str) -> list[str]:
    """Hosts of a SLURM node list, in order: `"gpu[003-004,9],login"` gives gpu003, gpu004, gpu9, login.

    Raises:
        LaunchError: the list is empty or its brackets do not match.
    """
    text = node_list.strip()
    parts = re.findall(r"(?:[^,\[\]]|\[[^\[\]]+\])+", text)
    if not parts or ",".join(parts) != text:
        raise LaunchError(f"SLURM_STEP_NODELIST={node_list!r} is no list of hosts. Start with `srun`.")
    names: list[str] = []
    for part in parts:
        pieces = re.split(r"\[([^\]]+)\]", part)  # plain text and bracketed ranges in turn
        choices = [_range_members(p) if i % 2 else [p] for i, p in enumerate(pieces)]
        names += ["".join(chosen) for chosen in itertools.product(*choices)]
    return names


def _range_members(ranges: str) -> list[str]:
    """`"003-005,9"`: 003, 004, 005, 9."""
    members: list[str] = []
    for entry in ranges.split(","):
        first, _, last = entry.partition("-")
        if last.isdigit() and first.isdigit():
            members += [f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1)]
        else:
            members.append(entry)
    return members


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
    tasks = _task_counts(counts)
    if node_rank >= len(tasks):
        raise LaunchError(f"SLURM_NODEID={node_rank} lies outside SLURM_STEP_TASKS_PER_NODE={counts}.")
    names = host_names(_slurm_node_list(environ))
    return ProcessEnv(
        rank=_integer(environ, "SLURM_PROCID"),
        world_size=world_size,
        local_rank=_integer(environ, "SLURM_LOCALID"),
        local_world_size=tasks[node_rank],
        node_rank=node_rank,
        host=environ.get("SLURMD_NODENAME") or socket.gethostname(),
        hosts=tuple(zip(names, tasks, strict=False)) if len(names) == len(tasks) else (),
        master_addr=environ.get("MASTER_ADDR") or names[0],
        master_port=_port(environ, JOB_PORTS[job % len(JOB_PORTS)]),
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
        master = host_names(_slurm_node_list(environ))[0]
    elif not master:
        # Only what this very process was started with may be asked for over MPI.
        master = first_host_by_mpi(size) if environ is os.environ else None
    if not master:
        raise LaunchError(
            f"{names[1]}={size} but {names[3]}={local_size}: several hosts, and MPI does not tell the first. "
            f"Install mpi4py (built against this MPI), or set MASTER_ADDR to the host of rank 0 for all "
            f"ranks (mpirun -x MASTER_ADDR, mpiexec -genv)."
        )
    job = environ.get("PMIX_NAMESPACE") or environ.get("SLURM_JOB_ID", "none")
    own_port = JOB_PORTS[int(job) % len(JOB_PORTS)] if job.isdigit() else DEFAULT_PORT
    return ProcessEnv(
        rank=rank,
        world_size=size,
        local_rank=local_rank,
        local_world_size=local_size,
        node_rank=rank // max(1, local_size),  # MPI tells no node number; right where hosts are alike
        host=socket.gethostname(),
        master_addr=master,
        master_port=_port(environ, own_port),
        launcher=launcher,
        job=f"{launcher}/{job}",
    )


def _check_outer(env: ProcessEnv, environ: Mapping[str, str]) -> None:
    """torchrun's variables against those of `srun` or `mpirun` around them: ranks that each believed they
    were alone would all write one run folder."""
    if _in_slurm_step(environ):
        outer = ("SLURM_PROCID", _slurm_size_name(environ))
    elif "OMPI_COMM_WORLD_RANK" in environ:
        outer = ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE")
    else:
        return
    rank, size = (_integer(environ, name) for name in outer)
    theirs = f"{outer[0]}={rank} {outer[1]}={size}"
    if "TORCHELASTIC_RUN_ID" in environ:
        if size > 1 and environ.get("GROUP_WORLD_SIZE") == "1":
            raise LaunchError(
                f"{theirs}, but this torchrun spans one host (GROUP_WORLD_SIZE=1): {size} copies of the run. "
                f"Give torchrun --nnodes={size} and one --rdzv-endpoint, or start it once."
            )
    elif size > 1 and (rank, size) != (env.rank, env.world_size):
        raise LaunchError(
            f"RANK={env.rank} WORLD_SIZE={env.world_size} contradict {theirs}. Unset RANK, WORLD_SIZE, "
            f"LOCAL_RANK and LOCAL_WORLD_SIZE (an earlier launch or a script left them), or start torchrun."
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
    raise LaunchError("SLURM_STEP_NODELIST is not set. Start with `srun`.")


def _in_slurm_step(environ: Mapping[str, str]) -> bool:
    return "SLURM_PROCID" in environ and ("SLURM_STEP_ID" in environ or "SLURM_STEPID" in environ)


def _slurm_size_name(environ: Mapping[str, str]) -> str:
    return "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environ else "SLURM_NTASKS"


def _task_counts(counts: str) -> list[int]:
    """SLURM writes tasks a node as `"4(x3),2"`: three nodes of 4, one of 2."""
    tasks: list[int] = []
    for part in counts.split(","):
        matched = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        if matched is None:
            raise LaunchError(f"SLURM_STEP_TASKS_PER_NODE={counts!r} is not like '4(x3),2'. Use `srun`.")
        tasks += [int(matched.group(1))] * int(matched.group(2) or 1)
    return tasks


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
