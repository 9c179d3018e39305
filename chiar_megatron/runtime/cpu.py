"""What megatron-core 0.16.1 needs to run on a CPU with gloo: all of it stands here.

megatron-core names CUDA at its call sites (`device="cuda"`, `torch.cuda.current_device()`, tensor type
strings). `adapt_megatron_to_cpu` gives each loaded `megatron.core` module its own view of `torch` in
which those names mean the CPU; torch itself stays as it is, but for `Tensor.cuda`, which without CUDA
could only raise. Called once, by a process that computes on the CPU.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch

# Loaded before they are adapted: what training, pipelining, the optimizer and checkpoints use.
_MODULES = (
    "megatron.core.models.gpt",
    "megatron.core.distributed",
    "megatron.core.distributed.finalize_model_grads",
    "megatron.core.optimizer",
    "megatron.core.optimizer.distrib_optimizer",
    "megatron.core.pipeline_parallel.schedules",
    "megatron.core.pipeline_parallel.p2p_communication",
    "megatron.core.tensor_parallel.random",
    "megatron.core.dist_checkpointing",
    "megatron.core.dist_checkpointing.strategies.torch",
    "megatron.core.transformer.moe.moe_utils",
)
_FACTORIES = ("zeros", "ones", "empty", "full", "tensor", "arange", "zeros_like", "empty_like", "ones_like")

_adapted = False


def adapt_megatron_to_cpu() -> None:
    """Make megatron-core's CUDA call sites mean the CPU, for the rest of this process."""
    global _adapted
    if _adapted:
        return
    for name in _MODULES:
        importlib.import_module(name)
    view = _TorchOnCpu()
    for name, module in list(sys.modules.items()):
        if name.startswith("megatron.core") and getattr(module, "torch", None) is torch:
            setattr(module, "torch", view)
    _replace_random_states()
    _replace_gradient_clipping()
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]
    # Read by megatron-core without TransformerEngine, which would have defined it.
    moe_utils = sys.modules["megatron.core.transformer.moe.moe_utils"]
    if not hasattr(moe_utils, "te_general_gemm"):
        setattr(moe_utils, "te_general_gemm", None)
    _adapted = True


def is_adapted_to_cpu() -> bool:
    """Whether this process's megatron-core means the CPU where it says CUDA."""
    return _adapted


def name_parameters_as_cuda(parameters: Iterator[torch.nn.Parameter]) -> None:
    """Let `type()` of CPU parameters answer with CUDA's name: megatron-core's optimizers compare it."""
    for parameter in parameters:
        if parameter.device.type != "cpu":
            continue
        type_name = torch.Tensor.type(parameter).replace("torch.", "torch.cuda.")
        parameter.type = lambda *args, _name=type_name, **kwargs: _name  # type: ignore[method-assign]


class _CudaOnCpu:
    """`torch.cuda` as megatron-core sees it on a CPU: one device, in order, nothing to wait for."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cuda, name)

    @staticmethod
    def current_device() -> torch.device:
        return torch.device("cpu")

    @staticmethod
    def synchronize(*args: Any) -> None:
        return None

    @staticmethod
    def empty_cache() -> None:
        return None

    @staticmethod
    def stream(stream: Any) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    @staticmethod
    def current_stream(*args: Any) -> None:
        return None

    @staticmethod
    def get_rng_state(*args: Any) -> torch.Tensor:
        return torch.get_rng_state()

    @staticmethod
    def set_rng_state(state: torch.Tensor, *args: Any) -> None:
        torch.set_rng_state(state)

    @staticmethod
    def manual_seed(seed: int) -> None:
        torch.manual_seed(seed)


class _TorchOnCpu:
    """`torch` as megatron-core sees it on a CPU: factories asked for CUDA give CPU tensors."""

    def __init__(self) -> None:
        self.cuda = _CudaOnCpu()
        for name in _FACTORIES:
            setattr(self, name, _on_cpu(getattr(torch, name)))

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def build(*args: Any, **kwargs: Any) -> torch.Tensor:
        device = kwargs.get("device")
        if device is not None and torch.device(device).type == "cuda":
            kwargs["device"] = "cpu"
        return factory(*args, **kwargs)

    return build


def _replace_random_states() -> None:
    random = sys.modules["megatron.core.tensor_parallel.random"]

    def get_state(*args: Any, **kwargs: Any) -> torch.Tensor:
        return torch.get_rng_state()

    def set_state(new_state: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        torch.set_rng_state(new_state)

    class CpuRNGStatesTracker(random.CudaRNGStatesTracker):  # type: ignore[name-defined]
        """Named random streams on the CPU generator.

        The original warns when the CPU's generator moved while a CUDA stream was forked; here they are
        one and the same.
        """

        @contextlib.contextmanager
        def fork(self, name: str = "model-parallel-rng") -> Iterator[None]:
            before = torch.get_rng_state()
            outer: str = self._current_state_name  # type: ignore[has-type]
            if outer != "default-rng":
                self.states_[outer] = before
            torch.set_rng_state(self.states_[name])
            self._current_state_name = name
            try:
                yield
            finally:
                self.states_[name] = torch.get_rng_state()
                torch.set_rng_state(before if outer == "default-rng" else self.states_[outer])
                self._current_state_name = outer

    setattr(random, "_get_cuda_rng_state", get_state)
    setattr(random, "_set_cuda_rng_state", set_state)
    setattr(random, "CudaRNGStatesTracker", CpuRNGStatesTracker)
    random.initialize_rng_tracker(force_reset=True)


def _replace_gradient_clipping() -> None:
    """megatron-core's own asserts `grad.type() == 'torch.cuda.FloatTensor'` on tensors made each step."""

    def clip(
        parameters: list[torch.Tensor], max_norm: float, total_norm: float, use_decoupled_grad: bool = False
    ) -> None:
        assert not use_decoupled_grad, "decoupled gradients need TransformerEngine"
        coefficient = max_norm / (total_norm + 1.0e-6)
        gradients = [p.grad for p in parameters if p.grad is not None]
        if coefficient < 1.0 and gradients:
            torch._foreach_mul_(gradients, coefficient)

    setattr(sys.modules["megatron.core.optimizer.optimizer"], "clip_grad_by_total_norm_fp32", clip)
