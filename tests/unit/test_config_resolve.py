"""Presets, and the nulls that `resolve_config` fills in."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from chiar_megatron.config.load import load_config, resolve_config
from chiar_megatron.config.presets import PRESETS
from chiar_megatron.config.schedule import parse_schedule
from chiar_megatron.config.schema import ModelConfig, RunConfig
from chiar_megatron.config.validate import check_config
from chiar_megatron.errors import ConfigError
from chiar_megatron.routing.entropy import spectral_entropy
from tests.unit.config_fields import with_fields

EXAMPLE_400M = Path(__file__).parents[2] / "examples" / "chiar_400m" / "recipe.yaml"


# Presets


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_preset_loads_checks_and_resolves(name: str) -> None:
    config = with_fields(model__preset=name)
    check_config(config, world_size=1)
    resolved = resolve_config(config, vocab_size=500, eod_token=0)
    check_config(resolved, world_size=1)
    layers = parse_schedule(resolved.model.schedule)
    if name.endswith("-twin"):
        chiar = with_fields(model__preset=name.removesuffix("-twin")).model
        assert set(layers) == {"A"}
        assert len(layers) == len(parse_schedule(chiar.schedule))
        same = dataclasses.replace(
            resolved.model, preset=chiar.preset, schedule=chiar.schedule, meta_router=chiar.meta_router
        )
        assert (
            same
            == resolve_config(dataclasses.replace(config, model=chiar), vocab_size=500, eod_token=0).model
        )
    else:
        assert (layers[0], set(layers[1:-1]), layers[-1]) == ("D", {"R"}, "A")
    assert resolved.model.meta_router.enabled is not name.endswith("-twin")


@pytest.mark.parametrize(
    ("name", "hidden", "heads", "layers", "seq", "vocab", "dropout"),
    [
        ("tiny", 64, 4, 4, 128, None, 0.0),
        ("17m", 256, 4, 4, 256, 50257, 0.0),
        ("400m", 1024, 16, 28, 256, 50257, 0.1),
    ],
)
def test_preset_has_the_published_sizes(
    name: str,
    hidden: int,
    heads: int,
    layers: int,
    seq: int,
    vocab: int | None,
    dropout: float,
) -> None:
    model = with_fields(model__preset=name).model
    assert (model.hidden_size, model.num_attention_heads) == (hidden, heads)
    assert (model.seq_length, model.vocab_size, model.dropout) == (seq, vocab, dropout)
    assert len(parse_schedule(model.schedule)) == layers


def test_400m_example_has_the_published_training_and_checks_on_eight_gpus() -> None:
    config = load_config(EXAMPLE_400M)
    check_config(config, world_size=8)
    optimizer = config.optimizer
    assert (optimizer.lr, optimizer.min_lr, optimizer.warmup_steps) == (1e-4, 1e-6, 1000)
    assert (optimizer.beta1, optimizer.beta2, optimizer.weight_decay) == (0.9, 0.95, 0.01)
    assert (optimizer.clip_grad, optimizer.schedule) == (1.0, "cosine")
    assert config.training.global_batch_size == 128
    assert config.model.preset == "400m"


# Resolving


def test_resolve_fills_every_null_it_promises() -> None:
    config = with_fields(run_dir="runs/x", model__hidden_size=96, training__steps=250)
    resolved = resolve_config(config, vocab_size=1000, eod_token=3)
    model, optimizer = resolved.model, resolved.optimizer
    assert (model.num_query_groups, model.kv_channels, model.ffn_hidden_size) == (4, 24, 384)
    assert (model.vocab_size, resolved.data.eod_token) == (1000, 3)
    assert (optimizer.decay_steps, optimizer.wsd_decay_steps) == (250, 25)
    assert resolved.data.cache_dir == "runs/x/index_cache"
    assert resolve_config(resolved, vocab_size=1000, eod_token=3) == resolved
    assert resolve_config(resolved, vocab_size=None, eod_token=None) == resolved


def test_resolve_keeps_what_the_recipe_gives() -> None:
    config = with_fields(
        model__num_query_groups=2, model__kv_channels=8, model__ffn_hidden_size=30, model__vocab_size=1024,
        model__router__threshold=0.25, data__eod_token=0, data__cache_dir="c", optimizer__decay_steps=7,
        optimizer__wsd_decay_steps=2,
    )  # fmt: skip
    resolved = resolve_config(config, vocab_size=1000, eod_token=3)
    assert resolved == config


@pytest.mark.parametrize(("hidden", "width"), [(128, 384), (96, 256), (1024, 2752), (4096, 10944), (3, 64)])
def test_swiglu_width(hidden: int, width: int) -> None:
    config = with_fields(model__activation="swiglu", model__hidden_size=hidden, model__kv_channels=2)
    assert resolve_config(config, vocab_size=10, eod_token=None).model.ffn_hidden_size == width


@pytest.mark.parametrize(
    ("kind", "threshold"),
    [
        ("entropy", 0.8954),
        ("entropy_gated", 0.8954),
        ("learned", 0.0),
        ("random", 0.75),
        ("soft", None),
        ("hard", None),
    ],
)
def test_threshold_by_router(kind: str, threshold: float | None) -> None:
    config = with_fields(model__hidden_size=1024, model__router={"kind": kind, "random_fraction": 0.25})
    assert resolve_config(config, vocab_size=10, eod_token=None).model.router.threshold == threshold


def test_entropy_threshold_elsewhere_is_that_of_noise() -> None:
    noise = torch.randn(4096, 96, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    model = ModelConfig(hidden_size=96)
    resolved = resolve_config(RunConfig(model=model), vocab_size=10, eod_token=None).model
    assert resolved.router.threshold == pytest.approx(spectral_entropy(noise).mean().item(), abs=1e-3)


@pytest.mark.parametrize(
    ("fields", "vocab", "message"),
    [
        ({"model__vocab_size": 500}, 1000, "model.vocab_size: 500 is smaller than the tokenizer's 1000; "
         "use at least 1000, or null"),
        ({}, None, "model.vocab_size: null, and there is no tokenizer"),
        ({"model__hidden_size": 99}, 10, "model.hidden_size: 99 is not divisible by "
         "model.num_attention_heads 4; change one, or set model.kv_channels"),
        ({"model__num_attention_heads": 0}, 10, "model.num_attention_heads: 0 must be at least 1"),
    ],
)  # fmt: skip
def test_resolve_refuses(fields: dict[str, Any], vocab: int | None, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        resolve_config(with_fields(**fields), vocab_size=vocab, eod_token=None)
    assert str(error.value).startswith(message)
