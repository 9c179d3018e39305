"""Worker of test_vocabulary_shards.py."""

from __future__ import annotations

import torch

from chiar_megatron.config.schema import ParallelConfig, RuntimeConfig
from chiar_megatron.operators.kernels.cross_entropy import cross_entropy
from chiar_megatron.runtime.distributed import initialize, shutdown
from chiar_megatron.runtime.env import read_process_env


def losses(
    logits_NV: torch.Tensor, labels_N: torch.Tensor, vocab_size: int, z_loss: float
) -> tuple[torch.Tensor, ...]:
    """Cross entropy, z-loss and this rank's part of the gradient of their weighted sum."""
    env = read_process_env()
    runtime = RuntimeConfig(device="cpu", collective_timeout_seconds=30.0)
    initialize(ParallelConfig(tensor_model_parallel_size=env.world_size), runtime, env)
    from megatron.core import parallel_state

    width = logits_NV.shape[1] // env.world_size
    first = env.rank * width
    leaf = logits_NV[:, first : first + width].clone().requires_grad_()
    real = max(0, min(width, vocab_size - first))
    group = parallel_state.get_tensor_model_parallel_group()
    loss_N, z_N = cross_entropy(leaf * 1.0, labels_N - first, real, z_loss, group)
    (loss_N * torch.arange(1, len(loss_N) + 1) + 0.5 * z_N).sum().backward()
    shutdown()
    assert leaf.grad is not None
    return loss_N.detach(), z_N.detach(), leaf.grad
