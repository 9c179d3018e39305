"""µP: the coordinate check. After a few steps of Adam, what a layer's outputs and the logits moved by must
not depend on the width (Yang et al. 2022, arXiv:2203.03466, appendix D.1); without µP it grows with it."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from chiar_megatron.config.schema import OptimizerConfig, RunConfig
from chiar_megatron.config.validate import check_config
from chiar_megatron.data.dataset import TokenBatch
from chiar_megatron.errors import ConfigError
from chiar_megatron.operators.context import ForwardContext
from chiar_megatron.runtime.distributed import single_process_world
from chiar_megatron.training.engine import MegatronEngine
from tests.unit.tiny_models import tiny_config

WIDTHS = (32, 64, 128, 256)
VOCAB, LENGTH, BATCH, STEPS = 61, 24, 8, 4


def config_of(width: int, mup: bool) -> RunConfig:
    """Heads of 16; CHIAR with a learned router that keeps no share, so that decisions do not matter much."""
    config = tiny_config(
        dict(kind="learned"),
        hidden_size=width,
        num_attention_heads=width // 16,
        vocab_size=VOCAB,
        norm="pre",
        tie_embeddings=False,
        init_std=0.1,
        mup_base_hidden_size=32 if mup else None,
    )
    optimizer = OptimizerConfig(
        lr=1e-2, decay_steps=100, wsd_decay_steps=1, schedule="constant", weight_decay=0.0
    )
    return replace(
        config,
        optimizer=optimizer,
        training=replace(config.training, global_batch_size=BATCH, micro_batch_size=BATCH, seed=7),
    )


def batch() -> TokenBatch:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(VOCAB, (BATCH, LENGTH + 1), generator=generator)
    return TokenBatch(
        ids[:, :-1].contiguous(),
        ids[:, 1:].contiguous(),
        torch.ones(BATCH, LENGTH),
        None,
        torch.arange(BATCH),
    )


def coordinates(engine: MegatronEngine) -> dict[str, Tensor]:
    """Outputs of every layer and the logits, of one batch."""
    seen: dict[str, Tensor] = {}

    def keep(name: str):
        def hook(module, inputs, output):
            seen[name] = (output[0] if isinstance(output, tuple) else output).detach().clone()

        return hook

    module = engine.module
    parts = {f"layer {i}": layer for i, layer in enumerate(module.chiar_layers)} | {
        "logits": module.output_layer
    }
    hooks = [part.register_forward_hook(keep(name)) for name, part in parts.items()]
    module.eval()
    with torch.no_grad():
        module(batch().tokens_BS, ForwardContext())
    module.train()
    for hook in hooks:
        hook.remove()
    return seen


def slopes(mup: bool) -> dict[str, float]:
    """Exponent with which the mean |change| of each part's coordinates grows with the width."""
    moved: dict[str, list[float]] = {}
    for width in WIDTHS:
        engine = MegatronEngine(config_of(width, mup), single_process_world("cpu"))
        before = coordinates(engine)
        for step in range(STEPS):
            engine.train_step([batch()], step)
        for name, after in coordinates(engine).items():
            moved.setdefault(name, []).append(float((after - before[name]).abs().mean()))
    return {name: float(np.polyfit(np.log(WIDTHS), np.log(sizes), 1)[0]) for name, sizes in moved.items()}


def test_coordinates_move_alike_at_every_width():
    with_mup, without = slopes(True), slopes(False)
    # The head's initial weights add a part that fades as 1/√width: from above, towards a constant.
    assert -0.4 < with_mup.pop("logits") < 0.1, with_mup
    assert max(map(abs, with_mup.values())) < 0.15, with_mup
    assert without["logits"] > 0.4 and max(without.values()) > 0.5, without


def test_initial_weights_and_rates_follow_the_width():
    narrow, wide = (
        MegatronEngine(config_of(width, True), single_process_world("cpu")) for width in (32, 128)
    )
    std = {
        name: (a.std().item(), b.std().item())
        for (name, a), (_, b) in zip(
            narrow.module.named_parameters(), wide.module.named_parameters(), strict=True
        )
        if a.dim() > 1 and "meta_router" not in name
    }
    expected = {"embedding": 1.0, "output_layer": 4.0, "router.score": 4.0, "linear": 2.0}
    for name, (small, large) in std.items():
        ratio = next(ratio for part, ratio in expected.items() if part in name)
        assert math.isclose(small / large, ratio, rel_tol=0.35 if "router" in name else 0.06), name
    wide.learning_rate.set(0)
    rates = {id(p): g["lr"] for g in wide.optimizer.param_groups for p in g["params"]}
    for name, parameter in wide.module.named_parameters():
        slow = parameter.dim() > 1 and "embedding" not in name
        assert rates[id(parameter)] == pytest.approx(1e-2 / 4 if slow else 1e-2), name


def test_mup_needs_a_head_of_its_own():
    config = config_of(64, True)
    with pytest.raises(ConfigError, match="model.mup_base_hidden_size: 32 needs a head"):
        check_config(replace(config, model=replace(config.model, tie_embeddings=True)))
