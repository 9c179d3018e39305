"""megatron-core's MLP with the paper's two dropouts: after the activation and after the output."""

from __future__ import annotations

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


class FeedForward(MLP):
    """Linear, GELU or SwiGLU, dropout, Linear, dropout: `[s, b, h]` to `[s, b, h]`."""

    def __init__(self, config: TransformerConfig, tp_group: torch.distributed.ProcessGroup) -> None:
        super().__init__(
            config,
            MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear),
            ffn_hidden_size=config.ffn_hidden_size,
            tp_group=tp_group,
        )

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Unlike megatron-core's, returns the output with its bias added."""
        inner, bias = self.linear_fc1(hidden_states)
        if bias is not None:
            inner = inner + bias
        if self.config.gated_linear_unit:
            gate, up = inner.chunk(2, dim=-1)
            inner = self.activation_func(gate) * up
        else:
            inner = self.activation_func(inner)
        output, bias = self.linear_fc2(self._dropout_inner(inner))
        if bias is not None:
            output = output + bias
        return F.dropout(output, self.config.hidden_dropout, self.training)

    def _dropout_inner(self, inner: Tensor) -> Tensor:
        if not self.training or self.config.hidden_dropout == 0.0:
            return inner
        # Each tensor-parallel rank holds other columns; under sequence parallelism the block has
        # forked this stream already.
        fork = not self.config.sequence_parallel
        with get_cuda_rng_tracker().fork() if fork else nullcontext():
            return F.dropout(inner, self.config.hidden_dropout, True)
