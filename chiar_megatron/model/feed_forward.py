"""megatron-core's MLP with the paper's two dropouts: after the activation and after the output."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from chiar_megatron.operators.activation import fuses_gelu, gelu
from chiar_megatron.operators.parallel_linear import parallel_linear


class FeedForward(MLP):
    """Linear, GELU or SwiGLU, dropout, Linear, dropout: `[b, s, h]` to `[b, s, h]`."""

    def __init__(self, config: TransformerConfig, tp_group: torch.distributed.ProcessGroup) -> None:
        super().__init__(
            config,
            MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear),
            ffn_hidden_size=config.ffn_hidden_size,
            tp_group=tp_group,
        )

    def forward(self, x_BSH: Tensor, biased: bool = True) -> Tensor:
        """Unlike megatron-core's, takes tokens batch first and returns the output with its bias added, or
        left to the caller."""
        inner_BSF = self._dropout_inner(self._inner(x_BSH))
        output_BSH = parallel_linear(self.linear_fc2, inner_BSF, biased, ordered=False)
        return F.dropout(output_BSH, self.config.hidden_dropout, self.training)

    def _inner(self, x_BSH: Tensor) -> Tensor:
        fc1 = self.linear_fc1
        if self.config.gated_linear_unit:
            gate, up = parallel_linear(fc1, x_BSH, ordered=False).chunk(2, dim=-1)
            return self.activation_func(gate) * up  # type: ignore[no-any-return]
        assert self.activation_func is F.gelu
        fused = fuses_gelu(x_BSH)
        inner_BSF = parallel_linear(fc1, x_BSH, biased=not fused, ordered=False)
        return gelu(inner_BSF, fc1.bias if fused else None)

    def _dropout_inner(self, inner_BSF: Tensor) -> Tensor:
        if not self.training or self.config.hidden_dropout == 0.0:
            return inner_BSF
        # Each tensor-parallel rank holds other columns; under sequence parallelism the block has
        # forked this stream already.
        fork = self.config.tensor_model_parallel_size > 1 and not self.config.sequence_parallel
        if not fork:
            return F.dropout(inner_BSF, self.config.hidden_dropout, True)
        with get_cuda_rng_tracker().fork():
            return F.dropout(inner_BSF, self.config.hidden_dropout, True)
