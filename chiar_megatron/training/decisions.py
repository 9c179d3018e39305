"""Record routing decisions by sample and layer, and replay them in another layout.

Two layouts sum in another order, so a score next to τ may fall on either side; replaying one run's
decisions in the other leaves only rounding to compare. For small runs: every decision is kept.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from chiar_megatron.data.dataset import TokenBatch
from chiar_megatron.errors import DataError
from chiar_megatron.operators.context import ForwardContext

Key = tuple[int, int]  # (position of the sample in the stream, layer number from 1)


class DecisionRecorder:
    """Collects decisions (bool `[s]`) and scores (float32 `[s]`) of every training sample and layer."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.light: dict[Key, Tensor] = {}
        self.scores: dict[Key, Tensor] = {}

    def add(self, context: ForwardContext, batch: TokenBatch) -> None:
        """Take one micro-batch's decisions from its context, gathered over the sequence's parts."""
        for layer, light_SB in (context.recorded_light_SB or {}).items():
            score_SB = (context.recorded_score_SB or {})[layer]
            rows = _whole_sequence(light_SB.float(), batch) > 0.5
            scores = _whole_sequence(score_SB, batch)
            for column, sample in enumerate(batch.sample_ids_B.tolist()):
                self.light[sample, layer] = rows[:, column].cpu()
                self.scores[sample, layer] = scores[:, column].cpu()

    def write(self, rank: int) -> None:
        """Write this rank's part; every rank writes one file."""
        self.folder.mkdir(parents=True, exist_ok=True)
        torch.save({"light": self.light, "scores": self.scores}, self.folder / f"rank_{rank}.pt")


class DecisionReplay:
    """Reads what all ranks of another run recorded."""

    def __init__(self, folder: Path) -> None:
        """Raises DataError if the folder holds no recording."""
        files = sorted(folder.glob("rank_*.pt"))
        if not files:
            raise DataError(f"runtime.replay_decisions: no rank_*.pt in {folder}; record a run first")
        self.folder = folder
        self.light: dict[Key, Tensor] = {}
        for file in files:
            self.light.update(torch.load(file, weights_only=True)["light"])
        self.layers = sorted({layer for _, layer in self.light})

    def for_batch(self, batch: TokenBatch, device: torch.device) -> dict[int, Tensor]:
        """Decisions `[s, b]` of every routed layer for a micro-batch. Raises DataError if one is missing."""
        samples = batch.sample_ids_B.tolist()
        try:
            return {
                layer: torch.stack([self.light[sample, layer] for sample in samples], dim=1).to(device)
                for layer in self.layers
            }
        except KeyError as missing:
            raise DataError(f"{self.folder} has no decision for (sample, layer) {missing}") from None


def _whole_sequence(part_SB: Tensor, batch: TokenBatch) -> Tensor:
    size = batch.tokens_BS.shape[1] // part_SB.shape[0]
    if size == 1:
        return part_SB
    group = parallel_state.get_tensor_and_context_parallel_group()
    if dist.get_world_size(group) != size:  # tensor-parallel ranks hold the same part
        group = parallel_state.get_context_parallel_group()
    part_SB = part_SB.contiguous()
    parts = [torch.empty_like(part_SB) for _ in range(size)]
    dist.all_gather(parts, part_SB, group=group)
    return torch.cat(parts)
