"""What the step benchmark compares: its settings and the product's configs of every side."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from chiar_megatron.config.load import config_from_dict, resolve_config
from chiar_megatron.config.presets import PRESETS
from chiar_megatron.config.schema import RunConfig
from chiar_megatron.config.validate import check_config
from chiar_megatron.errors import ConfigError

PLAIN_SIDES = ("nanogpt", "nanogpt-cudnn")
"""The plain GPT, with torch's own choice of attention (flash) and with the one that is fastest on Hopper."""
SIDES = ("twin", "routed", *PLAIN_SIDES)
TINY_VOCAB = 512  # the tiny preset names no vocabulary


@dataclass(frozen=True)
class StepSettings:
    """Options of `chiar bench step`, defaults filled in for the device."""

    preset: str
    seq_length: int
    tokens_per_step: int
    micro_batch_size: int
    """Sequences."""
    steps: int
    warmup: int
    routed_warmup: int
    sides: tuple[str, ...]
    rhos: tuple[float, ...]
    routers: tuple[str, ...]
    precision: str
    compile: str
    """auto (as the product decides; the plain GPT on CUDA only), yes or no."""
    repeat_twin: bool
    check: bool
    check_compiled: bool
    """Whether the check runs compiled where the side does."""
    data: str | None
    vocab_size: int | None
    overrides: tuple[str, ...]
    profile: str | None
    seed: int

    @staticmethod
    def of(parsed: Any, device: torch.device) -> StepSettings:
        """From parsed arguments. Raises ConfigError for sizes that do not fit."""
        cuda = device.type == "cuda"
        preset = parsed.preset or ("400m" if cuda else "tiny")
        if f"{preset}-twin" not in PRESETS:
            names = ", ".join(name for name in PRESETS if f"{name}-twin" in PRESETS)
            raise ConfigError(f"--preset: {preset!r} has no full-attention twin; use one of {names}")
        seq_length = parsed.seq_length or (256 if cuda else 64)
        tokens = parsed.tokens_per_step or (32768 if cuda else 256)
        if tokens % seq_length:
            raise ConfigError(
                f"--tokens-per-step: {tokens} is no multiple of --seq-length {seq_length}; "
                f"use {-(-tokens // seq_length) * seq_length}"
            )
        unknown = [side for side in parsed.sides if side not in SIDES]
        if unknown:
            raise ConfigError(f"--sides: {unknown[0]!r} is unknown; use some of {', '.join(SIDES)}")
        return StepSettings(
            preset=preset,
            seq_length=seq_length,
            tokens_per_step=tokens,
            micro_batch_size=parsed.micro_batch_size or tokens // seq_length,
            steps=_first(parsed.steps, 50 if cuda else 3),
            warmup=_first(parsed.warmup, 10 if cuda else 1),
            routed_warmup=_first(parsed.routed_warmup, 30 if cuda else 2),
            sides=tuple(parsed.sides),
            rhos=tuple(parsed.rho),
            routers=tuple(parsed.router),
            precision=parsed.precision or ("bf16" if cuda else "fp32"),
            compile=parsed.compile,
            repeat_twin=parsed.repeat_twin,
            check=parsed.check,
            check_compiled=parsed.check_compiled,
            data=parsed.data,
            vocab_size=parsed.vocab_size,
            overrides=tuple(parsed.set),
            profile=parsed.profile,
            seed=parsed.seed,
        )


@dataclass(frozen=True)
class Side:
    """One thing to be timed."""

    name: str
    kind: str
    """product or nanogpt."""
    config: RunConfig
    """nanogpt takes its sizes and its batch from the twin's."""
    warmup: int


def sides_of(settings: StepSettings, world_size: int) -> list[Side]:
    """All sides in their order: the plain GPT, the twin, what is routed, and the twin once more."""
    twin = Side("twin", "product", twin_config(settings, world_size), settings.warmup)
    sides = []
    for name in PLAIN_SIDES:
        if name in settings.sides:
            sides.append(Side(name, "nanogpt", twin.config, settings.warmup))
    if "twin" in settings.sides:
        sides.append(twin)
    if "routed" in settings.sides:
        for router in settings.routers:
            for rho in settings.rhos:
                config = routed_config(settings, router, rho, world_size)
                sides.append(Side(f"{router} ρ={rho:g}", "product", config, settings.routed_warmup))
        if "twin" in settings.sides and settings.repeat_twin:
            sides.append(Side("twin again", "product", twin.config, settings.warmup))
    return sides


def twin_config(settings: StepSettings, world_size: int) -> RunConfig:
    """The product with attention in every layer."""
    fields = _common(settings) | {"model.preset": f"{settings.preset}-twin"}
    return _build(fields, settings, world_size)


def routed_config(settings: StepSettings, router: str, rho: float, world_size: int) -> RunConfig:
    """The product as published, with its controller at ρ."""
    fields = _common(settings) | {
        "model.preset": settings.preset,
        "model.router.kind": router,
        "model.router.target": rho,
    }
    return _build(fields, settings, world_size)


def _common(settings: StepSettings) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "model.dropout": 0.0,
        "model.seq_length": settings.seq_length,
        # The published learning rate; a schedule far longer than any benchmark.
        "optimizer.lr": 1e-4,
        "optimizer.warmup_steps": 1000,
        "training.steps": 100_000,
        "training.global_batch_size": settings.tokens_per_step // settings.seq_length,
        "training.micro_batch_size": settings.micro_batch_size,
        "training.precision": settings.precision,
        "training.seed": settings.seed,
        "training.eval_steps": 0,
    }
    if settings.compile != "auto":
        fields["runtime.compile"] = settings.compile == "yes"
    vocab = settings.vocab_size or (TINY_VOCAB if settings.preset.startswith("tiny") else None)
    if vocab is not None:
        fields["model.vocab_size"] = vocab
    if settings.data is not None:
        fields["data.train"] = (settings.data,)
    return fields


def _build(fields: dict[str, Any], settings: StepSettings, world_size: int) -> RunConfig:
    for override in settings.overrides:
        name, equals, value = override.partition("=")
        if not equals:
            raise ConfigError(f"--set: {override!r} has no '='; write {name}=VALUE")
        fields[name] = value
    config = resolve_config(config_from_dict(fields, "bench"), vocab_size=None, eod_token=None)
    check_config(config, world_size)
    return config


def _first(value: int | None, default: int) -> int:
    return default if value is None else value
