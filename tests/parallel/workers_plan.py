"""What each process of the planning tests runs: single layers, of whose forward pass autograd tells what it
keeps. Where a GPU has kernels for some of the tokens, stand-ins compute nothing, but keep what these do."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import chiar_megatron.operators.attention as attention
from chiar_megatron.config.schema import RunConfig
from chiar_megatron.model.build import build_model
from chiar_megatron.model.initialize import initialize_parameters
from chiar_megatron.operators.spectral_mixing import SpectralMixing
from tests.parallel.workers_parity import start_layout
from tests.unit.kept_bytes import bytes_kept


class _Keeps(torch.autograd.Function):
    """Saves what it is given; the first is passed on as a new tensor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *others: Tensor) -> Tensor:
        """A copy of x, which is saved only if it stands among the others too."""
        out = x.clone()
        ctx.save_for_backward(*others, out)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        """Never run."""
        raise AssertionError


def _rotated_attention(q_RND: Tensor, kv_KGYD: Tensor, angles: Any, ranges: Any, *_: Any) -> Tensor:
    """As `kernels/rotated_attention.py` saves: rotated queries, keys and values, rotated keys, output."""
    logsumexp = torch.empty(q_RND.shape[:2])
    turned = torch.empty_like(q_RND), torch.empty_like(kv_KGYD[:, :, 0])
    return _Keeps.apply(q_RND, kv_KGYD, *turned, logsumexp, *angles, *ranges)  # type: ignore[no-any-return,no-untyped-call]


def _mixed(self: SpectralMixing, x: Tensor, chosen: Tensor | None = None, rows: Any = None) -> Tensor:
    """As `kernels/spectral.py` saves: its input, numbers of tokens and flags. The output is not kept."""
    if chosen is None:
        return x * self.weight
    numbers = torch.zeros(chosen.numel(), dtype=torch.int32)
    return _Mixed.apply(x, numbers, chosen.clone())  # type: ignore[no-any-return,no-untyped-call]


class _Mixed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, numbers: Tensor, chosen: Tensor) -> Tensor:
        """A copy of x."""
        ctx.save_for_backward(x, numbers, chosen)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        """Never run."""
        raise AssertionError


def kept_by_layers(configs: dict[str, RunConfig]) -> dict[str, list[float]]:
    """By name of a config: bytes that each layer keeps on this rank, of one micro-batch."""
    attention.rotated_attention = _rotated_attention
    SpectralMixing.forward = _mixed  # type: ignore[method-assign]
    answers = {}
    for name, config in configs.items():
        model = build_model(config, start_layout(config.parallel, config)).train()
        initialize_parameters(model, seed=1)
        batch, length = config.training.micro_batch_size, config.model.seq_length
        answers[name] = [bytes_kept(layer, batch, length) for layer in model.chiar_layers]
    return answers
