"""Before a side of the step benchmark is timed: three layers of it against a float32 dense reference."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from chiar_megatron.bench.baselines import PlainGpt
from chiar_megatron.bench.checks import Checks, relative_error
from chiar_megatron.bench.step_sides import PlainSettings, autocast, plain_backends
from chiar_megatron.config.schema import ModelConfig, RunConfig
from chiar_megatron.model.build import build_model
from chiar_megatron.model.gpt import ChiarModel
from chiar_megatron.model.initialize import initialize_parameters
from chiar_megatron.operators.context import ForwardContext
from chiar_megatron.runtime.distributed import World
from chiar_megatron.runtime.paths import compiles

SEQUENCES, MAX_LENGTH = 2, 512
ROUTED_LAYER = 2
# (losses, all gradients, worst matrix's gradient). float32 products on a GPU may be TF32.
# Seen in bf16 with the 400m's widths: 0.016, 0.007, 0.010.
_LIMITS = {"bf16": (0.05, 0.025, 0.06), "cuda fp32": (0.01, 0.02, 0.1), "cpu fp32": (1e-4, 1e-4, 1e-3)}


def check_product(name: str, config: RunConfig, world: World, checks: Checks, compiled: bool = False) -> None:
    """The side's widths, precision, kernels and dispatch in a training pass of 3 layers.

    compiled: with compiled layers and loss, where the side has them and decisions are not forced.

    The reference computes every token densely in float32, from the same weights and with the same
    decisions, since a token near the threshold may fall either way. A routed side is checked twice: its
    own router with forced decisions (exactly as many rows), and a random router, which decides alike in
    any precision, with the side's capacity (padded rows). Raises WrongResult.
    """
    if not compiled:
        config = replace(config, runtime=replace(config.runtime, compile=False))
    model = config.model
    if "R" not in model.schedule:
        _check_schedule(f"{name}, A*3", replace(model, schedule="A*3"), config, world, checks)
        return
    small = replace(model, schedule="D R A")
    length, rho = min(model.seq_length, MAX_LENGTH), model.router.target or 0.5
    forced_SB = _decisions(rho, length, world.device)
    _check_schedule(f"{name}, D R A forced", small, config, world, checks, forced_SB)
    # Far enough under ρ that nothing overflows.
    chance = replace(model.router, kind="random", threshold=1.0 - 0.9 * rho)
    _check_schedule(f"{name}, D R A by chance", replace(small, router=chance), config, world, checks)


def _check_schedule(
    name: str,
    model: ModelConfig,
    config: RunConfig,
    world: World,
    checks: Checks,
    forced_SB: Tensor | None = None,
) -> None:
    length = min(model.seq_length, MAX_LENGTH)
    small = replace(model, seq_length=length)
    own = replace(config, model=small)
    dense = replace(small.router, dispatch="dense", capacity="none")
    exact = replace(
        own, model=replace(small, router=dense), training=replace(config.training, precision="fp32")
    )
    module, reference = (_build(settings, world) for settings in (own, exact))
    if compiles(world.device, config.runtime.compile):
        module.compile_parts()
    _stir(module)
    with torch.no_grad():
        weights = dict(module.named_parameters())
        for key, parameter in reference.named_parameters():
            parameter.copy_(weights[key])
    batch = _batch(small.vocab_size or 0, length, world.device, config.training.seed)
    loss, gradients = _train_pass(module, batch, forced_SB)
    with sdpa_kernel(SDPBackend.MATH):
        loss_reference, gradients_reference = _train_pass(reference, batch, forced_SB)
    limits = _LIMITS[_kind(config, world.device)]
    what = f"{name} {SEQUENCES}×{length} {config.training.precision} against dense fp32"
    # Losses lie close together; about their mean they tell more.
    mean = loss_reference.mean()
    checks.close(f"{what}: losses about their mean", loss - mean, loss_reference - mean, limits[0])
    _check_gradients(what, gradients, gradients_reference, limits, checks)


def _check_gradients(
    what: str,
    gradients: dict[str, Tensor],
    references: dict[str, Tensor],
    limits: tuple[float, float, float],
    checks: Checks,
) -> None:
    whole, whole_reference = (
        torch.cat([tensors[key].flatten().double() for key in references])
        for tensors in (gradients, references)
    )
    checks.close(f"{what}: gradients", whole, whole_reference, limits[1])
    matrices = {
        key: relative_error(gradients[key], references[key])
        for key in references
        if references[key].dim() > 1 and float(references[key].norm()) > 0.0
    }
    worst = max(matrices, key=lambda key: matrices[key])
    name = worst.removeprefix("decoder.layers.")
    checks.below(f"{what}: worst matrix ({name})", matrices[worst], limits[2])


def check_plain(settings: PlainSettings, config: RunConfig, device: torch.device, checks: Checks) -> None:
    """Two layers of the plain GPT as it is trained (precision, attention, compilation)
    against itself in float32 with the softmax written out. Raises WrongResult."""
    sizes = replace(settings.sizes, layers=2, seq_length=min(settings.sizes.seq_length, MAX_LENGTH))
    torch.manual_seed(config.training.seed)
    with torch.device(device):
        model, reference = PlainGpt(sizes), PlainGpt(sizes, attention="plain")
    reference.load_state_dict(model.state_dict())
    tokens_BS, labels_BS = _batch(sizes.vocab, sizes.seq_length, device, config.training.seed)
    compute = torch.compile(model) if settings.compiled else model
    with autocast(device, settings.precision), plain_backends(device, settings.cudnn):
        loss = compute(tokens_BS, labels_BS)
    reference_loss = reference(tokens_BS, labels_BS)
    gradients, references = (_gradients(net, of) for net, of in ((model, loss), (reference, reference_loss)))
    limits = _LIMITS[_kind(config, device)]
    what = f"plain GPT{', cuDNN' * settings.cudnn}: 2 layers, {settings.precision} against plain fp32"
    checks.close(f"{what}: loss", loss.float(), reference_loss, limits[0])
    _check_gradients(what, gradients, references, limits, checks)


def _gradients(module: torch.nn.Module, loss: Tensor) -> dict[str, Tensor]:
    named = dict(module.named_parameters())
    return dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))


def _kind(config: RunConfig, device: torch.device) -> str:
    return "bf16" if config.training.precision == "bf16" else f"{device.type} fp32"


def _build(config: RunConfig, world: World) -> ChiarModel:
    module = build_model(config, world)
    initialize_parameters(module, config.training.seed)
    module.train()
    return module


@torch.no_grad()
def _stir(module: ChiarModel) -> None:
    """Move weights away from their start, where filters are the identity and attention is nearly even."""
    generator = torch.Generator().manual_seed(7)
    for parameter in module.parameters():
        std = 0.5 * parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.1
        noise = torch.randn(parameter.shape, generator=generator) * std
        parameter.add_(noise.to(parameter))


def _batch(vocab: int, length: int, device: torch.device, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(vocab, (SEQUENCES, length + 1), generator=generator).to(device)
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def _decisions(rho: float, length: int, device: torch.device) -> Tensor:
    """Random decisions `[s, b]` with just under ρ of the tokens light, so that none overflows."""
    tokens = length * SEQUENCES
    order = torch.randperm(tokens, generator=torch.Generator().manual_seed(1))
    light = torch.zeros(tokens, dtype=torch.bool)
    light[order[: math.floor(rho * tokens)]] = True
    return light.view(length, SEQUENCES).to(device)


def _train_pass(
    module: ChiarModel, batch: tuple[Tensor, Tensor], forced_SB: Tensor | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """(losses of every token, gradient of their sum by parameter); parameters without one are left out."""
    tokens_BS, labels_BS = batch
    context = ForwardContext(tokens_BS=tokens_BS)
    if forced_SB is not None:
        context.forced_light_SB = {ROUTED_LAYER: forced_SB}
    losses: Any = module(tokens_BS, context, labels=labels_BS)
    losses[0].sum().backward()
    gradients = {
        key: parameter.grad for key, parameter in module.named_parameters() if parameter.grad is not None
    }
    return losses[0].detach().float(), gradients
