"""What each process of the layouts' tests on GPUs runs: some steps and validations, layout after layout."""

from __future__ import annotations

import gc
import sys
import time
from dataclasses import dataclass, field
from typing import Any, Optional

import torch

from chiar_megatron.config.load import config_from_dict, resolve_config
from chiar_megatron.runtime.distributed import shutdown
from chiar_megatron.training.engine import MegatronEngine
from tests.parallel.workers_parity import read_step, start_layout


@dataclass
class Trained:
    """What any rank knows of a run."""

    losses: list[float] = field(default_factory=list)
    gradient_norms: list[float] = field(default_factory=list)
    validations: list[float] = field(default_factory=list)


def train(recipes: dict[str, dict[str, Any]], steps: int, evaluate_every: int) -> dict[str, Trained]:
    """Train every recipe from its start, with a validation now and then; then leave the others, with the last
    engine and its graph still there, as a run does."""
    trained: dict[str, Trained] = {}
    engine: Optional[MegatronEngine] = None
    for name, recipe in recipes.items():
        begun = time.monotonic()
        del engine
        gc.collect()  # a graph holds its activations
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        engine, trained[name] = _one(recipe, steps, evaluate_every)
        print(f"{name}: {time.monotonic() - begun:.1f} s", file=sys.stderr, flush=True)
    shutdown()
    return trained


def _one(recipe: dict[str, Any], steps: int, evaluate_every: int) -> tuple[MegatronEngine, Trained]:
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
    return engine, trained
