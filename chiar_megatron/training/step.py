"""One step: the forward pass of a micro-batch, and the one reduction of what all ranks counted."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from chiar_megatron.data.dataset import TokenBatch
from chiar_megatron.metrics.routing import BalanceSummary, RoutingSummary
from chiar_megatron.metrics.traces import StepTraces
from chiar_megatron.model.gpt import ChiarModel
from chiar_megatron.model.layer import ChiarLayer
from chiar_megatron.operators.context import ForwardContext
from chiar_megatron.routing.meta_router import MetaRouter
from chiar_megatron.routing.statistics import FIELDS, take_all
from chiar_megatron.runtime.distributed import World
from chiar_megatron.training.decisions import DecisionRecorder, DecisionReplay
from chiar_megatron.training.detail import Detail, of_all_layers
from chiar_megatron.training.packing import Packing

LOSS, Z_LOSS, TOKENS, STOP, SAVE = range(5)  # places of the scalars that every rank may add to
SCALARS = SAVE + 1


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
        tokens_BS, labels_BS, mask_BS = (
            self._moved(x_BS) for x_BS in (batch.tokens_BS, batch.labels_BS, batch.loss_mask_BS)
        )
        context = ForwardContext(tokens_BS=tokens_BS, auxiliary_scale=mask_BS.sum())
        if batch.document_ids_BS is not None:
            context.document_ids_BS = self._moved(batch.document_ids_BS)
        record = self.recorder is not None and model.training
        if record:
            context.recorded_light_SB, context.recorded_score_SB = {}, {}
        if self.replay is not None and model.training:
            context.forced_light_SB = self.replay.for_batch(batch, self.device)
        output = model(tokens_BS, context, labels=labels_BS)
        if record and self.recorder is not None:
            self.recorder.add(context, batch)
        return output, partial(_sum_loss, mask_BS)

    def _moved(self, x_BS: Tensor) -> Tensor:
        """On the device, from pinned memory: else the host would wait for all the device has yet to do."""
        if x_BS.device.type == self.device.type:
            return x_BS
        return x_BS.pin_memory().to(self.device, non_blocking=True)


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
    balance: BalanceSummary | None
    """Of steps that are told in detail."""
    traces: StepTraces | None


@dataclass(frozen=True)
class DeviceSums:
    """The same on the device, where the update needs it: one float64 tensor that all ranks hold alike."""

    packed: Tensor
    packing: Packing
    detail: Detail | None

    @property
    def loss(self) -> Tensor:
        """Sum of the main loss over all tokens, `[]`."""
        return self.packed[LOSS]

    @property
    def tokens(self) -> Tensor:
        """Tokens of the step, at least 1, `[]`."""
        return self.packed[TOKENS].clamp_min(1.0)

    @property
    def routing_LF(self) -> Tensor:
        """Routing counts of every layer, columns as in `statistics.FIELDS`."""
        return self.packing.part(self.packed, "routing")

    @property
    def embedding_mean_H(self) -> Tensor:
        """Mean embedding of the step (0 unless the MetaRouter's pooling is `running`)."""
        meta = self.packing.part(self.packed, "meta")
        return meta[:-2] / meta[-1].clamp_min(1.0)

    def read(self, packed: Tensor) -> StepSums:
        """packed: a copy of `self.packed` on the host."""
        parts = {name: self.packing.part(packed, name) for name in self.packing.shapes}
        gate_sum, meta_tokens = parts["meta"][-2:].tolist()
        loss, z_loss, tokens, stop, save = parts["scalars"].tolist()
        divisor = max(int(tokens), 1)
        routing = RoutingSummary.from_sums(parts["routing"])
        balance = traces = None
        if self.detail is not None:
            balance = BalanceSummary.from_parts(parts, routing.layers, self.detail.micro_batches)
            traces = StepTraces.from_parts(parts, routing.layers)
        return StepSums(
            loss=loss / divisor,
            z_loss=z_loss / divisor,
            tokens=int(tokens),
            gate=gate_sum / meta_tokens if meta_tokens > 0 else None,
            requests=Requests(stop=stop > 0.0, save=save > 0.0),
            routing=routing,
            balance=balance,
            traces=traces,
        )


def reduce_step(
    chunks: Sequence[ChiarModel],
    reports: list[Tensor],
    world: World,
    requests: Requests,
    detail: Detail | None = None,
) -> DeviceSums:
    """Sum every rank's counts in one all-reduce of about `hidden + 7·layers` numbers (float64), with
    `detail` a few more for each layer and replica.

    A number that several ranks hold alike is given by one of them. No host synchronisation.
    """
    config = chunks[0].config
    layers, hidden = config.num_layers, config.hidden_size
    scalars = torch.zeros(SCALARS, dtype=torch.float64, device=world.device)
    speaks_for_copies = world.tensor_parallel_rank == 0
    if reports and world.is_last_stage and speaks_for_copies:
        scalars[: TOKENS + 1] = torch.stack(reports).sum(0)
    scalars[STOP].fill_(float(requests.stop))
    scalars[SAVE].fill_(float(requests.save))
    owns_part = config.sequence_parallel or speaks_for_copies
    sums_LF = torch.zeros(layers, len(FIELDS), dtype=torch.float64, device=world.device)
    routed, counts = routed_layers(chunks), None
    if routed:
        counts = take_all([layer.statistics for layer in routed if layer.statistics is not None])
        if owns_part:
            rows = [layer.layer_number - 1 for layer in routed]
            sums_LF = of_all_layers(counts.sums_LF, rows, layers)
    meta = torch.zeros(hidden + 2, dtype=torch.float64, device=world.device)
    meta_router = meta_router_of(chunks)
    if meta_router is not None:
        taken = meta_router.take_pending()
        if owns_part:
            meta = taken
    parts = {"scalars": scalars, "routing": sums_LF, "meta": meta}
    if detail is not None:
        parts |= detail.parts(routed, counts, world, owns_part)
    # Every rank makes the same shapes, whatever layers it holds.
    packing = Packing({name: tuple(part.shape) for name, part in parts.items()})
    packed = packing.pack(parts)
    dist.all_reduce(packed)
    return DeviceSums(packed, packing, detail)


def routed_layers(chunks: Sequence[ChiarModel]) -> list[ChiarLayer]:
    """The routed layers of this process, in order."""
    return [layer for chunk in chunks for layer in chunk.chiar_layers if layer.kind == "R"]


def meta_router_of(chunks: Sequence[ChiarModel]) -> MetaRouter | None:
    """This process's MetaRouter, if layer 1 is here and has one."""
    gates = (layer.meta_router for chunk in chunks for layer in chunk.chiar_layers)
    return next((gate for gate in gates if gate is not None), None)


def validation_sums(reports: list[Any], world: World) -> tuple[float, int]:
    """Sum of the losses in nats and number of tokens over the whole world."""
    sums = torch.zeros(3, dtype=torch.float64, device=world.device)
    if reports and world.is_last_stage and world.tensor_parallel_rank == 0:
        sums += torch.stack(reports).sum(0)
    dist.all_reduce(sums)
    loss, _, tokens = sums.tolist()
    return loss, int(tokens)
