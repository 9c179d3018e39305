"""One step: the forward pass of a micro-batch, and the one reduction of what all ranks counted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from chiar_megatron.data.dataset import TokenBatch
from chiar_megatron.metrics.routing import RoutingSummary
from chiar_megatron.model.gpt import ChiarModel
from chiar_megatron.operators.context import ForwardContext
from chiar_megatron.routing.meta_router import MetaRouter
from chiar_megatron.routing.statistics import FIELDS
from chiar_megatron.runtime.distributed import World
from chiar_megatron.training.decisions import DecisionRecorder, DecisionReplay

LOSS, Z_LOSS, TOKENS, STOP, SAVE = range(5)  # places of the scalars that every rank may add to


@dataclass(frozen=True)
class Requests:
    """What this rank asks all ranks to do after the step; any rank's request counts for all."""

    stop: bool = False
    save: bool = False


class ForwardStep:
    """megatron-core's forward step function, with this run's device, recorder and replay."""

    def __init__(
        self, device: torch.device, recorder: DecisionRecorder | None, replay: DecisionReplay | None
    ) -> None:
        self.device = device
        self.recorder = recorder
        self.replay = replay

    def __call__(
        self, batches: Iterator[TokenBatch], model: torch.nn.Module
    ) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]]:
        """(output of this stage, function from the last stage's output to its loss)."""
        batch = next(batches)
        tokens_BS = batch.tokens_BS.to(self.device, non_blocking=True)
        labels_BS = batch.labels_BS.to(self.device, non_blocking=True)
        mask_BS = batch.loss_mask_BS.to(self.device, non_blocking=True)
        context = ForwardContext(tokens_BS=tokens_BS, auxiliary_scale=mask_BS.sum())
        if batch.document_ids_BS is not None:
            context.document_ids_BS = batch.document_ids_BS.to(self.device, non_blocking=True)
        record = self.recorder is not None and model.training
        if record:
            context.recorded_light_SB, context.recorded_score_SB = {}, {}
        if self.replay is not None and model.training:
            context.forced_light_SB = self.replay.for_batch(batch, self.device)
        output = model(tokens_BS, context, labels=labels_BS)
        if record and self.recorder is not None:
            self.recorder.add(context, batch)
        return output, partial(_sum_loss, mask_BS)


def _sum_loss(mask_BS: Tensor, losses_TBS: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sum of the losses, number of tokens, and both again for the report (`[3]`: CE, z-loss, tokens)."""
    sums_T = (losses_TBS * mask_BS).sum(dim=(1, 2))
    tokens = mask_BS.sum()
    report = torch.cat((sums_T.detach().double(), tokens.double()[None]))
    return sums_T.sum(), tokens.int(), report


@dataclass(frozen=True)
class StepSums:
    """What the whole world counted in one step, on the host."""

    loss: float
    z_loss: float
    tokens: int
    gate: float | None
    requests: Requests
    routing: RoutingSummary
    embedding_mean_H: Tensor | None


def reduce_step(model: ChiarModel, reports: list[Tensor], world: World, requests: Requests) -> StepSums:
    """Sum every rank's counts in one all-reduce of about `hidden + 5·layers` numbers (float64).

    A number that several ranks hold alike is given by one of them.
    """
    layers, hidden = model.config.num_layers, model.config.hidden_size
    scalars = torch.zeros(SAVE + 1, dtype=torch.float64, device=world.device)
    speaks_for_copies = world.tensor_parallel_rank == 0
    if reports and world.is_last_stage and speaks_for_copies:
        scalars[: TOKENS + 1] = torch.stack(reports).sum(0)
    scalars[STOP], scalars[SAVE] = float(requests.stop), float(requests.save)
    owns_part = model.config.sequence_parallel or speaks_for_copies
    sums_LF = torch.zeros(layers, len(FIELDS), dtype=torch.float64, device=world.device)
    meta = torch.zeros(hidden + 2, dtype=torch.float64, device=world.device)
    for layer in model.chiar_layers:
        if layer.statistics is not None:
            taken_F = layer.statistics.take()
            if owns_part:
                sums_LF[layer.layer_number - 1] = taken_F
        if layer.meta_router is not None:
            taken = layer.meta_router.take_pending()
            if owns_part:
                meta = taken
    packed = torch.cat((scalars, sums_LF.flatten(), meta))
    dist.all_reduce(packed)
    scalars, sums, meta = packed.cpu().split((SAVE + 1, layers * len(FIELDS), hidden + 2))
    *_, gate_sum, meta_tokens = meta.tolist()
    is_running = model.model.meta_router.pooling == "running"
    tokens = max(int(scalars[TOKENS]), 1)
    return StepSums(
        loss=float(scalars[LOSS]) / tokens,
        z_loss=float(scalars[Z_LOSS]) / tokens,
        tokens=int(scalars[TOKENS]),
        gate=gate_sum / meta_tokens if meta_tokens > 0 else None,
        requests=Requests(stop=float(scalars[STOP]) > 0.0, save=float(scalars[SAVE]) > 0.0),
        routing=RoutingSummary.from_sums(sums.view(layers, len(FIELDS))),
        embedding_mean_H=meta[:-2] / meta_tokens if is_running and meta_tokens > 0 else None,
    )


def meta_router_of(model: ChiarModel) -> MetaRouter | None:
    """The stage's MetaRouter, if layer 1 is here and has one."""
    return next((layer.meta_router for layer in model.chiar_layers if layer.meta_router is not None), None)


def validation_sums(reports: list[Any], world: World) -> tuple[float, int]:
    """Sum of the losses in nats and number of tokens over the whole world."""
    sums = torch.zeros(3, dtype=torch.float64, device=world.device)
    if reports and world.is_last_stage and world.tensor_parallel_rank == 0:
        sums += torch.stack(reports).sum(0)
    dist.all_reduce(sums)
    loss, _, tokens = sums.tolist()
    return loss, int(tokens)
