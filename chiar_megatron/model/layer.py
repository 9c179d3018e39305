"""One CHIAR layer: spectral (D), attention (A) or routed (R), then the feed-forward layer.

post (paper): `u = N_i(x + op_i(x))`, `out = N(u + FFN(u))`; pre: `u = x + op_i(N_i(x))`,
`out = u + FFN(N(u))`. Every operator has its own norm. The router reads x itself, un-normalised.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.tensor_parallel.mappings import reduce_from_tensor_model_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import BaseTransformerLayer, get_transformer_layer_offset
from megatron.core.utils import get_pg_rank
from torch import Tensor

from chiar_megatron.config.schema import ModelConfig
from chiar_megatron.model.feed_forward import FeedForward
from chiar_megatron.model.rbf_operator import RBFOperator
from chiar_megatron.operators.attention import SelfAttention
from chiar_megatron.operators.context import ForwardContext
from chiar_megatron.operators.norm import Norm, mark_sequence_parallel
from chiar_megatron.operators.spectral_mixing import SpectralMixing
from chiar_megatron.routing.decision import RouteDecision
from chiar_megatron.routing.dispatch import dispatch_dense
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
        offset = get_transformer_layer_offset(config, vp_stage, get_pg_rank(pg_collection.pp))
        self.layer_number = layer_number + offset
        self.kind = kind
        self.model = model
        self.tp_group = pg_collection.tp
        size = config.tensor_model_parallel_size
        self.sequence_shard = (get_pg_rank(pg_collection.tp), size) if config.sequence_parallel else (0, 1)
        self._build_operators(pg_collection)
        self.mlp = FeedForward(config, tp_group=pg_collection.tp)
        self.pre_mlp_layernorm = Norm(config, config.hidden_size)
        self.meta_router = None
        if self.layer_number == 1 and model.meta_router.enabled:
            group = pg_collection.tp if config.sequence_parallel else None
            self.meta_router = MetaRouter(model.meta_router, config.hidden_size, group, config.params_dtype)
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
            self.self_attention = SelfAttention(config, self.layer_number, model.rotary_base, pg_collection)
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
        x_SBH, context = hidden_states, packed_seq_params
        if self.kind == "R":
            u_SBH = self._routed(x_SBH, context)
        elif self.kind == "A":
            u_SBH = self._attention(x_SBH, context)
        else:
            u_SBH = self._spectral(x_SBH)
        if self.model.norm == "post":
            out_SBH = self.pre_mlp_layernorm(u_SBH + self.mlp(u_SBH))
        else:
            out_SBH = u_SBH + self.mlp(self.pre_mlp_layernorm(u_SBH))
        if self.meta_router is not None:
            gate = self.meta_router(x_SBH, context).to(x_SBH.dtype)
            out_SBH = gate * out_SBH + (1.0 - gate) * x_SBH
        return out_SBH, None

    def _routed(self, x_SBH: Tensor, context: ForwardContext) -> Tensor:
        assert self.router is not None and self.statistics is not None
        decision = self.router(x_SBH, context, self.sequence_shard)
        if self.training:
            self.statistics.add(decision)
            x_SBH = self._regularise(x_SBH, decision, context)
        outputs_SBH = [self._spectral(x_SBH), self._attention(x_SBH, context, decision)]
        if self.rbf is not None:
            outputs_SBH.append(self._residual(self.rbf_norm, x_SBH, lambda y: self.rbf(y, context)))
        return dispatch_dense(decision, outputs_SBH)

    def _spectral(self, x_SBH: Tensor) -> Tensor:
        return self._residual(self.spectral_norm, x_SBH, self.spectral)

    def _attention(
        self, x_SBH: Tensor, context: ForwardContext, decision: RouteDecision | None = None
    ) -> Tensor:
        light_SB = None
        if decision is not None and self.model.router.keys_values == "routed":
            light_SB = self._gather_light(decision)

        def operator(y_SBH: Tensor) -> Tensor:
            out_SBH = self.self_attention(y_SBH, context, light_SB)
            if decision is not None and decision.gate_SB is not None:
                out_SBH = out_SBH * decision.gate_SB[..., None].to(out_SBH.dtype)
            return out_SBH  # type: ignore[no-any-return]

        return self._residual(self.input_layernorm, x_SBH, operator)

    def _residual(self, norm: torch.nn.Module, x_SBH: Tensor, operator: Any) -> Tensor:
        if self.model.norm == "post":
            return norm(x_SBH + operator(x_SBH))  # type: ignore[no-any-return]
        return x_SBH + operator(norm(x_SBH))  # type: ignore[no-any-return]

    def _gather_light(self, decision: RouteDecision) -> Tensor:
        """Decisions of the whole sequence, which each rank needs to know whose keys are seen."""
        if not self.config.sequence_parallel:
            return decision.light_SB
        gathered: Tensor = gather_from_sequence_parallel_region(
            decision.light_SB.float(), tensor_parallel_output_grad=False, group=self.tp_group
        )
        return gathered > 0.5

    def _regularise(self, x_SBH: Tensor, decision: RouteDecision, context: ForwardContext) -> Tensor:
        weight = self.model.router.collapse_weight
        if decision.weights_SBO is None or weight == 0.0:
            return x_SBH

        def sum_over_shards(total_O: Tensor) -> Tensor:
            if not self.config.sequence_parallel:
                return total_O
            return reduce_from_tensor_model_parallel_region(total_O, group=self.tp_group)  # type: ignore[no-any-return]

        auxiliary = -weight * blend_entropy(decision.weights_SBO, sum_over_shards)
        return AddAuxiliaryLoss.apply(x_SBH, auxiliary * context.auxiliary_scale)  # type: ignore[no-any-return,no-untyped-call]


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
