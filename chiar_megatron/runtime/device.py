"""Which device a process computes on, and with how many threads."""

from __future__ import annotations

import os

import torch

from chiar_megatron.errors import ConfigError
from chiar_megatron.runtime.paths import look_for_kernels, prefer_attention_backends

_device = torch.device("cpu")


def current_device() -> torch.device:
    """The device `select_device` chose for this process; the CPU before that."""
    return _device


def select_device(kind: str, local_rank: int) -> torch.device:
    """The device of this process: `auto` takes CUDA device `local_rank` if there is CUDA, else the CPU.

    Raises ConfigError if CUDA is asked for and missing, or has fewer devices than processes.
    """
    global _device
    # One hardware queue keeps communication ahead of the computation that hides it (Megatron-LM's advice);
    # read when CUDA starts.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    _device = _find_device(kind, local_rank)
    if _device.type == "cuda":
        torch.cuda.set_device(_device)
    look_for_kernels(_device)
    prefer_attention_backends(_device)
    return _device


def _find_device(kind: str, local_rank: int) -> torch.device:
    if kind == "cpu" or (kind == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError(
            "runtime.device is cuda, but torch sees no CUDA device; use runtime.device=auto or cpu"
        )
    count = torch.cuda.device_count()
    if local_rank >= count:
        # SLURM may show each task only its own GPU.
        if count != 1:
            raise ConfigError(
                f"local rank {local_rank} has no GPU of its own: {count} visible; start one process a GPU"
            )
        local_rank = 0
    return torch.device("cuda", local_rank)


def set_threads(threads_per_process: int | None, local_world_size: int) -> int:
    """Set torch's CPU threads; by default the cores this process may use, shared among those on the host."""
    if threads_per_process is None:
        threads_per_process = max(1, len(os.sched_getaffinity(0)) // max(1, local_world_size))
    torch.set_num_threads(threads_per_process)
    return threads_per_process


def set_deterministic() -> None:
    """Only deterministic kernels: a repeated CUDA run gives the same bits (slower)."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=False)
    torch.backends.cudnn.benchmark = False
