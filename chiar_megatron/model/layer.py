"""One CHIAR layer: spectral (D), attention (A) or routed (R), then the feed-forward layer.

post (paper): `u = N_i(x + op_i(x))`, `out = N(u + FFN(u))`; pre: `u = x + op_i(N_i(x))`,
`out = u + FFN(N(u))`. Every operator has its own norm. The router reads x itself, un-normalised.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import BaseTransformerLayer, get_transformer_layer_offset
from megatron.core.utils import get_pg_rank
from torch import Tensor

from chiar_megatron.config.routing import has_fixed_rows
from chiar_megatron.config.schema import ModelConfig
from chiar_megatron.model.feed_forward import FeedForward
from chiar_megatron.model.rbf_operator import RBFOperator
from chiar_megatron.operators.attention import SelfAttention
from chiar_megatron.operators.context import ForwardContext
from chiar_megatron.operators.norm import (
    Norm,
    add_and_norm,
    choose_norm,
    fuses_norms,
    mark_sequence_parallel,
)
from chiar_megatron.operators.routed_update import can_fuse_update, fused_update
from chiar_megatron.operators.rows import TokenRows, take_rows
from chiar_megatron.operators.sequence_part import SequencePart
from chiar_megatron.operators.spectral_mixing import SpectralMixing
from chiar_megatron.routing.decision import RouteDecision
from chiar_megatron.routing.dispatch import can_skip, dispatch_dense, light_rows
from chiar_megatron.routing.meta_router import MetaRouter
from chiar_megatron.routing.router import blend_entropy, build_router
from chiar_megatron.routing.statistics import RoutingStatistics
from chiar_megatron.runtime.device import current_device


class ChiarLayer(MegatronModule, BaseTransformerLayer):
    """A layer of kind "D", "R" or "A" in megatron-core's TransformerBlock; `[s, b, h]` in and out."""

    def __init__(
        self,
        config: TransformerConfig,
        model: ModelConfig,
        kind: str,
        layer_number: int,
        pg_collection: ProcessGroupCollection,
        vp_stage: int | None = None,
    ) -> None:
        """layer_number: from 1, within this pipeline stage."""
        super().__init__(config=config)
        stage = vp_stage, get_pg_rank(pg_collection.pp)
        self.layer_number = layer_number + get_transformer_layer_offset(config, *stage)
        self.kind = kind
        self.model = model
        self.part = SequencePart.of(config, pg_collection)
        # The chunk's last output is sent to other ranks as it lies in memory.
        is_last = layer_number == get_num_layers_to_build(config, *stage)
        self.exchanges = is_last and (config.sequence_parallel or config.pipeline_model_parallel_size > 1)
        self.compiled: Callable[[Tensor, ForwardContext], Tensor] | None = None
        self._build_operators(pg_collection)
        self.mlp = FeedForward(config, tp_group=pg_collection.tp)
        self.pre_mlp_layernorm = Norm(config, config.hidden_size)
        self.meta_router = None
        if self.layer_number == 1 and model.meta_router.enabled:
            self.meta_router = MetaRouter(
                model.meta_router, config.hidden_size, self.part, config.params_dtype
            )
            mark_sequence_parallel(self.meta_router, config.sequence_parallel)

    def _build_operators(self, pg_collection: ProcessGroupCollection) -> None:
        config, model = self.config, self.model
        sequence_parallel = config.sequence_parallel
        self.router = None
        self.rbf = None
        self.statistics = RoutingStatistics() if self.kind == "R" else None
        if self.kind in "DR":
            self.spectral = SpectralMixing(config.hidden_size, config.params_dtype, current_device())
            mark_sequence_parallel(self.spectral, sequence_parallel)
            self.spectral_norm = Norm(config, config.hidden_size)
        if self.kind in "AR":
            self.self_attention = SelfAttention(config, self.layer_number, model, pg_collection)
            self.input_layernorm = Norm(config, config.hidden_size)
        if self.kind == "R":
            self.router = build_router(
                model.router, config.hidden_size, self.layer_number, config.params_dtype
            )
            mark_sequence_parallel(self.router, sequence_parallel)
            if _blends_rbf(model):
                self.rbf = RBFOperator(config, model, self.layer_number, pg_collection)
                self.rbf_norm = Norm(config, config.hidden_size)

    def forward(
        self, hidden_states: Tensor, packed_seq_params: ForwardContext, **unused: Any
    ) -> tuple[Tensor, None]:
        """megatron-core's layer interface: (output, context of cross attention), the latter None."""
        # Inside, the batch comes first: one sequence's keys lie together, and rows are numbered so. From
        # layer to layer memory stays in that order; only what ranks exchange needs the sequence first.
        x_BSH, context = hidden_states.transpose(0, 1), packed_seq_params
        # The compiled body is for training steps; evaluation has as many rows as there are light tokens.
        compute: Callable[[Tensor, ForwardContext], Tensor] = self.body
        if self.compiled is not None and self.training and context.is_plain:
            compute = self.compiled
        out_SBH = compute(x_BSH, context).transpose(0, 1)
        if self.meta_router is not None:
            gate = self.meta_router(hidden_states, context).to(out_SBH.dtype)
            out_SBH = gate * out_SBH + (1.0 - gate) * hidden_states
        return out_SBH.contiguous() if self.exchanges else out_SBH, None

    def compile(self) -> None:
        """Let training steps run the layer as compiled by torch; layers of one kind share the code. A routed
        layer with another number of rows in every step stays as it is."""
        if self.kind == "R" and not has_fixed_rows(self.model.router):
            return
        self.compiled = torch.compile(self.body, dynamic=False)

    def body(self, x_BSH: Tensor, context: ForwardContext) -> Tensor:
        """The layer without the MetaRouter's gate."""
        if self.kind == "R":
            u_BSH, same_BSH = self._routed(x_BSH, context)
        elif self.kind == "A":
            u_BSH, same_BSH = self._attended(x_BSH, context)
        else:
            u_BSH, same_BSH = self._residual(self.spectral_norm, x_BSH, self.spectral)
        if self.model.norm == "pre":
            return same_BSH + self.mlp(self.pre_mlp_layernorm(u_BSH))  # type: ignore[no-any-return]
        biased = not self._norm_adds_bias(x_BSH) or self.config.hidden_dropout > 0.0
        bias = None if biased else self.mlp.linear_fc2.bias
        return add_and_norm(self.pre_mlp_layernorm, same_BSH, self.mlp(u_BSH, biased), bias)[0]

    def _attended(self, x_BSH: Tensor, context: ForwardContext) -> tuple[Tensor, ...]:
        attention, norm = self.self_attention, self.input_layernorm
        if not self._norm_adds_bias(x_BSH):
            return self._residual(norm, x_BSH, lambda y_BSH: attention(y_BSH, context))
        if self.config.tensor_model_parallel_size == 1:
            out_BSH, x_BSH = attention.beside_residual(x_BSH, context)
        else:
            out_BSH = attention(x_BSH, context, biased=False)
        return add_and_norm(norm, x_BSH, out_BSH, attention.linear_proj.bias, users=2)

    def _norm_adds_bias(self, x_BSH: Tensor) -> bool:
        """Whether linear layers leave their bias to the kernel of the norm behind them."""
        return self.model.norm == "post" and self.training and fuses_norms(x_BSH)

    def _routed(self, x_BSH: Tensor, context: ForwardContext) -> tuple[Tensor, ...]:
        assert self.router is not None and self.statistics is not None
        decision = self.router(x_BSH.transpose(0, 1), context, self.part.shard)
        if can_skip(self.model.router, decision) and context.generation is None:
            rows = self._light_rows(decision, context)
            b, s = x_BSH.shape[0], rows.has_row_N.shape[0] // x_BSH.shape[0]
            kept_SB = self.part.own(rows.has_row_N.view(b, s).transpose(0, 1))
            self._count(decision, kept_SB, rows)
            return self._skipping(x_BSH, context, decision, rows, kept_SB)
        self._count(decision, decision.light_SB)
        if self.training:
            x_BSH = self._regularise(x_BSH, decision, context)
        return (self._densely(x_BSH, context, decision),) * 2

    def _count(self, decision: RouteDecision, kept_SB: Tensor, rows: TokenRows | None = None) -> None:
        # A recomputed layer passes twice, only the second time with gradients.
        if self.training and torch.is_grad_enabled() and self.statistics is not None:
            self.statistics.add(decision, kept_SB, rows)

    def _light_rows(self, decision: RouteDecision, context: ForwardContext) -> TokenRows:
        forced = context.forced_light_SB is not None
        light_SB, score_SB = decision.light_SB, decision.score_SB
        if self.part.size > 1:
            # One float a token, for both: what is dark needs no score.
            score_SB = self.part.whole(torch.where(light_SB, score_SB, -torch.inf))
            light_SB = score_SB > -torch.inf
        return light_rows(self.model.router, light_SB, score_SB, self.training, forced)

    def _skipping(
        self,
        x_BSH: Tensor,
        context: ForwardContext,
        decision: RouteDecision,
        rows: TokenRows,
        kept_SB: Tensor,
    ) -> tuple[Tensor, ...]:
        """Each token through its own operator alone; kept_SB: bool, those that attention computes."""
        light_BS = kept_SB.transpose(0, 1)
        pre = self.model.norm == "pre"
        routed_keys = self.model.router.keys_values == "routed"
        if not pre and can_fuse_update(x_BSH, rows, self.spectral_norm, self.config):
            return self._skipping_fused(x_BSH, context, decision, rows)
        attended_BSH = self.self_attention.forward_rows(
            self.input_layernorm(x_BSH) if pre else x_BSH, rows, context, routed_keys
        )
        if decision.gate_SB is not None:
            attended_BSH = attended_BSH * decision.gate_SB.transpose(0, 1)[..., None].to(x_BSH.dtype)
        own_rows = rows if self.part.size == 1 else None
        mixed_BSH = self.spectral(self.spectral_norm(x_BSH) if pre else x_BSH, ~light_BS, own_rows)
        u_BSH = x_BSH + torch.where(light_BS[..., None], attended_BSH, mixed_BSH)
        if not pre:
            u_BSH = choose_norm(light_BS, self.input_layernorm, self.spectral_norm, u_BSH)
        return u_BSH, u_BSH

    def _skipping_fused(
        self, x_BSH: Tensor, context: ForwardContext, decision: RouteDecision, rows: TokenRows
    ) -> tuple[Tensor, ...]:
        """Post-norm, by one kernel behind attention."""
        attention, gate_SB = self.self_attention, decision.gate_SB
        routed_keys = self.model.router.keys_values == "routed"
        # A gate multiplies the bias too.
        attended_RH, x_NH = attention.rows_beside_residual(
            x_BSH, rows, context, routed_keys, biased=gate_SB is not None
        )
        bias = attention.linear_proj.bias
        if gate_SB is not None:
            gate_R = take_rows(gate_SB.transpose(0, 1).flatten(), rows)
            attended_RH, bias = attended_RH * gate_R[:, None].to(x_BSH.dtype), None
        norms = (self.spectral_norm, self.input_layernorm)
        outputs = fused_update((x_NH, attended_RH), rows, (self.spectral.weight, bias), norms, users=2)
        return tuple(out_NH.view(x_BSH.shape) for out_NH in outputs)

    def _densely(self, x_BSH: Tensor, context: ForwardContext, decision: RouteDecision) -> Tensor:
        """Every operator for every token, then one result or a blend of them."""
        light_BS = None
        if self.model.router.keys_values == "routed":
            light_BS = self.part.whole(decision.light_SB.float()).transpose(0, 1) > 0.5

        def attention(y_BSH: Tensor) -> Tensor:
            out_BSH = self.self_attention(y_BSH, context, light_BS)
            if decision.gate_SB is not None:
                out_BSH = out_BSH * decision.gate_SB.transpose(0, 1)[..., None].to(out_BSH.dtype)
            return out_BSH  # type: ignore[no-any-return]

        def rbf(y_BSH: Tensor) -> Tensor:
            assert self.rbf is not None
            return self.rbf(y_BSH.transpose(0, 1), context).transpose(0, 1)  # type: ignore[no-any-return]

        operators = [(self.spectral_norm, self.spectral), (self.input_layernorm, attention)]
        if self.rbf is not None:
            operators.append((self.rbf_norm, rbf))
        outputs_SBH = [self._residual(norm, x_BSH, op, users=1)[0].transpose(0, 1) for norm, op in operators]
        return dispatch_dense(decision, outputs_SBH).transpose(0, 1)

    def _residual(
        self,
        norm: torch.nn.Module,
        x_BSH: Tensor,
        operator: Any,
        users: int = 2,
    ) -> tuple[Tensor, ...]:
        """The sum, in post-norm normalised, once for each user."""
        if self.model.norm == "post":
            return add_and_norm(norm, x_BSH, operator(x_BSH), users=users)
        return (x_BSH + operator(norm(x_BSH)),) * users

    def _regularise(self, x_BSH: Tensor, decision: RouteDecision, context: ForwardContext) -> Tensor:
        weight = self.model.router.collapse_weight
        if decision.weights_SBO is None or weight == 0.0:
            return x_BSH
        auxiliary = -weight * blend_entropy(decision.weights_SBO, self.part.sum)
        return AddAuxiliaryLoss.apply(x_BSH, auxiliary * context.auxiliary_scale)  # type: ignore[no-any-return,no-untyped-call]


class AddAuxiliaryLoss(torch.autograd.Function):
    """Passes its first input through and adds its second, a scalar, to the loss in the backward pass.

    A pipeline stage that does not compute the loss can thus still have a term of its own.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, auxiliary: Tensor) -> Tensor:
        """x unchanged."""
        ctx.shape, ctx.dtype, ctx.device = auxiliary.shape, auxiliary.dtype, auxiliary.device
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad_x: Tensor) -> tuple[Tensor, Tensor]:
        """The auxiliary loss counts fully."""
        return grad_x, torch.ones(ctx.shape, dtype=ctx.dtype, device=ctx.device)


def _blends_rbf(model: ModelConfig) -> bool:
    blends = model.router.kind in ("soft", "hard")
    return blends and model.router.operators == "spectral_attention_rbf"
