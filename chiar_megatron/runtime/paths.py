"""Which implementation each part of a step takes on this machine, decided here and nowhere else."""

from __future__ import annotations

import importlib.util

import torch

from chiar_megatron.config.routing import has_fixed_rows
from chiar_megatron.config.schema import ParallelConfig, RunConfig

HOPPER, OLDEST_WITH_KERNELS = (9, 0), (8, 0)

_runs_kernels = False


def has_triton() -> bool:
    """Whether Triton, which comes with torch for CUDA, can be imported."""
    return importlib.util.find_spec("triton") is not None


def kernels_available(device: torch.device) -> bool:
    """Whether our Triton kernels run on this device: CUDA of compute capability 8.0 or later."""
    return device.type == "cuda" and _runs_kernels


def look_for_kernels(device: torch.device) -> None:
    """Find out once, for the process: compiled layers ask, and could not look into the answer's making."""
    global _runs_kernels
    _runs_kernels = device.type == "cuda" and has_triton()
    _runs_kernels = _runs_kernels and torch.cuda.get_device_capability(device) >= OLDEST_WITH_KERNELS


def holds_whole_layers(parallel: ParallelConfig) -> bool:
    """Whether one process computes a layer alone, with no other in the midst of it."""
    return parallel.tensor_model_parallel_size == parallel.context_parallel_size == 1


def compiles(device: torch.device, wanted: bool | None = None) -> bool:
    """Whether layers are compiled; wanted: what the recipe says, None where it leaves it open."""
    if wanted is not None:
        return wanted
    return device.type == "cuda" and has_triton()


def would_compile(config: RunConfig) -> bool:
    """Whether a CUDA device with Triton would compile this recipe's layers."""
    return config.runtime.compile is not False


def would_replay(config: RunConfig) -> bool:
    """Whether a CUDA device with our kernels would replay forward and backward of this recipe's steps as a
    CUDA graph, transfers between ranks included."""
    return why_launched(config) is None


def why_launched(config: RunConfig) -> str | None:
    """Why the host must launch every kernel of this recipe's steps; None if they can be replayed."""
    training, runtime = config.training, config.runtime
    routed = "R" in config.model.schedule
    reasons = {
        "runtime.cuda_graph is false": runtime.cuda_graph is False,
        "rows vary (fixed by model.router.target and capacity)": (
            routed and not has_fixed_rows(config.model.router)
        ),
        "decisions are recorded or replayed": bool(runtime.record_decisions or runtime.replay_decisions),
        # They drop what they dropped before only if the host sets the generator back.
        "layers with dropout are recomputed": training.recompute == "full" and config.model.dropout > 0.0,
        # A graph may choose other algorithms than the first steps, which run without it.
        "training.deterministic": training.deterministic,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def replays_steps(config: RunConfig, device: torch.device) -> bool:
    """Whether this device does so."""
    return device.type == "cuda" and kernels_available(device) and would_replay(config)


def prefer_attention_backends(device: torch.device) -> None:
    """Let full attention take cuDNN before flash before the rest, where Hopper has it: at 16 heads of 64
    it was 1.5 times as fast forward and backward (DESIGN, section 2). Once, for the process."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= HOPPER:
        from torch.nn.attention import SDPBackend

        order = (
            SDPBackend.CUDNN_ATTENTION,
            SDPBackend.FLASH_ATTENTION,
            SDPBackend.EFFICIENT_ATTENTION,
            SDPBackend.MATH,
        )
        torch._C._set_sdp_priority_order([int(backend) for backend in order])  # type: ignore[call-overload]


def full_attention_backend(device: torch.device) -> str:
    """The backend that bf16 full attention takes, in a word."""
    if device.type != "cuda":
        return "SDPA (CPU)"
    return "SDPA: cuDNN" if torch.cuda.get_device_capability(device) >= HOPPER else "SDPA: flash"


def describe_paths(device: torch.device) -> list[tuple[str, str, str]]:
    """(part, path taken, why, or what is missing and what it costs), for logs and `chiar doctor`."""
    kernels, on_gpu = kernels_available(device), device.type == "cuda"
    missing = "no CUDA device" if not on_gpu else "Triton is missing or the GPU is older than Ampere"
    rows = [("full attention", full_attention_backend(device), "the best one of this torch for the device")]
    if kernels:
        rows.append(("routed attention", "Triton kernel", "half precision; float32 by SDPA with a mask"))
        spectral = "half precision; float32 by matrix products"
        rows.append(("spectral entropy and mixing", "Triton kernel", spectral))
        rows.append(("cross entropy", "Triton kernel", "also over shards of the vocabulary"))
    else:
        cost = "keys in whole blocks of queries" if not on_gpu else "every key for every light query"
        rows.append(("routed attention", "PyTorch", f"{missing}; costs {cost}"))
        rows.append(("spectral entropy and mixing", "PyTorch", f"{missing}; costs a transform's traffic"))
        rows.append(("cross entropy", "PyTorch", f"{missing}; costs float32 logits"))
    if compiles(device):
        rows.append(("layers", "torch.compile", "around the transfers between ranks"))
    else:
        rows.append(("layers", "eager", f"{missing}; runtime.compile=true compiles on a CPU too"))
    optimizer = "fused AdamW of torch, clipping inside it" if on_gpu else "AdamW of torch"
    rows.append(("optimizer", optimizer, "megatron-core's, on float32 master weights in bf16"))
    return rows
