"""What each process of the resume tests runs: whole runs, one after the other, each in its own layout."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any, Optional

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from chiar_megatron.config.load import config_from_dict
from chiar_megatron.config.schema import RunConfig
from chiar_megatron.data.loader import BatchLayout, micro_batches
from chiar_megatron.errors import ChiarError
from chiar_megatron.runtime.distributed import World, initialize
from chiar_megatron.runtime.env import read_process_env
from chiar_megatron.training.engine import MegatronEngine
from chiar_megatron.training.loop import pretrain, resolve, shared_streams


@dataclass
class Ending:
    """How a run ended on one rank."""

    exit_code: Optional[int] = None
    error: Optional[str] = None


def enter(config: RunConfig) -> World:
    """Process groups of this layout in place of the last one's; the processes stay connected."""
    if dist.is_initialized():
        parallel_state.destroy_model_parallel()
    return initialize(config.parallel, config.runtime, read_process_env())


def run_all(recipes: dict[str, dict[str, Any]]) -> dict[str, Ending]:
    """`pretrain` with each recipe, in order; errors of the user are answers."""
    logging.basicConfig(level=logging.WARNING)
    endings = {}
    for name, content in recipes.items():
        config = config_from_dict(content)
        world = enter(config)
        try:
            endings[name] = Ending(exit_code=pretrain(config, world))
        except ChiarError as error:
            endings[name] = Ending(error=str(error))
        dist.barrier()
    return endings


def poison_each_rank(recipe: dict[str, Any]) -> list[dict[str, Any]]:
    """`poison` of each rank in turn."""
    return [poison(recipe, rank) for rank in range(2)]


def poison(recipe: dict[str, Any], rank: int) -> dict[str, Any]:
    """Four steps of which the second finds an undefined weight on one rank only.

    Returns by step whether it was taken, and whether the weights are then as before it.
    """
    config = resolve(config_from_dict(recipe))
    world = enter(config)
    streams = shared_streams(config)
    assert streams.train is not None
    engine = MegatronEngine(config, world)
    layout = BatchLayout(
        config.training.global_batch_size,
        config.training.micro_batch_size,
        world.data_parallel_rank,
        world.data_parallel_size,
    )
    taken, unchanged, moments = [], [], []
    for step in range(4):
        weight = next(p for name, p in engine.module.named_parameters() if name.endswith("linear_fc1.weight"))
        kept = weight.detach().clone()
        if step == 1 and world.rank == rank:
            with torch.no_grad():
                weight[0, 0] = float("nan")
        before = _weights(engine)
        state_before = _moments(engine)
        result = engine.train_step(list(micro_batches(streams.train, step, layout)), step)
        taken.append(result.taken)
        after = _weights(engine)
        unchanged.append(
            all(torch.equal(before[n].nan_to_num(7.0), after[n].nan_to_num(7.0)) for n in before)
        )
        moments.append(all(torch.equal(a, b) for a, b in zip(state_before, _moments(engine), strict=True)))
        if step == 1:
            with torch.no_grad():
                weight.copy_(kept)
    return {"taken": taken, "unchanged": unchanged, "moments_unchanged": moments}


def _weights(engine: MegatronEngine) -> dict[str, torch.Tensor]:
    return {
        name: tensor.detach().clone()
        for name, tensor in engine.module.state_dict().items()
        if isinstance(tensor, torch.Tensor)
    }


def _moments(engine: MegatronEngine) -> list[torch.Tensor]:
    return [
        tensor.clone()
        for inner in engine.optimizer.chained_optimizers
        for state in inner.optimizer.state.values()
        for tensor in state.values()
    ]
