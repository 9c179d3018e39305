"""MetaRouter: the gate g over layer 1, `g·layer1(x) + (1-g)·x` (paper; pooling of DESIGN decision 4)."""

from __future__ import annotations

import torch
import torch.distributed.nn.functional as dist_functional
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor

from chiar_megatron.config.schema import MetaRouterConfig
from chiar_megatron.operators.context import ForwardContext, GenerationState
from chiar_megatron.operators.linear import Float32Linear
from chiar_megatron.operators.sequence_part import SequencePart
from chiar_megatron.runtime.device import current_device


class MetaRouter(torch.nn.Module):
    """g = σ(Linear(x̄)), float32.

    x̄ is, by `pooling`: `running` an average over past steps, of no step's own tokens; `batch` the mean of
    this micro-batch over batch and time (it sees the future); `causal` the mean of each token's prefix.
    """

    running_mean_H: Tensor
    running_weight: Tensor

    def __init__(
        self,
        config: MetaRouterConfig,
        hidden_size: int,
        part: SequencePart | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """part: of each sequence, that this process holds; None: all of it."""
        super().__init__()
        self.config = config
        self.part = part or SequencePart()
        device = current_device()
        self.gate_proj = Float32Linear(hidden_size, 1, dtype)
        self.register_buffer("running_mean_H", torch.zeros(hidden_size, device=device))
        # Share of the average that steps have filled; dividing by it corrects the start from zero.
        self.register_buffer("running_weight", torch.zeros((), device=device))
        self.pending_sum_H = torch.zeros(hidden_size, dtype=torch.float64, device=device)
        self.pending_gate = torch.zeros((), dtype=torch.float64, device=device)
        self.pending_tokens = torch.zeros((), dtype=torch.float64, device=device)
        self.last_gate = torch.zeros((), device=device)

    def forward(self, x_SBH: Tensor, context: ForwardContext) -> Tensor:
        """g, float32: `[1, 1, 1]`, or `[s, b, 1]` for `causal`."""
        x_SBH = x_SBH.float()
        if self.config.pooling == "running":
            pooled = (self.running_mean_H / self.running_weight.clamp_min(1e-12))[None, None]
        elif self.config.pooling == "batch":
            pooled = self._batch_mean(x_SBH)[None, None]
        else:
            pooled = self._prefix_mean(x_SBH, context)
        gate = torch.sigmoid(self.gate_proj(pooled))
        self.last_gate = gate.detach().mean()
        if self.training and torch.is_grad_enabled():  # once where the layer is recomputed
            self._accumulate(x_SBH)
        return gate

    @torch.no_grad()
    def _accumulate(self, x_SBH: Tensor) -> None:
        tokens = x_SBH.shape[0] * x_SBH.shape[1]
        if self.config.pooling == "running":
            self.pending_sum_H += x_SBH.sum(dim=(0, 1), dtype=torch.float64)
        self.pending_gate += self.last_gate.double() * tokens
        self.pending_tokens += tokens

    def take_pending(self) -> Tensor:
        """Sums over this rank's tokens since the last call, float64 `[h + 2]`: of the embeddings (0 unless
        `running`), of g, and the number of tokens. Starts anew."""
        pending = torch.cat((self.pending_sum_H, self.pending_gate[None], self.pending_tokens[None]))
        self.pending_sum_H.zero_()
        self.pending_gate.zero_()
        self.pending_tokens.zero_()
        return pending

    @torch.no_grad()
    def update_running(self, mean_H: Tensor, taken: Tensor) -> None:
        """Take one step's global mean `[h]` into the average, unless the step was skipped (taken: bool
        `[]`); called once a step, alike on every rank. No host synchronisation."""
        share = torch.where(taken, 1.0 - self.config.decay, 0.0)
        mean_H = torch.where(taken, mean_H.to(self.running_mean_H), 0.0)
        self.running_mean_H.mul_(1.0 - share).add_(share * mean_H)
        self.running_weight.mul_(1.0 - share).add_(share)

    def _batch_mean(self, x_SBH: Tensor) -> Tensor:
        sum_H = x_SBH.sum(dim=(0, 1))
        tokens = x_SBH.shape[0] * x_SBH.shape[1]
        if self.part.group is not None:
            # Every rank's loss depends on this sum through g: the gradient is summed too.
            sum_H = dist_functional.all_reduce(sum_H, group=self.part.group)
        return sum_H / (tokens * self.part.size)

    def _prefix_mean(self, x_SBH: Tensor, context: ForwardContext) -> Tensor:
        if self.part.group is not None:
            # Its backward sums what every rank's part sends back (torch's own fails in gloo's subgroups).
            x_SBH = gather_from_sequence_parallel_region(x_SBH, group=self.part.group)
        if context.document_ids_BS is None:
            sum_SBH = x_SBH.cumsum(dim=0)
            count_SB1 = torch.arange(1, x_SBH.shape[0] + 1, device=x_SBH.device)[:, None, None]
        else:
            sum_SBH, count_SB1 = _document_prefix(x_SBH, _new_documents(x_SBH, context))
        if context.generation is not None:
            sum_SBH, count_SB1 = _continue_prefix(sum_SBH, count_SB1, context, context.generation)
        mean_SBH = sum_SBH / count_SB1
        return self.part.own(mean_SBH)


def _new_documents(x_SBH: Tensor, context: ForwardContext) -> Tensor:
    """Document numbers `[s, b]` of this call's tokens."""
    assert context.document_ids_BS is not None
    first = context.position_offset
    return context.document_ids_BS[:, first : first + x_SBH.shape[0]].transpose(0, 1)


def _continue_prefix(
    sum_SBH: Tensor, count_SB1: Tensor, context: ForwardContext, state: GenerationState
) -> tuple[Tensor, Tensor]:
    """Add what earlier calls summed to the tokens that continue their document; remember the new sums."""
    if state.prefix_sum_BH is not None and state.prefix_count_B1 is not None:
        before_SBH, before_SB1 = state.prefix_sum_BH[None], state.prefix_count_B1[None]
        if context.document_ids_BS is not None:
            last_B = context.document_ids_BS[:, state.length - 1]
            continues_SB1 = (_new_documents(sum_SBH, context) == last_B)[..., None]
            before_SBH, before_SB1 = before_SBH * continues_SB1, before_SB1 * continues_SB1
        sum_SBH, count_SB1 = sum_SBH + before_SBH, count_SB1 + before_SB1
    state.prefix_sum_BH = sum_SBH[-1]
    state.prefix_count_B1 = count_SB1[-1].expand(sum_SBH.shape[1], 1)
    return sum_SBH, count_SB1


def _document_prefix(x_SBH: Tensor, ids_SB: Tensor) -> tuple[Tensor, Tensor]:
    """Sums and counts over the prefix of each token within its document.

    By doubling (Hillis and Steele, 1986): no sum ever crosses documents. A difference of two sums over
    the whole sequence would let the tokens of one document into the rounding of the next.
    """
    starts_SB = torch.ones_like(ids_SB, dtype=torch.bool)
    starts_SB[1:] = ids_SB[1:] != ids_SB[:-1]
    position_S1 = torch.arange(ids_SB.shape[0], device=ids_SB.device)[:, None]
    count_SB1 = (position_S1 - torch.where(starts_SB, position_S1, 0).cummax(dim=0).values + 1)[..., None]
    sum_SBH, step = x_SBH, 1
    while step < x_SBH.shape[0]:
        earlier_SBH = torch.where(count_SB1[step:] > step, sum_SBH[:-step], 0.0)
        sum_SBH = torch.cat((sum_SBH[:step], sum_SBH[step:] + earlier_SBH))
        step *= 2
    return sum_SBH, count_SB1
