"""The recipe's sections of what surrounds training: reports, devices, time limits. The rest: `schema.py`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Optional


@dataclass(frozen=True)
class LoggingConfig:
    """What is reported, and where besides `metrics.jsonl`."""

    log_interval_steps: int = 1
    """Steps between lines of progress and of `metrics.jsonl`."""

    tensorboard: bool = False
    """Write TensorBoard events into `<run folder>/tensorboard`."""

    wandb_project: Optional[str] = None
    """Weights & Biases project; null: not used. Offline unless a key is set."""

    wandb_mode: Optional[Literal["online", "offline"]] = None
    """null: online if a key is configured, else offline."""

    routing_traces: int = 0
    """Newest sequences whose routing `<run folder>/routing_traces` keeps, for `chiar plan`; 0: none."""


@dataclass(frozen=True)
class RuntimeConfig:
    """Devices, ports and time limits of one launch."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: CUDA if there is one."""

    start_timeout_seconds: float = 300.0
    """How long ranks wait for each other at start."""

    collective_timeout_seconds: float = 600.0
    """How long one collective may take before the run is failed."""

    hang_seconds: Optional[float] = None
    """Without progress of a rank, after which it is named, stacks are written into `<run folder>/hangs` and
    the run ends, to be started again; longer than any step, save or batch of a validation takes. null: nine
    tenths of `collective_timeout_seconds`; 0: never."""

    threads_per_process: Optional[int] = None
    """CPU threads of one process. null: cores / processes on this host."""

    compile: Optional[bool] = None
    """Compile layers with torch.compile, around transfers between ranks. null: on CUDA; true: anywhere."""

    cuda_graph: Optional[bool] = None
    """false: never replay steps as a CUDA graph. null: on CUDA, where the shapes of a step are fixed; the log
    says why not."""

    record_decisions: Optional[str] = None
    """Write every routing decision, by sample and layer, to this folder (small runs only)."""

    replay_decisions: Optional[str] = None
    """Take routing decisions from such a folder instead of the routers: compares layouts exactly."""
