"""What one forward pass carries to every layer besides the hidden states.

megatron-core hands a `PackedSeqParams` through its blocks, pipelines and recomputation untouched; ours
extends it, so that each micro-batch keeps its own context however many are in flight.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor


@dataclass
class LayerCache:
    """Keys and values of the tokens seen so far, for generation. Shapes `[b, groups, capacity, d]`."""

    keys_BGSD: Tensor
    values_BGSD: Tensor
    light_BS: Tensor  # bool: which cached tokens went to attention, for `keys_values: routed`


@dataclass
class GenerationState:
    """State of one generated batch: what layers keep between calls, and how many tokens they have seen."""

    capacity: int
    length: int = 0
    layers: dict[int, LayerCache] = field(default_factory=dict)
    features_SBF: dict[int, Tensor] = field(default_factory=dict)  # RBF features by layer
    # For MetaRouter's `causal` pooling: sum of the embeddings of the last token's document, and their number.
    prefix_sum_BH: Tensor | None = None
    prefix_count_B1: Tensor | None = None


@dataclass
class ForwardContext(PackedSeqParams):
    """Context of one micro-batch; all tensors cover whole sequences, also where ranks hold parts of them.

    In generation tokens_BS are this call's tokens, document_ids_BS those of all tokens so far.

    tokens_BS: int64 ids, read by the random router.
    document_ids_BS: int64, number of each token's document; None: one document.
    forced_light_SB: layer number (from 1) -> bool decisions that replace the router's.
    recorded_light_SB, recorded_score_SB, recorded_entropy_SB: those that are not None are filled by routed
        layers, by layer number (this rank's part of the sequence); entropies only where a router has them.
    auxiliary_scale: factor of auxiliary losses: the tokens of this micro-batch (whole sequences), since the
        main loss is a sum over tokens.
    """

    tokens_BS: Tensor | None = None
    document_ids_BS: Tensor | None = None
    forced_light_SB: dict[int, Tensor] | None = None
    recorded_light_SB: dict[int, Tensor] | None = None
    recorded_score_SB: dict[int, Tensor] | None = None
    recorded_entropy_SB: dict[int, Tensor] | None = None
    auxiliary_scale: Any = 1.0
    generation: GenerationState | None = None

    @property
    def is_plain(self) -> bool:
        """Whether nothing is recorded, forced or generated: what a compiled layer is for."""
        recorded = (self.recorded_light_SB, self.recorded_score_SB, self.recorded_entropy_SB)
        return self.forced_light_SB is None and self.generation is None and recorded == (None, None, None)

    @property
    def position_offset(self) -> int:
        """Position of this call's first token within its sequence; above 0 only in generation."""
        return 0 if self.generation is None else self.generation.length


def sequence_shard(full_SX: Tensor, rank: int, size: int) -> Tensor:
    """Part `rank` of `size` of a `[s, ...]` tensor."""
    if size == 1:
        return full_SX
    return torch.chunk(full_SX, size, dim=0)[rank]
