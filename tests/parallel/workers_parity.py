"""What each process of the parity tests runs: many small models, one after the other, in given layouts.

A launch costs seconds, a case a fraction of one: process groups are built anew for every layout, the
processes and their connections are kept.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Optional

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallelConfig
from torch import Tensor

from chiar_megatron.config import mcore
from chiar_megatron.config.schema import ParallelConfig, RunConfig
from chiar_megatron.data.dataset import TokenBatch
from chiar_megatron.data.loader import BatchLayout
from chiar_megatron.model.initialize import global_name
from chiar_megatron.runtime.distributed import World, initialize
from chiar_megatron.runtime.env import read_process_env
from chiar_megatron.training.decisions import DecisionRecorder, DecisionReplay
from chiar_megatron.training.engine import MegatronEngine

STEPS = 6
BUCKET_SIZE = 3000  # parameters; megatron-core's 40 million would make one bucket of a small model
DOCUMENT_END = 0


@dataclass
class Piece:
    """What one rank holds of a parameter: enough to put the whole together."""

    shard: Tensor
    partition_dim: Optional[int]
    partition_stride: int
    tensor_parallel_rank: int


@dataclass
class Answer:
    """One rank's view of one case in one layout."""

    losses: list[float] = field(default_factory=list)
    z_losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    gates: list[Optional[float]] = field(default_factory=list)
    fractions: list[list[float]] = field(default_factory=list)
    overflows: list[list[float]] = field(default_factory=list)
    initial: dict[str, Piece] = field(default_factory=dict)
    gradients: dict[str, Piece] = field(default_factory=dict)
    light: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    scores: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    tensor_parallel_group: tuple[int, ...] = ()


def read_batch(config: RunConfig, samples: range) -> TokenBatch:
    """Random samples, each a function of its position in the stream."""
    model = config.model
    assert model.vocab_size is not None
    rows = []
    for sample in samples:
        generator = torch.Generator().manual_seed(1000 + sample)
        row = torch.randint(1, model.vocab_size, (model.seq_length + 1,), generator=generator)
        row[torch.rand(row.shape, generator=generator) < 0.15] = DOCUMENT_END
        rows.append(row)
    text = torch.stack(rows)
    tokens_BS, labels_BS = text[:, :-1].contiguous(), text[:, 1:].contiguous()
    ends_BS = (tokens_BS == DOCUMENT_END).long()
    mask_BS = torch.ones(tokens_BS.shape)
    for row_S, sample in zip(mask_BS, samples, strict=True):
        row_S[: sample % 8] = 0.0  # micro-batches of unequal weight
    return TokenBatch(
        tokens_BS=tokens_BS,
        labels_BS=labels_BS,
        loss_mask_BS=mask_BS,
        document_ids_BS=ends_BS.cumsum(dim=1) - ends_BS if model.mask_documents else None,
        sample_ids_B=torch.tensor(list(samples)),
    )


def read_step(config: RunConfig, world: World, step: int) -> list[TokenBatch]:
    """This replica's micro-batches of a step."""
    training = config.training
    layout = BatchLayout(
        training.global_batch_size,
        training.micro_batch_size,
        world.data_parallel_rank,
        world.data_parallel_size,
    )
    return [read_batch(config, layout.positions(step, m)) for m in range(layout.num_micro_batches)]


def start_layout(parallel: ParallelConfig, config: RunConfig) -> World:
    """Process groups of another layout over the same processes."""
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    return initialize(parallel, config.runtime, read_process_env())


def train_case(
    config: RunConfig, world: World, steps: int, replay: Optional[Path], folder: Optional[Path] = None
) -> Answer:
    """Train `steps` steps; decisions are this model's own, or those recorded in `replay`."""
    mcore.DistributedDataParallelConfig = partial(DistributedDataParallelConfig, bucket_size=BUCKET_SIZE)
    recorder = DecisionRecorder(folder or Path("unused"))
    engine = MegatronEngine(config, world, recorder, DecisionReplay(replay) if replay else None)
    answer = Answer(tensor_parallel_group=_tensor_parallel_group())
    answer.initial = {name: _piece(p, p.data, world) for name, p in _named(engine)}
    for step in range(steps):
        result = engine.train_step(read_step(config, world, step), step)
        assert result.taken
        answer.losses.append(result.sums.loss)
        answer.z_losses.append(result.sums.z_loss)
        answer.grad_norms.append(result.grad_norm)
        answer.gates.append(result.sums.gate)
        answer.fractions.append(result.sums.routing.routed_fraction)
        answer.overflows.append(result.sums.routing.overflow_fraction)
        if step == 0 and not config.parallel.distributed_optimizer:
            answer.gradients = {name: _piece(p, p.main_grad, world) for name, p in _named(engine)}
    answer.light, answer.scores = recorder.light, recorder.scores
    if folder is not None:
        recorder.write(world.rank)
    return answer


def train_jobs(jobs: list[dict[str, Any]]) -> dict[tuple[str, str], dict[str, Answer]]:
    """Every job: one case in one layout, once with the recorded decisions and one step with its own.

    A job: layout (its name), parallel, case (its name), config, decisions (folder of the recording).
    """
    answers: dict[tuple[str, str], dict[str, Answer]] = {}
    current: Optional[ParallelConfig] = None
    world: Optional[World] = None
    for job in jobs:
        config = replace(job["config"], parallel=job["parallel"])
        if world is None or config.parallel != current:
            world, current = start_layout(config.parallel, config), config.parallel
        try:
            answers[job["layout"], job["case"]] = {
                "replayed": train_case(config, world, STEPS, _replay(config, job)),
                "free": train_case(config, world, 1, None),
            }
        except Exception as error:
            where = f"case {job['case']} in layout {job['layout']}"
            raise RuntimeError(f"{where}: {type(error).__name__}: {error}") from error
    return answers


def _replay(config: RunConfig, job: dict[str, Any]) -> Optional[Path]:
    """The one process's decisions, but where a capacity cuts them: forced ones it would leave whole."""
    return Path(job["decisions"]) if config.model.router.target is None else None


def _tensor_parallel_group() -> tuple[int, ...]:
    group = parallel_state.get_tensor_model_parallel_group()
    return tuple(torch.distributed.get_process_group_ranks(group))


def _named(engine: MegatronEngine) -> list[tuple[str, Any]]:
    return [(global_name(chunk, name), p) for chunk in engine.chunks for name, p in chunk.named_parameters()]


def _piece(parameter: Any, tensor: Tensor, world: World) -> Piece:
    split = getattr(parameter, "tensor_model_parallel", False)
    return Piece(
        tensor.detach().clone(),
        parameter.partition_dim if split else None,
        getattr(parameter, "partition_stride", 1),
        world.tensor_parallel_rank,
    )
