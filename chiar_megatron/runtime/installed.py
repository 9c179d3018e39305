"""What this machine has: packages with their versions, devices, and the variables of its launcher.

The packages are read from their metadata, without importing any of them.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from chiar_megatron.errors import LaunchError
from chiar_megatron.runtime.env import read_process_env

# Distribution, what it is for here, and what its lack costs (empty: nothing).
PACKAGES = (
    ("torch", "everything", "nothing runs"),
    ("megatron-core", "parallel layers, optimizer, checkpoints", "nothing runs"),
    ("numpy", "token ids", "nothing runs"),
    ("psutil", "checkpoints of megatron-core", "a checkpoint save hangs"),
    ("sentencepiece", "tokenizers trained by chiar", "no SentencePiece tokenizers"),
    ("tokenizers", "GPT-2's and Hugging Face's tokenizers", "none of theirs"),
    ("triton", "fused kernels and torch.compile on CUDA", "on CUDA both take PyTorch's slower parts"),
    ("wandb", "figures to Weights & Biases", "logging.wandb_project is refused"),
    ("tensorboard", "figures to TensorBoard", "logging.tensorboard is refused"),
    ("transformers", "models and conversion in Hugging Face's format", "that format is refused"),
    ("safetensors", "weights in Hugging Face's format", "that format is refused"),
    ("transformer-engine", "no layer uses it; megatron-core would take its FusedAdam", ""),
    ("apex", "no layer uses it; megatron-core would take its FusedAdam", ""),
    ("flash-attn", "not used: torch brings its own", ""),
    ("deepspeed", "not needed: chiar converts its checkpoints without it", ""),
)

# Named one by one: other variables of a job may hold secrets.
VARIABLES = (
    "RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE GROUP_RANK MASTER_ADDR MASTER_PORT "
    "TORCHELASTIC_RUN_ID TORCHELASTIC_RESTART_COUNT "
    "SLURM_JOB_ID SLURM_STEP_ID SLURM_JOB_PARTITION SLURM_JOB_NODELIST SLURM_STEP_NODELIST SLURM_NNODES "
    "SLURM_NTASKS SLURM_STEP_NUM_TASKS SLURM_STEP_TASKS_PER_NODE SLURM_PROCID SLURM_LOCALID SLURM_NODEID "
    "SLURM_RESTART_COUNT SLURM_CPUS_PER_TASK SLURM_GPUS_ON_NODE "
    "OMPI_COMM_WORLD_RANK OMPI_COMM_WORLD_SIZE OMPI_COMM_WORLD_LOCAL_RANK OMPI_COMM_WORLD_LOCAL_SIZE "
    "PMI_RANK PMI_SIZE MPI_LOCALRANKID MPI_LOCALNRANKS "
    "CUDA_VISIBLE_DEVICES CUDA_DEVICE_MAX_CONNECTIONS CUBLAS_WORKSPACE_CONFIG PYTORCH_CUDA_ALLOC_CONF "
    "NCCL_DEBUG NCCL_SOCKET_IFNAME NCCL_IB_HCA NCCL_IB_DISABLE GLOO_SOCKET_IFNAME OMP_NUM_THREADS"
).split()

_GIB = 1 << 30


@dataclass(frozen=True)
class Package:
    """One package that this code knows of."""

    name: str
    version: str | None
    """None: not installed."""
    used_for: str
    cost_of_lack: str
    """Empty: nothing."""


@dataclass(frozen=True)
class Device:
    """A GPU, or all cores of this host that the process may use."""

    kind: str
    """`cuda` or `cpu`."""
    name: str
    memory_gib: float | None
    """Of the device; for the CPU of the host. None: not known."""
    detail: str
    """Compute capability and multiprocessors, or cores."""


def installed_packages() -> list[Package]:
    """Python and the packages of `PACKAGES`, installed or not."""
    python = Package("python", platform.python_version(), "everything", "nothing runs")
    return [python, *(Package(name, _version(name), use, cost) for name, use, cost in PACKAGES)]


def visible_devices() -> list[Device]:
    """All CUDA devices that torch sees, then the CPU."""
    import torch

    devices = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        found = torch.cuda.get_device_properties(index)
        detail = (
            f"compute capability {found.major}.{found.minor}, {found.multi_processor_count} multiprocessors"
        )
        devices.append(Device("cuda", found.name, round(found.total_memory / _GIB, 1), detail))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = None
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        memory = round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / _GIB, 1)
    detail = f"{cores} of {os.cpu_count()} cores usable"
    return [*devices, Device("cpu", _cpu_name(), memory, detail)]


def launch_description(environ: Mapping[str, str] = os.environ) -> dict[str, Any]:
    """This process's place (`place`, or `problem` where variables contradict each other) and the launcher's
    `variables` that are set."""
    variables = {name: environ[name] for name in VARIABLES if name in environ}
    try:
        return {"place": asdict(read_process_env(environ)), "problem": None, "variables": variables}
    except LaunchError as error:
        return {"place": None, "problem": str(error), "variables": variables}


def torch_libraries() -> dict[str, str | None]:
    """Versions of what torch was built with: CUDA, cuDNN and NCCL; None where it has none."""
    import torch

    with_cuda = torch.version.cuda is not None
    nccl = torch.cuda.nccl.version() if with_cuda and torch.distributed.is_nccl_available() else None
    return {
        "cuda": torch.version.cuda,
        "cudnn": str(torch.backends.cudnn.version()) if with_cuda else None,
        "nccl": None if nccl is None else ".".join(map(str, nccl)),
    }


def code_version() -> str | None:
    """The commit of the checkout this code runs from, `+changes` if it was edited; None outside one."""
    root = Path(__file__).resolve().parents[2]
    try:
        commit = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty=+changes", "--abbrev=12"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
        return commit.stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
