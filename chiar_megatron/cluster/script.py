"""sbatch scripts from `slurm/*.sbatch`: the two marked parts are replaced, the rest stays as it is."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

from chiar_megatron.cluster.placement import Placement
from chiar_megatron.cluster.site import ClusterConfig
from chiar_megatron.errors import LaunchError
from chiar_megatron.runtime.env import JOB_PORTS

_FOLDERS = (Path(__file__).resolve().parents[2] / "slurm", Path(sys.prefix) / "share/chiar_megatron/slurm")


@dataclass(frozen=True)
class Array:
    """The run folders of a job array's tasks, each with its recipe in `submit/recipe.yaml`."""

    run_dirs: tuple[Path, ...]
    throttle: Optional[int]
    """Tasks that run at once; None: as many as SLURM lets."""

    def option(self) -> str:
        """Of sbatch."""
        at_once = "" if self.throttle is None else f"%{self.throttle}"
        return f"--array=0-{len(self.run_dirs) - 1}{at_once}"


def _tasks(cluster: ClusterConfig, placement: Placement) -> list[str]:
    """Of a node. Elastic, its processors alone: SLURM takes tasks times the most nodes as its tasks, and
    queued again it would wait for as many nodes. Each attempt's `srun` brings its own."""
    each = cluster.cpus_per_task
    if cluster.elastic:
        return [f"--mincpus={placement.tasks_per_node * (each or 1)}"]
    return [f"--ntasks-per-node={placement.tasks_per_node}", *([f"--cpus-per-task={each}"] if each else [])]


def pretrain_script(
    run_dir: Path,
    name: str,
    command: Sequence[str],
    cluster: ClusterConfig,
    placement: Placement,
    array: Optional[Array] = None,
) -> str:
    """The training job. command: `pretrain recipe.yaml …`; paths relative to the working folder. array: a job
    for each of its run folders instead; run_dir, the sweep's folder, then takes the jobs' output."""
    options = [
        f"--job-name={name}",
        f"--nodes={_least(placement)}{placement.nodes}",
        *_tasks(cluster, placement),
        *_gpus(cluster, placement.tasks_per_node),
        *_optional(cluster, cluster.partition),
        f"--time={cluster.time}",
        f"--signal=USR1@{cluster.signal_seconds}",
        "--requeue" if cluster.requeue else "--no-requeue",
        "--open-mode=append",
        _output(run_dir / f"slurm-{'%A_%a' if array else '%j'}.out"),
        *([array.option()] if array else []),
        *cluster.sbatch,
    ]
    # Tasks are ended a while after the first of them, not at once: rank 0 may still be saving.
    step = ["srun", "--kill-on-bad-exit=0", "--wait=60", *_srun_options(cluster)]
    if cluster.cpus_per_task:
        step.append(f"--cpus-per-task={cluster.cpus_per_task}")  # not inherited since SLURM 22.05
    if cluster.launcher == "torchrun":
        step.append("--ntasks-per-node=1")
    script_name = name.removeprefix("chiar-") if array else "pretrain"
    place = 'place "$RUN_DIR/submit/recipe.yaml"' if array else shlex.join(["place", *command[1:]])
    settings = [
        *(_of_task(array) if array else _of_run(run_dir, command)),
        f"PLACE=({f'{place} --tasks {placement.tasks_per_node}' if cluster.elastic else ''})",
        f"PYTHON={shlex.quote(_python(cluster))}",
        f"STEP=({shlex.join(step)})",
        f"INSIDE=({shlex.join(_apptainer(cluster))})",
        _runner(cluster, placement),
        f"HOST_STEP=({shlex.join(_host_step(cluster))})",
        f"SIGNAL_SECONDS={cluster.signal_seconds}",
        f"MAX_TRIES={cluster.max_tries}",
        f"SCRIPT={shlex.quote(str(run_dir / 'submit' / f'{script_name}.sbatch'))}",
        *_surroundings(cluster),
    ]
    return _fill("pretrain.sbatch", options, settings)


def _of_run(run_dir: Path, command: Sequence[str]) -> list[str]:
    return [
        f"RUN_DIR={shlex.quote(str(run_dir))}",
        f"PRETRAIN=({shlex.join(command)})",
        "AGAIN=(--dependency=singleton)",
    ]


def _of_task(array: Array) -> list[str]:
    """A task finds its run folder by its number; where it may not requeue, a successor waits for it alone."""
    own = "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"
    return [
        f"RUN_DIRS=({shlex.join(map(str, array.run_dirs))})",
        "RUN_DIR=${RUN_DIRS[SLURM_ARRAY_TASK_ID]}",
        'PRETRAIN=(pretrain "$RUN_DIR/submit/recipe.yaml")',
        f'AGAIN=(--array="$SLURM_ARRAY_TASK_ID" --dependency="afterany:{own}")',
    ]


def prepare_script(run_dir: Path, name: str, recipes: Sequence[Path], cluster: ClusterConfig) -> str:
    """The CPU job before it."""
    options = [
        f"--job-name={name}-prepare",
        "--nodes=1",
        "--ntasks=1",
        f"--cpus-per-task={cluster.prepare_cpus}",
        *_optional(cluster, cluster.prepare_partition or cluster.partition),
        f"--time={cluster.prepare_time}",
        _output(run_dir / "prepare-%j.out"),
    ]
    settings = [
        f"PYTHON={shlex.quote(_python(cluster))}",
        f"RECIPES=({shlex.join(map(str, recipes))})",
        f"WORKERS={cluster.prepare_cpus}",
        f"HOST_STEP=({shlex.join(_host_step(cluster))})",
        *_surroundings(cluster),
    ]
    return _fill("prepare.sbatch", options, settings)


def _least(placement: Placement) -> str:
    return "" if placement.fewest_nodes is None else f"{placement.fewest_nodes}-"


def _gpus(cluster: ClusterConfig, count: int) -> list[str]:
    kind = f"{cluster.gpu_type}:" if cluster.gpu_type else ""
    if cluster.gpu_option == "gres":
        return [f"--gres=gpu:{kind}{count}"]
    return [f"--gpus-per-node={kind}{count}"] if cluster.gpu_option == "gpus-per-node" else []


def _optional(cluster: ClusterConfig, partition: str | None) -> list[str]:
    pairs = (("partition", partition), ("account", cluster.account), ("qos", cluster.qos))
    return [f"--{name}={value}" for name, value in pairs if value]


def _python(cluster: ClusterConfig) -> str:
    return cluster.python or ("python" if cluster.container else sys.executable)


def _runner(cluster: ClusterConfig, placement: Placement) -> str:
    if cluster.launcher == "srun":
        return 'RUNNER=("$PYTHON" -m)'
    # SIGUSR1 is for the ranks; torchrun itself, which it would end, ignores it.
    ignoring = shlex.join(["bash", "-c", 'trap "" USR1; exec "$@"', "torchrun"])
    return (
        f'RUNNER=({ignoring} "$PYTHON" -m torch.distributed.run --nnodes={placement.nodes} '
        f"--nproc-per-node={placement.tasks_per_node} --rdzv-backend=c10d --rdzv-id=$SLURM_JOB_ID "
        '--rdzv-endpoint="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)'
        f':$(({JOB_PORTS.start} + SLURM_JOB_ID % {len(JOB_PORTS)}))" -m)'
    )


def _mounts(cluster: ClusterConfig) -> str:
    return ",".join([f"{Path.cwd()}:{Path.cwd()}", *cluster.container_mounts])


def _srun_options(cluster: ClusterConfig) -> list[str]:
    options = list(cluster.srun)
    if cluster.container and cluster.container_runtime == "pyxis":
        options += [f"--container-image={cluster.container}", f"--container-mounts={_mounts(cluster)}"]
        options.append(f"--container-workdir={Path.cwd()}")
    return options


def _apptainer(cluster: ClusterConfig) -> list[str]:
    if cluster.container is None or cluster.container_runtime != "apptainer":
        return []
    gpu = [] if cluster.gpu_option == "none" else ["--nv"]
    return [
        "apptainer",
        "exec",
        *gpu,
        "--bind",
        _mounts(cluster),
        "--pwd",
        str(Path.cwd()),
        cluster.container,
    ]


def _host_step(cluster: ClusterConfig) -> list[str]:
    if cluster.container and cluster.container_runtime == "pyxis":
        return ["srun", "--overlap", "--nodes=1", "--ntasks=1", *_srun_options(cluster)]
    return _apptainer(cluster)


def _surroundings(cluster: ClusterConfig) -> list[str]:
    lines = [f"module load {shlex.join(cluster.modules)}"] if cluster.modules else []
    lines += [f"export {name}={shlex.quote(value)}" for name, value in cluster.environment.items()]
    return [*lines, *cluster.setup]


def _output(path: Path) -> str:
    """sbatch splits its lines at blanks, but for those in quotes."""
    return f'--output="{path}"' if " " in str(path) else f"--output={path}"


def _fill(template: str, options: Sequence[str], settings: Sequence[str]) -> str:
    path = next((folder / template for folder in _FOLDERS if (folder / template).is_file()), None)
    if path is None:
        places = " nor ".join(map(str, _FOLDERS))
        raise LaunchError(f"{template} is neither in {places}; install chiar-megatron with `pip install`")
    text = path.read_text(encoding="utf-8")
    for part, lines in (("options", [f"#SBATCH {o}" for o in options]), ("settings", settings)):
        filled = f"# >>> {part}\n" + "\n".join(lines) + f"\n# <<< {part}\n"
        text = re.sub(rf"# >>> {part}\n.*?# <<< {part}\n", lambda _, f=filled: f, text, flags=re.DOTALL)  # type: ignore[misc]
    return text
