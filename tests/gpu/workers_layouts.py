"""What each process of the layouts' tests on GPUs runs: some steps and validations, layout after layout."""

from __future__ import annotations

import gc
from dataclasses import dataclass, field
from typing import Any

import torch

from chiar_megatron.config.load import config_from_dict, resolve_config
from chiar_megatron.training.engine import MegatronEngine
from tests.parallel.workers_parity import read_step, start_layout


@dataclass
class Trained:
    """What any rank knows of a run."""

    losses: list[float] = field(default_factory=list)
    gradient_norms: list[float] = field(default_factory=list)
    validations: list[float] = field(default_factory=list)


def train(recipes: dict[str, dict[str, Any]], steps: int, evaluate_every: int) -> dict[str, Trained]:
    """Train every recipe from its start, with a validation now and then."""
    return {name: _one(recipe, steps, evaluate_every) for name, recipe in recipes.items()}


def _one(recipe: dict[str, Any], steps: int, evaluate_every: int) -> Trained:
    config = resolve_config(config_from_dict(recipe), vocab_size=None, eod_token=0)
    world = start_layout(config.parallel, config)
    engine = MegatronEngine(config, world)
    trained = Trained()
    for step in range(steps):
        result = engine.train_step(read_step(config, world, step), step)
        trained.losses.append(result.sums.loss)
        trained.gradient_norms.append(result.grad_norm)
        if (step + 1) % evaluate_every == 0:
            trained.validations.append(engine.validation_loss(read_step(config, world, steps + step)))
    del engine
    gc.collect()  # a graph holds its activations
    if world.device.type == "cuda":
        torch.cuda.empty_cache()
    return trained
