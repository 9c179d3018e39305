"""RBF mixing as a layer's third operator: `FFN(W(Aφ))`, with a feed-forward layer of its own (paper)."""

from __future__ import annotations

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from chiar_megatron.config.schema import ModelConfig
from chiar_megatron.model.feed_forward import FeedForward
from chiar_megatron.operators.context import ForwardContext
from chiar_megatron.operators.norm import mark_sequence_parallel
from chiar_megatron.operators.rbf import causal_rbf_mixing, make_omega, rbf_features
from chiar_megatron.operators.sequence_part import SequencePart
from chiar_megatron.operators.transfers import gather_sequence
from chiar_megatron.runtime.device import current_device


class RBFOperator(MegatronModule):
    """`[s, b, h]` to `[s, b, h]`; where ranks hold parts of a sequence, each mixes its own queries."""

    omega: Tensor

    def __init__(
        self,
        config: TransformerConfig,
        model: ModelConfig,
        layer_number: int,
        pg_collection: ProcessGroupCollection,
    ) -> None:
        super().__init__(config=config)
        self.layer_number = layer_number
        self.part = SequencePart.of(config, pg_collection)
        omega = make_omega(config.hidden_size, model.rbf_features, model.rbf_gamma, seed=layer_number)
        self.register_buffer("omega", omega.to(current_device()))
        self.projection = torch.nn.Linear(
            2 * model.rbf_features, config.hidden_size, device=current_device(), dtype=config.params_dtype
        )
        mark_sequence_parallel(self.projection, config.sequence_parallel)
        self.feed_forward = FeedForward(config, tp_group=pg_collection.tp)

    def forward(self, x_SBH: Tensor, context: ForwardContext) -> Tensor:
        """The operator without residual or norm."""
        phi_SBF = rbf_features(x_SBH, self.omega)
        all_SBF, first = phi_SBF, context.position_offset
        if self.part.group is not None:
            all_SBF = gather_sequence(phi_SBF, group=self.part.group)
            first = self.part.rank * phi_SBF.shape[0]
        if context.generation is not None:
            seen = context.generation.features_SBF.get(self.layer_number)
            all_SBF = phi_SBF if seen is None else torch.cat((seen, phi_SBF))
            context.generation.features_SBF[self.layer_number] = all_SBF
        positions_Q = torch.arange(first, first + phi_SBF.shape[0], device=x_SBH.device)
        documents_SB = None if context.document_ids_BS is None else context.document_ids_BS.transpose(0, 1)
        mixed_SBF = causal_rbf_mixing(phi_SBF, all_SBF, positions_Q, documents_SB)
        projected_SBH = self.projection(mixed_SBF.to(x_SBH.dtype))
        out_BSH: Tensor = self.feed_forward(projected_SBH.transpose(0, 1))
        return out_BSH.transpose(0, 1)
