"""`cluster.yaml`: what a site's jobs need, so that recipes stay free of it."""

from __future__ import annotations

import re
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, Optional

import yaml

from chiar_megatron.config.fields import describe_type, is_optional, nearest_name
from chiar_megatron.config.problems import raise_problems, shown
from chiar_megatron.errors import ConfigError

DEFAULT_FILE = Path("cluster.yaml")


@dataclass(frozen=True)
class ClusterConfig:
    """Site settings; null leaves a choice to SLURM."""

    partition: Optional[str] = None
    """Of the training job."""

    account: Optional[str] = None
    """That is charged."""

    qos: Optional[str] = None
    """Quality of service."""

    gpus_per_node: int = 8
    """GPUs, and so tasks, of one node; on a CPU cluster the tasks."""

    gpu_option: Literal["gres", "gpus-per-node", "none"] = "gres"
    """How GPUs are asked for: `--gres=gpu:N`, `--gpus-per-node=N`, or not at all (CPU)."""

    gpu_type: Optional[str] = None
    """As in `--gres=gpu:h100:8`."""

    cpus_per_task: Optional[int] = None
    """Cores of one rank."""

    time: str = "24:00:00"
    """Limit of one attempt, as `--time` takes it."""

    signal_seconds: int = 120
    """Before the limit, when the run is told to save; more than a step and a save take."""

    requeue: bool = True
    """Whether jobs may be requeued; false: a successor is submitted with `--dependency=singleton`."""

    elastic: bool = False
    """Whether an attempt may run on fewer nodes than asked for (`--nodes=MIN-MAX`): after the loss of one
    with no spare, on what is left, with as many replicas as still divide the batch."""

    max_tries: int = 3
    """Failures in a row without a new step before the run stops."""

    launcher: Literal["srun", "torchrun"] = "srun"
    """One `srun` task a GPU, or one `torchrun` a node started by `srun`."""

    python: Optional[str] = None
    """Python on the nodes; null: the one that submits, or `python` in a container."""

    modules: tuple[str, ...] = ()
    """For `module load`."""

    setup: tuple[str, ...] = ()
    """Shell lines before the start."""

    environment: Mapping[str, str] = field(default_factory=dict)
    """Variables, such as NCCL_SOCKET_IFNAME and NCCL_IB_HCA."""

    container: Optional[str] = None
    """Image."""

    container_runtime: Literal["pyxis", "apptainer"] = "pyxis"
    """pyxis: `srun --container-image` (enroot); apptainer: `apptainer exec`."""

    container_mounts: tuple[str, ...] = ()
    """`/from:/to` each; the working folder is always there."""

    srun: tuple[str, ...] = ()
    """More options of `srun`, such as `--mpi=pmix`."""

    sbatch: tuple[str, ...] = ()
    """More options of `sbatch`, such as `--exclusive`."""

    prepare_partition: Optional[str] = None
    """Of the CPU job that prepares data; null: `partition`."""

    prepare_cpus: int = 8
    """Its cores."""

    prepare_time: str = "04:00:00"
    """Its limit."""


def load_cluster(path: Optional[Path]) -> ClusterConfig:
    """Site settings from `path`; None takes `cluster.yaml` of the working folder, or defaults without one.

    Raises ConfigError with a line for each unknown key (and the nearest) and each value of a wrong type.
    """
    if path is None:
        if not DEFAULT_FILE.exists():
            return ClusterConfig()
        path = DEFAULT_FILE
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cluster file {path} cannot be read: {error.strerror}; give a YAML file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{path}: not valid YAML: {reason}") from None
    if content is None:
        return ClusterConfig()
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: holds no mapping; its lines are such as `partition: gpu`")
    return _from_mapping(content, str(path))


def _from_mapping(content: Mapping[Any, Any], source: str) -> ClusterConfig:
    types = typing.get_type_hints(ClusterConfig)
    names = [f.name for f in fields(ClusterConfig)]
    values: dict[str, Any] = {}
    problems: list[str] = []
    for key, value in content.items():
        if key not in types:
            near = nearest_name(str(key), names) or f"; keys: {', '.join(names)}"
            problems.append(f"{source}: unknown key {key}{near}")
            continue
        try:
            values[key] = _typed(types[key], value)
        except ValueError:
            words = "a mapping of texts" if key == "environment" else describe_type(types[key])
            hint = " (YAML reads an unquoted 1:30:00 as a number: quote it)" if "time" in key else ""
            problems.append(f"{source}: {key}: {shown(value)} is not {words}{hint}")
    for key in ("gpus_per_node", "cpus_per_task", "signal_seconds", "max_tries", "prepare_cpus"):
        if values.get(key) is not None and values[key] < 1:
            problems.append(f"{source}: {key}: {values[key]} must be at least 1")
    for key, value in values.items():
        texts = value if isinstance(value, tuple) else [value]
        if key != "setup" and any(isinstance(text, str) and "\n" in text for text in texts):
            problems.append(f"{source}: {key}: holds a line break; keep it on one line")
    for name in values.get("environment", {}):
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            problems.append(
                f"{source}: environment: {shown(name)} is not a variable name; it takes letters, digits and "
                "_, and no digit first"
            )
    if values.get("elastic") and values.get("launcher", "srun") != "srun":
        problems.append(f"{source}: elastic: true needs launcher: srun, which each attempt can start anew")
    raise_problems(problems)
    return ClusterConfig(**values)


def _typed(wanted: Any, value: Any) -> Any:
    if is_optional(wanted):
        if value is None:
            return None
        wanted = typing.get_args(wanted)[0]
    if typing.get_origin(wanted) is Literal:
        good = value in typing.get_args(wanted)
    elif wanted in (int, bool, str):
        good = type(value) is wanted
    elif wanted == tuple[str, ...]:
        good = isinstance(value, list) and all(isinstance(entry, str) for entry in value)
        value = tuple(value) if good else value
    else:  # the environment: numbers are texts there
        good = isinstance(value, dict) and all(type(v) in (str, int, float) for v in value.values())
        value = {str(k): str(v) for k, v in value.items()} if good else value
    if not good:
        raise ValueError
    return value
