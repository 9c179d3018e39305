"""Worker of test_graphed.py."""

from __future__ import annotations

from typing import Any

from chiar_megatron.config.load import config_from_dict, resolve_config
from chiar_megatron.training.data_parallel import ReducedGradients, gather_again
from chiar_megatron.training.engine import MegatronEngine
from tests.parallel.workers_parity import read_step, start_layout

STEPS, VALIDATED_AFTER = 4, 2


def train(recipe: dict[str, Any]) -> dict[str, list[float]]:
    """Losses and one validation of a run as it is on a CPU and of one whose pass ends as a CUDA graph's does;
    `dispatched`: whether weights count as gathered after the validation, and after `gather_again`."""
    config = resolve_config(config_from_dict(recipe), vocab_size=None, eod_token=0)
    world = start_layout(config.parallel, config)
    told: dict[str, list[float]] = {"dispatched": []}
    for name in ("plain", "graphed"):
        engine = MegatronEngine(config, world)
        if name == "graphed":
            engine._train_pass = ReducedGradients(engine._train_pass, engine._reduce_gradients)
            engine._reduce_gradients = lambda: None
        told[name] = []
        for step in range(STEPS):
            told[name].append(engine.train_step(read_step(config, world, step), step).sums.loss)
            if step + 1 == VALIDATED_AFTER:
                told[name].append(engine.validation_loss(read_step(config, world, STEPS)))
                if name == "graphed":
                    told["dispatched"].append(float(dispatched(engine)))
                    gather_again(engine.wrapped)
                    told["dispatched"].append(float(dispatched(engine)))
    return told


def dispatched(engine: MegatronEngine) -> int:
    """How many groups of weights count as gathered, or as under way."""
    return sum(group.param_gather_dispatched for chunk in engine.wrapped for group in chunk.bucket_groups)
