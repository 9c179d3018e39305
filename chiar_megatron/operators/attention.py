"""Multi-head causal attention with rotary positions, tensor-, sequence- and context-parallel.

Weights are laid out as in Megatron-LM's GPT (`linear_qkv` grouped by key-value head, `linear_proj`), so
that its checkpoints convert name for name. Shapes: s sequence, b batch, h hidden, n query heads,
g key-value groups, d head size; `n` and `g` are this tensor-parallel rank's.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from chiar_megatron.config.schema import ModelConfig
from chiar_megatron.operators.context import ForwardContext, LayerCache
from chiar_megatron.operators.context_parallel import HeadExchange, PartedRows
from chiar_megatron.operators.parallel_linear import enter_tensor_parallel, parallel_linear
from chiar_megatron.operators.parallel_rows import enter_rows, leave_rows
from chiar_megatron.operators.residual_linear import linear_and_input, rows_keys_and_input
from chiar_megatron.operators.rotary import RotaryEmbedding, bias_for_split, split_and_rotate
from chiar_megatron.operators.routed_attention import rotated_attention
from chiar_megatron.operators.rows import TokenRows, take_rows


class SelfAttention(MegatronModule):
    """Attention over all tokens' keys and values, or over those of light tokens only."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        model: ModelConfig,
        pg_collection: ProcessGroupCollection,
    ) -> None:
        super().__init__(config=config)
        self.layer_number = layer_number
        self.tp_group = pg_collection.tp
        tensor_parallel_size = config.tensor_model_parallel_size
        self.head_size = config.kv_channels
        self.heads = config.num_attention_heads // tensor_parallel_size
        self.groups = config.num_query_groups // tensor_parallel_size
        self.per_group = self.heads // self.groups
        self.exchange = None
        if config.context_parallel_size > 1:
            self.exchange = HeadExchange(pg_collection.cp, self.heads, self.groups)
        self.rotary = RotaryEmbedding(
            config.kv_channels, model.rotary_base, model.seq_length, model.rotary_scaling
        )
        query_width = config.num_attention_heads * config.kv_channels
        self.linear_qkv = ColumnParallelLinear(
            config.hidden_size,
            query_width + 2 * config.num_query_groups * config.kv_channels,
            config=config,
            init_method=config.init_method,
            bias=config.add_qkv_bias,
            gather_output=False,
            skip_bias_add=True,
            tp_group=pg_collection.tp,
        )
        self.linear_proj = RowParallelLinear(
            query_width,
            config.hidden_size,
            config=config,
            init_method=config.output_layer_init_method,
            bias=config.add_bias_linear,
            input_is_parallel=True,
            skip_bias_add=True,
            tp_group=pg_collection.tp,
        )

    def forward(
        self,
        x_BSH: Tensor,
        context: ForwardContext,
        light_BS: Tensor | None = None,
        biased: bool = True,
    ) -> Tensor:
        """Attention's output `[b, s, h]` (this rank's part of the sequence, as the input).

        light_BS: bool over the whole sequence; given, only these tokens' keys and values are seen (and
        each token's own, so that no row is empty). biased: False leaves the output's bias to the caller.
        """
        own_bias, bias = bias_for_split(x_BSH, self.linear_qkv.bias)
        if self.config.tensor_model_parallel_size == 1:
            qkv_BSX = F.linear(x_BSH, self.linear_qkv.weight, own_bias)
        else:
            qkv_BSX = parallel_linear(self.linear_qkv, x_BSH, biased=False)
            qkv_BSX = qkv_BSX if own_bias is None else qkv_BSX + own_bias
        return self._attend_tokens(qkv_BSX, bias, context, light_BS, biased)

    def beside_residual(self, x_BSH: Tensor, context: ForwardContext) -> tuple[Tensor, Tensor]:
        """`forward` without the output's bias, and x for the residual sum with it, whose kernel gives
        both their gradient at once (`residual_linear`); one process has all heads."""
        own_bias, bias = bias_for_split(x_BSH, self.linear_qkv.bias)
        qkv_BSX, x_BSH = linear_and_input(x_BSH, self.linear_qkv.weight, own_bias)
        return self._attend_tokens(qkv_BSX, bias, context, None, biased=False), x_BSH

    def _attend_tokens(
        self,
        qkv_BSX: Tensor,
        bias: Tensor | None,
        context: ForwardContext,
        light_BS: Tensor | None,
        biased: bool,
    ) -> Tensor:
        grouped = qkv_BSX.unflatten(2, (self.groups, self.per_group + 2, self.head_size))
        offset, length = context.position_offset, grouped.shape[1]
        # A context-parallel rank holds the part of each sequence that begins here.
        first = offset if self.exchange is None else self.exchange.rank * length
        cos_S1D, sin_S1D = self.rotary.stretch(first, first + length, qkv_BSX.device)
        query_BSGRD, key_BSGD, value_BSGD = split_and_rotate(grouped, cos_S1D, sin_S1D, bias)
        query_BSND = query_BSGRD.flatten(2, 3)
        if self.exchange is not None:
            query_BSND, key_BSGD, value_BSGD = self.exchange.sequences(query_BSND, key_BSGD, value_BSGD)
        query_BNSD = query_BSND.transpose(1, 2)
        key_BGSD, value_BGSD = key_BSGD.transpose(1, 2), value_BSGD.transpose(1, 2)
        if context.generation is not None:
            key_BGSD, value_BGSD, light_BS = self._extend_cache(key_BGSD, value_BGSD, light_BS, context)
        mask = None
        if offset > 0 or context.document_ids_BS is not None or light_BS is not None:
            mask = visible_keys(query_BNSD, key_BGSD, offset, context.document_ids_BS, light_BS)
        output_BSND = self._attend(query_BNSD, key_BGSD, value_BGSD, mask).transpose(1, 2)
        if self.exchange is not None:
            output_BSND = self.exchange.tokens(output_BSND)
        return parallel_linear(self.linear_proj, output_BSND.flatten(2), biased)

    def forward_rows(self, x_BSH: Tensor, rows: TokenRows, context: ForwardContext, routed: bool) -> Tensor:
        """Attention's output `[b, s, h]` for the tokens that have a row; for others it means nothing.

        rows: over the whole micro-batch, also where ranks hold parts of it. routed: only those tokens' keys
        and values are seen, else all tokens'. Only rows get a query, scores and the output projection.
        """
        b = x_BSH.shape[0]
        parted = None if self.exchange is None else self.exchange.part(rows, b)
        own = rows if parted is None else parted.own
        if routed:
            key_KH = rows_RH = enter_rows(self.config, self.tp_group, x_BSH, own)
        else:
            # Gathered once, for keys and values and for queries too.
            key_KH = enter_tensor_parallel(self.config, self.tp_group, x_BSH).flatten(0, 1)
            rows_RH = take_rows(key_KH, own)
        # The bias is added once: to the rows, or where ranks sum their parts, after the sum.
        bias = self.linear_proj.bias
        own_bias = bias if self.config.tensor_model_parallel_size == 1 else None
        partial_RH = self._project_and_attend(rows_RH, key_KH, rows, b, context, own_bias, parted)
        out_BSH = leave_rows(self.config, self.tp_group, partial_RH, own, b)
        return out_BSH if bias is None or own_bias is not None else out_BSH + bias

    def rows_beside_residual(
        self, x_BSH: Tensor, rows: TokenRows, context: ForwardContext, routed: bool, biased: bool
    ) -> tuple[Tensor, Tensor]:
        """The rows `[R, h]` of `forward_rows`, and the tokens `[N, h]` for the residual sum, as in
        `beside_residual`. biased: with the output's bias."""
        x_NH = x_BSH.flatten(0, 1)
        for_queries, for_keys, bias = self._parted_projections(x_NH)
        of_tokens = (None, None) if routed else for_keys
        rows_RH, all_KX, x_NH = rows_keys_and_input(x_NH, rows, *of_tokens)
        kv_KX = F.linear(rows_RH, *for_keys) if all_KX is None else all_KX
        projected = self._by_head(F.linear(rows_RH, *for_queries), kv_KX)
        output_RX = self._attend_rows(*projected, rows, (x_BSH.shape[0], routed), context, bias)
        return F.linear(output_RX, self.linear_proj.weight, self.linear_proj.bias if biased else None), x_NH

    def _project_and_attend(
        self,
        rows_RH: Tensor,
        key_KH: Tensor,
        rows: TokenRows,
        b: int,
        context: ForwardContext,
        bias_H: Tensor | None,
        parted: PartedRows | None = None,
    ) -> Tensor:
        """From rows `[R, h]` of b sequences to their outputs; where ranks share the heads, to this rank's
        part of a sum.

        key_KH: what keys and values are made of, all tokens or (the same tensor) the rows. parted: given,
        both are this context-parallel rank's, as is the output, while `rows` are those of all.
        """
        routed = key_KH is rows_RH
        for_queries, for_keys, bias = self._parted_projections(rows_RH)
        query_RND, kv_KGYD = self._by_head(F.linear(rows_RH, *for_queries), F.linear(key_KH, *for_keys))
        if self.exchange is not None and parted is not None:
            query_RND = self.exchange.rows(query_RND, parted)
            kv_KGYD = self.exchange.keys_and_values(kv_KGYD, b, parted if routed else None)
        output_RX = self._attend_rows(query_RND, kv_KGYD, rows, (b, routed), context, bias)
        if self.exchange is not None and parted is not None:
            output_RND = output_RX.unflatten(1, (-1, self.head_size))
            output_RX = self.exchange.own_rows(output_RND, parted).flatten(1)
        return F.linear(output_RX, self.linear_proj.weight, bias_H)

    def _parted_projections(self, rows_RH: Tensor) -> tuple[Any, Any, Tensor | None]:
        """Weight and bias that make queries, those that make keys and values, and the bias of both whose
        gradient comes from the attention behind them (`bias_for_split`)."""
        own_bias, bias = self.linear_qkv.bias, None
        if self.exchange is None:
            own_bias, bias = bias_for_split(rows_RH, own_bias)
        weights = self._queries_first(self.linear_qkv.weight)
        biases = (None, None) if own_bias is None else self._queries_first(own_bias)
        return (weights[0], biases[0]), (weights[1], biases[1]), bias

    def _by_head(self, query_RX: Tensor, kv_KX: Tensor) -> tuple[Tensor, Tensor]:
        query_RND = query_RX.unflatten(1, (self.heads, self.head_size))
        return query_RND, kv_KX.unflatten(1, (self.groups, 2, self.head_size))

    def _attend_rows(
        self,
        query_RND: Tensor,
        kv_KGYD: Tensor,
        rows: TokenRows,
        layout: tuple[int, bool],
        context: ForwardContext,
        bias: Tensor | None,
    ) -> Tensor:
        """Outputs `[R, n·d]` of all rows; layout: sequences, and whether keys are the rows' alone."""
        b, routed = layout
        s = len(rows.has_row_N) // b
        if routed:
            of_keys = self.rotary(rows.index_R % s, s)
        else:
            of_keys = self.rotary.stretch(0, s, query_RND.device)
        angles = (of_keys[0].squeeze(1), of_keys[1].squeeze(1))
        ranges = key_ranges(rows, b, s, context.document_ids_BS, routed)
        return self._attend_rotated(query_RND, kv_KGYD, angles, ranges, bias).flatten(1)

    def _queries_first(self, qkv_X: Tensor) -> tuple[Tensor, Tensor]:
        """Of a weight or bias in Megatron's layout the queries' part, and that of keys and values: one copy,
        or none where a single group has them in this order already."""
        if self.groups > 1:
            grouped = qkv_X.unflatten(0, (self.groups, self.per_group + 2, self.head_size))
            parts = grouped.split((self.per_group, 2), dim=1)
            qkv_X = torch.cat([part.flatten(0, 2) for part in parts])
        query_X, kv_X = qkv_X.split((self.heads * self.head_size, 2 * self.groups * self.head_size))
        return query_X, kv_X

    def _attend_rotated(
        self, query_RND: Tensor, kv_KGYD: Tensor, angles: Any, ranges: Any, bias: Tensor | None
    ) -> Tensor:
        dropout = self.config.attention_dropout if self.training else 0.0
        if not self._drops_own_heads():
            return rotated_attention(query_RND, kv_KGYD, angles, ranges, dropout, bias)
        with get_cuda_rng_tracker().fork():
            return rotated_attention(query_RND, kv_KGYD, angles, ranges, dropout, bias)

    def _attend(
        self, query_BNSD: Tensor, key_BGSD: Tensor, value_BGSD: Tensor, mask: Tensor | None
    ) -> Tensor:
        attend = partial(
            F.scaled_dot_product_attention,
            attn_mask=mask,
            dropout_p=self.config.attention_dropout if self.training else 0.0,
            is_causal=mask is None,
            enable_gqa=query_BNSD.shape[1] != key_BGSD.shape[1],
        )
        if not self._drops_own_heads():
            return attend(query_BNSD, key_BGSD, value_BGSD)
        with get_cuda_rng_tracker().fork():
            return attend(query_BNSD, key_BGSD, value_BGSD)

    def _drops_own_heads(self) -> bool:
        """Whether to drop from the stream of this tensor-parallel rank, whose heads are its own; under
        sequence parallelism the block has entered it already."""
        shared = self.config.tensor_model_parallel_size == 1 or self.config.sequence_parallel
        return self.training and self.config.attention_dropout > 0.0 and not shared

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


def key_ranges(
    rows: TokenRows, b: int, s: int, document_ids_BS: Tensor | None, routed: bool
) -> tuple[Tensor, Tensor]:
    """First and last key that each row sees, int32 `[R]`: from the start of its sequence (or document) to
    itself. Keys are all tokens, or with `routed` the rows. Unused rows have the range (0, -1)."""
    tokens_N = torch.arange(b * s, device=rows.index_R.device)
    if document_ids_BS is None:
        start_N = tokens_N - tokens_N % s
    else:
        begins_BS = torch.ones_like(document_ids_BS, dtype=torch.bool)
        begins_BS[:, 1:] = document_ids_BS[:, 1:] != document_ids_BS[:, :-1]
        start_N = torch.where(begins_BS.flatten(), tokens_N, 0).cummax(0).values
    first_R, last_R = start_N[rows.index_R], rows.index_R
    if routed:
        # The number of rows before a token is the place of the first row from it on.
        before_N = rows.has_row_N.cumsum(0) - rows.has_row_N.long()
        first_R, last_R = before_N[first_R], torch.arange(len(first_R), device=first_R.device)
    first_R = torch.where(rows.valid_R, first_R, 0)
    return first_R.int(), torch.where(rows.valid_R, last_R, -1).int()


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
