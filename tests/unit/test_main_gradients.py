"""Gradients copied at once are those that megatron-core adds one by one, bit for bit."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from chiar_megatron.config.load import config_from_dict, resolve_config
from chiar_megatron.data.dataset import TokenBatch
from chiar_megatron.runtime.distributed import single_process_world
from chiar_megatron.training.engine import MegatronEngine
from chiar_megatron.training.main_gradients import CopiedGradients

MODEL = {
    "schedule": "D R A", "hidden_size": 64, "num_attention_heads": 2, "seq_length": 16, "vocab_size": 128,
    "router": {"kind": "learned", "target": 0.5},
}  # fmt: skip


def engine_of(copied: bool, micro_batches: int, precision: str) -> MegatronEngine:
    training = {"precision": precision, "global_batch_size": 2 * micro_batches, "micro_batch_size": 2}
    fields = {"model": MODEL, "training": {**training, "steps": 10}}
    config = resolve_config(config_from_dict(fields), vocab_size=None, eod_token=0)
    engine = MegatronEngine(config, single_process_world("cpu"))
    if copied:
        engine._train_pass = CopiedGradients(engine._train_pass, engine.chunks)
    return engine


def figures_of(engine: MegatronEngine, micro_batches: int) -> list[tuple[float, float]]:
    figures = []
    for step in range(3):
        ids = torch.randint(128, (micro_batches, 2, 17), generator=torch.Generator().manual_seed(step))
        batches = [
            TokenBatch(
                part[:, :-1].contiguous(), part[:, 1:].contiguous(), torch.ones(2, 16), None, torch.arange(2)
            )
            for part in ids
        ]
        result = engine.train_step(batches, step)
        figures.append((result.sums.loss, result.grad_norm))
    return figures


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_steps_are_the_same(precision, micro_batches):
    engines = (engine_of(copied, micro_batches, precision) for copied in (False, True))
    plain, copied = (figures_of(engine, micro_batches) for engine in engines)
    assert copied == plain


def test_an_engine_is_freed():
    engine = engine_of(True, 1, "bf16")
    figures_of(engine, 1)
    parameter = weakref.ref(next(engine.module.parameters()))
    del engine
    gc.collect()
    assert parameter() is None
