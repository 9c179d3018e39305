"""The language model: megatron-core's GPTModel around CHIAR layers."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
from megatron.core.tensor_parallel.mappings import reduce_from_tensor_model_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import get_pg_rank
from torch import Tensor

from chiar_megatron.config.mcore import padded_vocab_size
from chiar_megatron.config.schema import ModelConfig
from chiar_megatron.model.block import block_spec
from chiar_megatron.model.layer import ChiarLayer
from chiar_megatron.operators.context import ForwardContext
from chiar_megatron.runtime.paths import kernels_available


class ChiarModel(GPTModel):
    """A pipeline stage of a CHIAR-Former, or one of its chunks; the whole model where there is one stage."""

    def __init__(
        self,
        config: TransformerConfig,
        model: ModelConfig,
        pg_collection: ProcessGroupCollection,
        z_loss: float = 0.0,
        vp_stage: int | None = None,
    ) -> None:
        """model: resolved (no nulls). z_loss: weight of `(ln Σ exp logits)²` a token; 0: not computed.
        vp_stage: which chunk of an interleaved pipeline's stage; None where a stage is one."""
        assert model.vocab_size is not None, "the config must be resolved"
        pipeline_rank, last = get_pg_rank(pg_collection.pp), config.pipeline_model_parallel_size - 1
        last_chunk = (config.virtual_pipeline_model_parallel_size or 1) - 1
        super().__init__(
            config=config,
            transformer_layer_spec=block_spec(config, model, pg_collection, vp_stage),
            vocab_size=padded_vocab_size(model.vocab_size, config.tensor_model_parallel_size),
            max_sequence_length=model.seq_length,
            pre_process=pipeline_rank == 0 and vp_stage in (None, 0),
            post_process=pipeline_rank == last and vp_stage in (None, last_chunk),
            share_embeddings_and_output_weights=model.tie_embeddings,
            position_embedding_type="none",  # rotary positions are applied inside attention
            pg_collection=pg_collection,
            vp_stage=vp_stage,
        )
        self.model = model
        self.z_loss = z_loss

    def forward(self, input_ids: Tensor, context: ForwardContext, labels: Tensor | None = None) -> Any:
        """On the last stage: with labels `[b, s]` the losses `[2, b, s]` float32 (cross entropy in nats and
        weighted z-loss), else logits `[b, s, padded vocabulary / tensor parallel size]`. On another
        stage: hidden states `[s, b, h]`."""
        return super().forward(input_ids, None, None, labels=labels, packed_seq_params=context)

    def compile_parts(self) -> None:
        """Let training steps run layers as compiled by torch."""
        for layer in self.chiar_layers:
            layer.compile()

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """Losses `[2, b, s]` from `logits` `[s, b, vocabulary shard]`, padding of the vocabulary excluded."""
        labels_SB = labels.transpose(0, 1)
        if self.config.tensor_model_parallel_size == 1:
            assert self.model.vocab_size is not None
            return whole_losses(logits, labels_SB, self.model.vocab_size, self.z_loss).transpose(1, 2)
        if kernels_available(logits.device):
            first, real = self._vocabulary_shard(logits.shape[-1])
            return _kernel_losses(logits, labels_SB - first, real, self.z_loss, self.tp_group).transpose(1, 2)
        labels_SB = labels_SB.contiguous()
        self._mask_padding(logits)
        # Taken first: the cross entropy below works inside the logits' memory.
        target_SB = self._target_logit(logits, labels_SB) if self.z_loss > 0.0 else None
        loss_SB = vocab_parallel_cross_entropy(logits, labels_SB)
        z_SB = torch.zeros_like(loss_SB)
        if target_SB is not None:
            z_SB = self.z_loss * (loss_SB + target_SB).square()
        return torch.stack((loss_SB, z_SB)).transpose(1, 2).contiguous()

    def _vocabulary_shard(self, width: int) -> tuple[int, int]:
        """First id of this rank's shard, and how many of its `width` ids are real."""
        first = get_pg_rank(self.tp_group) * width
        assert self.model.vocab_size is not None
        return first, max(0, min(width, self.model.vocab_size - first))

    def _mask_padding(self, logits: Tensor) -> None:
        _, real = self._vocabulary_shard(logits.shape[-1])
        if real < logits.shape[-1]:
            logits[..., real:] = torch.finfo(logits.dtype).min

    def _target_logit(self, logits_SBV: Tensor, labels_SB: Tensor) -> Tensor:
        first, real = self._vocabulary_shard(logits_SBV.shape[-1])
        index_SB = (labels_SB - first).clamp(0, logits_SBV.shape[-1] - 1)
        here_SB = (labels_SB >= first) & (labels_SB < first + real)
        # Indexed rather than gathered: gather's backward would insist on unchanged logits.
        position_S1 = torch.arange(logits_SBV.shape[0], device=logits_SBV.device)[:, None]
        row_1B = torch.arange(logits_SBV.shape[1], device=logits_SBV.device)[None, :]
        target_SB = logits_SBV[position_S1, row_1B, index_SB].float()
        target_SB = torch.where(here_SB, target_SB, 0.0)
        return reduce_from_tensor_model_parallel_region(target_SB, group=self.tp_group)  # type: ignore[no-any-return]

    @property
    def chiar_layers(self) -> list[ChiarLayer]:
        """The layers of this stage, in order."""
        return list(self.decoder.layers)


def whole_losses(logits_SBV: Tensor, labels_SB: Tensor, vocab_size: int, z_loss: float) -> Tensor:
    """Cross entropy in nats and weighted z-loss of each token, float32 `[2, s, b]`, where one process holds
    the whole vocabulary; ids from `vocab_size` on are padding."""
    if kernels_available(logits_SBV.device):
        return _kernel_losses(logits_SBV, labels_SB, vocab_size, z_loss)
    width = logits_SBV.shape[-1]
    logits_NV = logits_SBV.flatten(0, 1).float()
    if width > vocab_size:
        is_padding_V = torch.arange(width, device=logits_NV.device) >= vocab_size
        logits_NV = logits_NV.masked_fill(is_padding_V, -math.inf)
    loss_N = F.cross_entropy(logits_NV, labels_SB.flatten(), reduction="none")
    z_N = z_loss * logits_NV.logsumexp(-1).square() if z_loss > 0.0 else torch.zeros_like(loss_N)
    return torch.stack((loss_N, z_N)).view(2, *labels_SB.shape)


def _kernel_losses(
    logits_SBV: Tensor,
    labels_SB: Tensor,
    vocab_size: int,
    z_loss: float,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    from chiar_megatron.operators.kernels.cross_entropy import cross_entropy

    both = cross_entropy(logits_SBV.flatten(0, 1), labels_SB.flatten(), vocab_size, z_loss, group)
    return torch.stack(both).view(2, *labels_SB.shape)
