"""What can be known wrong before a job waits in the queue."""

from __future__ import annotations

import getpass
import os
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from chiar_megatron.cluster.placement import Placement
from chiar_megatron.cluster.prepare import Unprepared
from chiar_megatron.cluster.site import ClusterConfig
from chiar_megatron.config.fields import nearest_name
from chiar_megatron.config.schema import RunConfig
from chiar_megatron.config.validate import check_config, check_paths
from chiar_megatron.errors import ChiarError, ConfigError, LaunchError
from chiar_megatron.planning.report import Plan
from chiar_megatron.planning.speed import Cluster
from chiar_megatron.training.loop import resolve

ASK_SECONDS = 20  # for sinfo and sacctmgr


def check_run(config: RunConfig, placement: Placement) -> None:
    """Layout and fields. Raises ConfigError."""
    check_config(config, placement.nodes * placement.tasks_per_node)


def estimates(config: RunConfig, placement: Placement) -> list[str]:
    """What `chiar plan` says of FLOPs, memory and speed; a reason alone where the tokenizer, which knows
    the vocabulary, is not there yet."""
    parallel = config.parallel
    replica = parallel.processes_per_replica
    gpus = placement.nodes * placement.tasks_per_node
    try:
        resolved = resolve(replace(config, parallel=replace(parallel, data_parallel_size=gpus // replica)))
    except ChiarError as error:
        return [f"no estimate of memory and speed: {error}"]
    cluster = Cluster(gpus=gpus, gpus_per_node=placement.tasks_per_node)
    return Plan(resolved, gpus // replica, cluster, listed=False).summary()


def find_problems(config: RunConfig, cluster: ClusterConfig, unprepared: Unprepared) -> list[str]:
    """What would stop the job: data and tokenizer missing, a run folder that cannot be written, names
    that SLURM does not know (where it answers)."""
    problems: list[str] = []
    try:
        check_paths(config)
    except ConfigError as error:
        mended = [
            f"data.{n}: no files {p}." for n in ("train", "validation", "test") for p in unprepared.texts
        ]
        mended += [
            f"data.{n}: {p!r} lacks" for n in ("train", "validation", "test") for p in unprepared.texts
        ]
        problems += [line for line in str(error).splitlines() if not line.startswith(tuple(mended))]
    problems += _unwritable(Path(config.run_dir))
    partitions = {"partition": cluster.partition, "prepare_partition": cluster.prepare_partition}
    known = _ask("sinfo", "-h", "-o", "%R") if any(partitions.values()) else None
    for key, wanted in partitions.items():
        # A job may name several: the first that is free takes it.
        if wanted is None or known is None:
            continue
        for name in wanted.split(","):
            if name not in known:
                near = nearest_name(name, known) or f"; there are: {', '.join(known[:8])}"
                problems.append(f"{key}: {name} is unknown to sinfo{near}")
    return problems + _account_problems(cluster)


def _unwritable(run_dir: Path) -> list[str]:
    existing = next(p for p in (run_dir.absolute(), *run_dir.absolute().parents) if p.exists())
    if existing.is_dir() and os.access(existing, os.W_OK | os.X_OK):
        return []
    return [f"run_dir: {run_dir} cannot be written ({existing} is no folder you may write); choose another"]


def _account_problems(cluster: ClusterConfig) -> list[str]:
    if cluster.account is None and cluster.qos is None:
        return []
    user = getpass.getuser()
    lines = _ask("sacctmgr", "-nP", "show", "assoc", f"user={user}", "format=account,qos")
    if not lines:  # no accounting, or none that answers
        return []
    rows = [line.partition("|")[::2] for line in lines]
    problems = []
    accounts = sorted({account for account, _ in rows})
    if cluster.account is not None and cluster.account.lower() not in accounts:
        near = nearest_name(cluster.account, accounts) or f"; yours: {', '.join(accounts[:8])}"
        problems.append(f"account: {cluster.account} is not an account of {user} in sacctmgr{near}")
    services = sorted({name for _, names in rows for name in names.split(",") if name})
    if cluster.qos is not None and services and cluster.qos not in services:
        near = nearest_name(cluster.qos, services) or f"; yours: {', '.join(services[:8])}"
        problems.append(f"qos: {cluster.qos} is not one of {user}'s in sacctmgr{near}")
    return problems


def find_jobs(name: str) -> list[str]:
    """A job of this run that is in the queue: of two, the later start would end the other."""
    lines = _ask("squeue", "-h", "--me", "-n", name, "-o", "%A %T") or []
    return [f"run_dir: job {' is '.join(line.split())} for it; wait, or `scancel` it first" for line in lines]


def _ask(*command: str) -> list[str] | None:
    """Lines that a SLURM command answers; None if it is not there or does not answer."""
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=ASK_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return sorted({line.strip() for line in found.stdout.splitlines() if line.strip()})


def submit_training(script: Path, preparing: str | None, alone: bool = True) -> str:
    """Hand a training script to sbatch; returns the job id.

    preparing: the job that it waits for. alone: no other job does; where sbatch refuses, it is cancelled.
    Raises as `submit_script` does.
    """
    waits = [f"--dependency=afterok:{preparing}", "--kill-on-invalid-dep=yes"]
    try:
        return submit_script(script, waits if preparing is not None else ())
    except LaunchError as error:
        if preparing is None or not alone:
            raise
        cancelled = _ask("scancel", preparing) is not None
        ending = "is cancelled too" if cancelled else f"is still in the queue: `scancel {preparing}`"
        raise LaunchError(f"{error}; job {preparing}, which prepares the data, {ending}") from None


def submit_script(script: Path, options: Sequence[str]) -> str:
    """Hand a script to sbatch; returns the job id. Raises LaunchError with what sbatch said."""
    command = ["sbatch", "--parsable", *options, str(script)]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=120)
    except FileNotFoundError:
        raise LaunchError(
            "sbatch is not on the PATH: submit on a login node, or see the script with --dry-run"
        ) from None
    except subprocess.TimeoutExpired:
        raise LaunchError("sbatch did not answer within 120 s; look at `sinfo` and try again") from None
    if found.returncode != 0:
        raise LaunchError(f"sbatch refused {script}: {' '.join(found.stderr.split())}")
    return found.stdout.strip().partition(";")[0]
