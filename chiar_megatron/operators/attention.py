"""Multi-head causal attention with rotary positions, tensor- and sequence-parallel.

Weights are laid out as in Megatron-LM's GPT (`linear_qkv` grouped by key-value head, `linear_proj`), so
that its checkpoints convert name for name. Shapes: s sequence, b batch, h hidden, n query heads,
g key-value groups, d head size; `n` and `g` are this tensor-parallel rank's.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from chiar_megatron.operators.context import ForwardContext, LayerCache


class SelfAttention(MegatronModule):
    """Attention over all tokens' keys and values, or over those of light tokens only."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        rotary_base: float,
        pg_collection: ProcessGroupCollection,
    ) -> None:
        super().__init__(config=config)
        self.layer_number = layer_number
        self.tp_group = pg_collection.tp
        tensor_parallel_size = config.tensor_model_parallel_size
        self.head_size = config.kv_channels
        self.heads = config.num_attention_heads // tensor_parallel_size
        self.groups = config.num_query_groups // tensor_parallel_size
        self.rotary = RotaryEmbedding(config.kv_channels, rotary_base)
        query_width = config.num_attention_heads * config.kv_channels
        self.linear_qkv = ColumnParallelLinear(
            config.hidden_size,
            query_width + 2 * config.num_query_groups * config.kv_channels,
            config=config,
            init_method=config.init_method,
            bias=config.add_bias_linear,
            gather_output=False,
            tp_group=pg_collection.tp,
        )
        self.linear_proj = RowParallelLinear(
            query_width,
            config.hidden_size,
            config=config,
            init_method=config.output_layer_init_method,
            bias=config.add_bias_linear,
            input_is_parallel=True,
            skip_bias_add=False,
            tp_group=pg_collection.tp,
        )

    def forward(self, x_SBH: Tensor, context: ForwardContext, light_SB: Tensor | None = None) -> Tensor:
        """Attention's output `[s, b, h]` (this rank's part of the sequence, as the input).

        light_SB: bool over the whole sequence; given, only these tokens' keys and values are seen (and
        each token's own, so that no row is empty).
        """
        qkv_SBX, _ = self.linear_qkv(x_SBH)
        query_BNSD, key_BGSD, value_BGSD = self._split_heads(qkv_SBX)
        offset = context.position_offset
        query_BNSD = self.rotary(query_BNSD, offset)
        key_BGSD = self.rotary(key_BGSD, offset)
        light_BS = None if light_SB is None else light_SB.transpose(0, 1)
        if context.generation is not None:
            key_BGSD, value_BGSD, light_BS = self._extend_cache(key_BGSD, value_BGSD, light_BS, context)
        mask = None
        if offset > 0 or context.document_ids_BS is not None or light_BS is not None:
            mask = visible_keys(query_BNSD, key_BGSD, offset, context.document_ids_BS, light_BS)
        output_BNSD = self._attend(query_BNSD, key_BGSD, value_BGSD, mask)
        output_SBX = output_BNSD.permute(2, 0, 1, 3).flatten(2)
        output_SBH, _ = self.linear_proj(output_SBX)
        return output_SBH  # type: ignore[no-any-return]

    def _split_heads(self, qkv_SBX: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        s, b, _ = qkv_SBX.shape
        per_group = self.heads // self.groups
        grouped = qkv_SBX.view(s, b, self.groups, per_group + 2, self.head_size)
        query_SBGRD, key_SBGD, value_SBGD = (
            grouped[..., :per_group, :],
            grouped[..., per_group, :],
            grouped[..., per_group + 1, :],
        )
        query_BNSD = query_SBGRD.reshape(s, b, self.heads, self.head_size).permute(1, 2, 0, 3)
        return query_BNSD, key_SBGD.permute(1, 2, 0, 3), value_SBGD.permute(1, 2, 0, 3)

    def _attend(
        self, query_BNSD: Tensor, key_BGSD: Tensor, value_BGSD: Tensor, mask: Tensor | None
    ) -> Tensor:
        dropout = self.config.attention_dropout if self.training else 0.0
        # Under sequence parallelism the block has forked this stream already.
        fork = dropout > 0.0 and not self.config.sequence_parallel
        with get_cuda_rng_tracker().fork() if fork else nullcontext():
            return F.scaled_dot_product_attention(
                query_BNSD,
                key_BGSD,
                value_BGSD,
                attn_mask=mask,
                dropout_p=dropout,
                is_causal=mask is None,
                enable_gqa=self.heads != self.groups,
            )

    def _extend_cache(
        self, key_BGSD: Tensor, value_BGSD: Tensor, light_BS: Tensor | None, context: ForwardContext
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        state = context.generation
        assert state is not None
        batch, groups, new, size = key_BGSD.shape
        cache = state.layers.get(self.layer_number)
        if cache is None:
            shape = (batch, groups, state.capacity, size)
            cache = LayerCache(
                key_BGSD.new_empty(shape),
                value_BGSD.new_empty(shape),
                torch.ones(batch, state.capacity, dtype=torch.bool, device=key_BGSD.device),
            )
            state.layers[self.layer_number] = cache
        start, end = state.length, state.length + new
        cache.keys_BGSD[:, :, start:end] = key_BGSD
        cache.values_BGSD[:, :, start:end] = value_BGSD
        if light_BS is not None:
            cache.light_BS[:, start:end] = light_BS
            light_BS = cache.light_BS[:, :end]
        return cache.keys_BGSD[:, :, :end], cache.values_BGSD[:, :, :end], light_BS


class RotaryEmbedding(torch.nn.Module):
    """Rotate-half rotary positions over the whole head (RoFormer; halves as in Llama)."""

    def __init__(self, head_size: int, base: float) -> None:
        super().__init__()
        self.head_size = head_size
        self.base = base
        self._cos_SD = torch.empty(0, head_size)
        self._sin_SD = torch.empty(0, head_size)

    def forward(self, x_BNSD: Tensor, offset: int) -> Tensor:
        """Rotate `[b, n, s, d]` whose first token stands at position `offset`; same shape and dtype."""
        end = offset + x_BNSD.shape[2]
        if self._cos_SD.shape[0] < end or self._cos_SD.device != x_BNSD.device:
            self._build(max(end, 2 * self._cos_SD.shape[0]), x_BNSD.device)  # generation asks token by token
        cos_SD, sin_SD = self._cos_SD[offset:end], self._sin_SD[offset:end]
        x = x_BNSD.float()
        first, second = x.chunk(2, dim=-1)
        rotated = x * cos_SD + torch.cat((-second, first), dim=-1) * sin_SD
        return rotated.to(x_BNSD.dtype)

    def _build(self, length: int, device: torch.device) -> None:
        exponent = torch.arange(0, self.head_size, 2, dtype=torch.float32, device=device) / self.head_size
        frequency_D = self.base**-exponent
        angle_SD = torch.outer(torch.arange(length, dtype=torch.float32, device=device), frequency_D)
        angle_SD = torch.cat((angle_SD, angle_SD), dim=-1)
        self._cos_SD, self._sin_SD = angle_SD.cos(), angle_SD.sin()


def visible_keys(
    query_BNSD: Tensor,
    key_BGSD: Tensor,
    offset: int,
    document_ids_BS: Tensor | None,
    light_BS: Tensor | None,
) -> Tensor:
    """Bool mask `[b or 1, 1, queries, keys]`, True where a query, the first at `offset`, may look."""
    queries, keys = query_BNSD.shape[2], key_BGSD.shape[2]
    query_position = torch.arange(offset, offset + queries, device=query_BNSD.device)[:, None]
    key_position = torch.arange(keys, device=query_BNSD.device)[None, :]
    mask = (key_position <= query_position)[None]
    if light_BS is not None:
        mask = mask & (light_BS[:, None, :] | (key_position == query_position)[None])
    if document_ids_BS is not None:
        mask = mask & (document_ids_BS[:, offset : offset + queries, None] == document_ids_BS[:, None, :])
    return mask[:, None]
