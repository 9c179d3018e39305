"""`chiar bench layer`: one attention, one routed and one spectral layer of the product, both directions."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from chiar_megatron.bench.record import Report
from chiar_megatron.bench.step_check import check_product
from chiar_megatron.bench.step_config import StepSettings, routed_config, twin_config
from chiar_megatron.bench.timing import Run, Spread, matmul_rate, rotation, time_in_turn
from chiar_megatron.config.schema import RunConfig
from chiar_megatron.model.accounting import flops_per_sequence
from chiar_megatron.model.build import build_model
from chiar_megatron.model.initialize import initialize_parameters
from chiar_megatron.model.layer import ChiarLayer
from chiar_megatron.operators.context import ForwardContext
from chiar_megatron.routing.balance import capacity_rows
from chiar_megatron.runtime.distributed import World, shutdown, single_process_world
from chiar_megatron.runtime.paths import compiles

SCHEDULE = "D R A"
HEADER = ("layer", "ms", "quartiles", "routed", "rows exec", "×floor", "×A")


@dataclass(frozen=True)
class TimedLayer:
    """A layer, the config it was built from, and the tokens that it sends to attention."""

    name: str
    layer: ChiarLayer
    config: RunConfig
    rho: float
    routed: list[float]
    """Share of light tokens in each input set; empty where nothing is routed."""


def bench_layer(parsed: Any) -> int:
    """Check and time every layer; 0, or WrongResult."""
    started_here = not dist.is_initialized()
    world = single_process_world(parsed.device)
    try:
        settings = StepSettings.of(_as_step(parsed), world.device)
        twin, configs = twin_config(settings, world.size), _configs(settings, world)
        report = Report(f"layer_T{settings.seq_length}", settings, world.device, parsed)
        _check({"A": twin, **configs}, world, report)
        if report.out_of_time:
            report.note(f"{', '.join(['A', 'D', *configs])}: skipped, --time-limit has passed")
            report.table(HEADER, [])
        else:
            rounds = parsed.rounds or (20 if world.device.type == "cuda" else 3)
            _time(settings, configs, world, report, rounds)
    finally:
        if started_here:
            shutdown()
    return 0


def _as_step(parsed: Any) -> argparse.Namespace:
    """The options that a layer has not, as the step benchmark would have them."""
    absent = dict(
        tokens_per_step=parsed.tokens, micro_batch_size=None, steps=None, warmup=None, routed_warmup=None,
        sides=("twin", "routed"), repeat_twin=False, check=True,
        check_compiled=False, data=None, vocab_size=None, profile=None,
    )  # fmt: skip
    return argparse.Namespace(**absent, **vars(parsed))


def _configs(settings: StepSettings, world: World) -> dict[str, RunConfig]:
    """One model of three layers for every router and ρ, without what stands around the layers."""
    configs = {}
    for router in settings.routers:
        for rho in settings.rhos:
            config = routed_config(settings, router, rho, world.size)
            model = replace(
                config.model, schedule=SCHEDULE, meta_router=replace(config.model.meta_router, enabled=False)
            )
            configs[f"R {router} ρ={rho:g}"] = replace(config, model=model)
    return configs


def _check(configs: Mapping[str, RunConfig], world: World, report: Report) -> None:
    for name, config in configs.items():
        if report.out_of_time:  # the layers are timed in one go, or not at all
            return
        before = len(report.checks.measured)
        check_product(name, config, world, report.checks)
        report.say(f"{name}: {report.checks.summary(before)}")


def _time(
    settings: StepSettings, configs: Mapping[str, RunConfig], world: World, report: Report, rounds: int
) -> None:
    dtype = torch.bfloat16 if settings.precision == "bf16" else torch.float32
    rate = matmul_rate(world.device, dtype)
    report.note(
        f"floor: useful training FLOPs of the ledger, DCTs as FFTs, at {rate / 1e12:.3g} TFLOP/s, a large "
        "matrix product measured in this run; forward and backward, gradients of weights included"
    )
    inputs = _inputs(settings, world.device, dtype)
    layers = _layers(configs, world, inputs)
    runs: dict[str, Run] = {timed.name: _run(timed.layer, inputs) for timed in layers}
    spreads = time_in_turn(runs, world.device, len(inputs.hidden), rounds)
    full = spreads["A"].median
    table = []
    for timed in layers:
        result = _result(timed, settings, spreads[timed.name], rate)
        result["ratio_to_attention_layer"] = spreads[timed.name].median / full
        report.add(result)
        table.append(_row(result))
    report.table(HEADER, table)


@dataclass(frozen=True)
class Inputs:
    """Sets to rotate among: hidden states and gradients `[s, b, h]`, token ids `[b, s]`."""

    hidden: list[Tensor]
    grads: list[Tensor]
    tokens: list[Tensor]


def _inputs(settings: StepSettings, device: torch.device, dtype: torch.dtype) -> Inputs:
    config = twin_config(settings, 1)
    hidden, length = config.model.hidden_size, settings.seq_length
    batch = settings.tokens_per_step // length
    generator = torch.Generator(device).manual_seed(settings.seed)

    def normal() -> Tensor:
        # Sequence after sequence in memory, as it lies from layer to layer.
        numbers = torch.randn(batch, length, hidden, device=device, generator=generator)
        return numbers.to(dtype).transpose(0, 1)

    sets = rotation(2 * settings.tokens_per_step * hidden * dtype.itemsize, device)
    ids = [torch.randint(1 << 15, (batch, length), device=device, generator=generator) for _ in range(sets)]
    return Inputs([normal().requires_grad_() for _ in range(sets)], [normal() for _ in range(sets)], ids)


def _layers(configs: Mapping[str, RunConfig], world: World, inputs: Inputs) -> list[TimedLayer]:
    """A and D from the first model, R from each."""
    timed: list[TimedLayer] = []
    for name, config in configs.items():
        module = build_model(config, world)
        initialize_parameters(module, config.training.seed)
        module.train()
        spectral, routed, attention = module.chiar_layers
        if compiles(world.device, config.runtime.compile):
            # All kinds stand side by side here, and share one function: more versions than torch expects.
            torch._dynamo.config.recompile_limit = 64
            for layer in (spectral, routed, attention):
                layer.compile()
        if not timed:
            timed += [TimedLayer("A", attention, config, 1.0, []), TimedLayer("D", spectral, config, 0.0, [])]
        rho = config.model.router.target or 0.5
        timed.append(TimedLayer(name, routed, config, rho, _settle(routed, rho, inputs)))
    return timed


@torch.no_grad()
def _settle(layer: ChiarLayer, rho: float, inputs: Inputs) -> list[float]:
    """Set the threshold where ρ of the first set's tokens are light; shares of all sets then."""
    assert layer.router is not None
    scores = []
    for hidden, tokens in zip(inputs.hidden, inputs.tokens, strict=True):
        context = ForwardContext(tokens_BS=tokens)
        scores.append(layer.router(hidden, context, (0, 1)).score_SB.float().flatten())
    ordered = scores[0].sort(descending=True).values
    layer.router.threshold.copy_(ordered[round(rho * len(ordered))])
    return [float((score > layer.router.threshold).double().mean()) for score in scores]


def _run(layer: ChiarLayer, inputs: Inputs) -> Run:
    weights = [parameter for parameter in layer.parameters() if parameter.requires_grad]

    def both(index: int) -> object:
        context: Any = ForwardContext(tokens_BS=inputs.tokens[index])
        out, _ = layer(inputs.hidden[index], packed_seq_params=context)
        return torch.autograd.grad(
            out, [inputs.hidden[index], *weights], inputs.grads[index], allow_unused=True
        )

    return both


def _result(timed: TimedLayer, settings: StepSettings, spread: Spread, rate: float) -> dict[str, Any]:
    model, tokens = timed.config.model, settings.tokens_per_step
    most = capacity_rows(model.router, tokens)
    capacity = None if most is None else most / tokens
    ledger = flops_per_sequence(
        model, settings.seq_length, timed.rho, dct_form="fft", capacity_fraction=capacity
    )
    number = {"D": 1, "R": 2, "A": 3}[timed.name[0]]
    flops = ledger.total("training", layer=number).useful * tokens / settings.seq_length
    rows = None
    if timed.routed:
        share = sum(timed.routed) / len(timed.routed)
        rows = {"executed": capacity_rows(model.router, tokens), "useful": share * tokens}
    return {
        "name": timed.name,
        "phase": "forward+backward",
        "time": spread.record("s"),
        "tokens": tokens,
        "routed_fraction": timed.routed,
        "rows": rows,
        "slack": model.router.slack if rows else None,
        "useful_flops": flops,
        "floor_seconds": flops / rate,
        "floor_counted_as": "useful training FLOPs of the ledger, DCTs as FFTs, at the measured rate",
        "times_floor": spread.median * rate / flops,
    }


def _row(result: dict[str, Any]) -> list[str]:
    time, rows, routed = result["time"], result["rows"], result["routed_fraction"]
    return [
        result["name"],
        f"{time['median'] * 1e3:.3f}",
        f"{time['quartile_low'] * 1e3:.3f}–{time['quartile_high'] * 1e3:.3f}",
        f"{min(routed):.3f}–{max(routed):.3f}" if routed else "",
        "" if rows is None else str(rows["executed"]),
        f"{result['times_floor']:.2f}",
        f"{result['ratio_to_attention_layer']:.3f}",
    ]
